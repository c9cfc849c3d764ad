"""YAML as settings need it: YAML 1.2 scalars, every value under its dotted name together with the place it was written.

PyYAML reads YAML 1.1, where `fp8: off` is False, `1e-6` a string, `010` eight and `2024-01-01` a date. Settings files are read
by the core rules of YAML 1.2 instead: true and false, null, plain integers, and floats with or without a point.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.config.errors import SettingsError

COMMAND_LINE = "command line"
TAG = "tag:yaml.org,2002:"
# Plain scalars by the YAML 1.2 core schema: type, pattern, possible first characters.
SCALARS = (
    ("null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    ("float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"), list("-+.0123456789")),
)


@dataclass(frozen=True)
class Value:
    """One value as written: a scalar, a list or an empty mapping, with its place for messages."""

    value: Any
    where: str  # "recipe.yaml:3" or "command line"
    folder: Path  # relative paths in the value are looked for here first


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which YAML 1.2 would read as a number, such as "1e5"."""


_Loader.yaml_implicit_resolvers = {}  # an own dictionary: what is added below replaces YAML 1.1 instead of joining it
for _type, _pattern, _first in SCALARS:
    _Loader.add_implicit_resolver(TAG + _type, _pattern, _first)
    _Dumper.add_implicit_resolver(TAG + _type, _pattern, _first)


def read_yaml(path: Path, give: str = "Give the path of a YAML settings file.") -> dict[str, Value]:
    """All values of a file by dotted name. A name given twice, a broken file or a top level that is no mapping is refused.

    `give` tells what to do about a file that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}. {give}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not UTF-8 text ({error.reason}). {give}") from error
    return _parse(text, "", str(path), path.parent)


def read_override(text: str) -> dict[str, Value]:
    """The values of one command-line override, `layout.tensor=4` or `layout={tensor: 4, pipeline: 2}`."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise SettingsError(
            f"{COMMAND_LINE}: {text!r} is no override and no settings file. Write name=value, as in layout.tensor=4, or "
            "the path of a file that ends in .yaml."
        )
    return _parse(value, name.strip(), COMMAND_LINE, Path())


def write_yaml(values: dict[str, Any]) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def _parse(text: str, prefix: str, source: str, folder: Path) -> dict[str, Value]:
    found: dict[str, Value] = {}
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = source if mark is None or source == COMMAND_LINE else f"{source}:{mark.line + 1}"
        shown = f" {prefix}={text}:" if prefix else ""
        raise SettingsError(f"{place}:{shown} not valid YAML: {error.problem or error.context}. Mend the syntax.") from error
    except yaml.reader.ReaderError as error:
        raise SettingsError(f"{source}: not valid YAML: {error.reason} at character {error.position}. Remove it.") from error
    if node is None:  # nothing but space and comments
        return {prefix: Value(None, source, folder)} if prefix else {}
    for name, leaf in _leaves(node, prefix, source, ()):
        value = Value(_plain(leaf, source, ()), _place(leaf, source), folder)
        if name in found:
            raise SettingsError(f"{value.where}: {name} is set a second time, first at {found[name].where}. Keep one.")
        found[name] = value
    return found


def _leaves(node: yaml.Node, prefix: str, source: str, above: tuple[yaml.Node, ...]) -> Iterator[tuple[str, yaml.Node]]:
    """The nodes that hold values, by dotted name. An empty mapping is a value, so that its name is checked too."""
    if not isinstance(node, yaml.MappingNode):
        if not prefix:
            raise SettingsError(f"{_place(node, source)}: a settings file holds sections such as `layout:`, not a bare value.")
        yield prefix, node
        return
    _refuse_cycle(node, above, source)
    if prefix and not node.value:
        yield prefix, node
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise SettingsError(f"{_place(key, source)}: the name of a setting must be plain text, not a list or mapping.")
        yield from _leaves(value, f"{prefix}.{key.value}" if prefix else key.value, source, (*above, node))


def _plain(node: yaml.Node, source: str, above: tuple[yaml.Node, ...]) -> Any:
    """The value of a node, all of it."""
    _refuse_cycle(node, above, source)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(entry, source, (*above, node)) for entry in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _plain(value, source, (*above, node)) for key, value in node.value}
    try:
        match node.tag.removeprefix(TAG):
            case "null":
                return None
            case "bool":
                return node.value.lower() == "true"
            case "int":
                return int(node.value)
            case "float" if math.isfinite(number := float(node.value)):
                return number
            case "str":
                return node.value
    except ValueError as error:  # an explicit tag on other text: !!int x
        raise SettingsError(f"{_place(node, source)}: {node.value!r} does not fit its tag {node.tag}. Remove it.") from error
    raise SettingsError(f"{_place(node, source)}: {node.value} is neither text, true or false, nor a number within range.")


def _refuse_cycle(node: yaml.Node, above: tuple[yaml.Node, ...], source: str) -> None:
    if any(node is ancestor for ancestor in above):
        raise SettingsError(f"{_place(node, source)}: a YAML alias refers to what contains it. Write the value out.")


def _place(node: yaml.Node, source: str) -> str:
    return source if source == COMMAND_LINE else f"{source}:{node.start_mark.line + 1}"
