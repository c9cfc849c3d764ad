"""Settings from YAML files and command-line overrides.

A file may say `include: base.yaml` or `include: [base.yaml, fp8.yaml]`; included files are read first, in order, and what comes
later wins, setting by setting: includes, then the file itself, then further files and overrides in the order in which they are
given. Whatever is wrong is reported at once, each with the place where it was written.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.names import allowed_values, nearest_name, open_name, open_names, section_names, setting_fields
from megatron_rl.config.settings import Settings
from megatron_rl.config.yaml_values import COMMAND_LINE, Value, read_override, read_yaml, write_yaml

SUFFIXES = (".yaml", ".yml")  # of settings files
# Paths that are read: looked for beside the file that names them.
INPUT_PATHS = (
    "policy.config",
    "policy.init",
    "data.tokenizer",
    "data.chat_template",
    "servers.api_key_file",
    "servers.urls_file",
)
INPUT_LISTS = ("data.sources", "data.validation_sources")  # entries with a member `path` that is one


def load_settings(path: Path | str | None, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a file (none: defaults only), with what is laid over them in order: further files, such as
    `pairs/mine.yaml`, and overrides, such as `layout.tensor=4`."""
    values = {} if path is None else _read_file(Path(path), ())
    for each in overrides:
        values = _later(values, _read_file(Path(each), ()) if names_settings_file(each) else read_override(each))
    return _build(values)


def names_settings_file(argument: str) -> bool:
    """Whether an argument behind the first is a settings file and no override."""
    return "=" not in argument and argument.endswith(SUFFIXES)


def dump_settings(settings: Settings) -> str:
    """YAML of every setting, defaults included. Loaded again it gives equal settings."""
    return write_yaml(settings.model_dump(mode="json"))


def _read_file(path: Path, chain: tuple[Path, ...]) -> dict[str, Value]:
    """The values of a file and of those it includes. `chain` holds the files that led here."""
    if any(path.resolve() == earlier.resolve() for earlier in chain):
        shown = " -> ".join(str(link) for link in (*chain, path))
        raise SettingsError(f"include: files include each other in a circle: {shown}. Remove one of these includes.")
    own = read_yaml(path)
    included = _included(own.pop("include", None))
    values: dict[str, Value] = {}
    for name, where in included:
        other = Path(os.path.normpath(path.parent / name))
        if not other.is_file():
            raise SettingsError(f"{where}: include: {name} is not a file beside {path}. Write its path relative to that file.")
        values = _later(values, _read_file(other, (*chain, path)))
    return _later(values, own)


def _later(values: dict[str, Value], own: dict[str, Value]) -> dict[str, Value]:
    """What comes later wins, setting by setting. An open setting written as a whole, `options: {}`, drops its members."""
    cleared = tuple(f"{name}." for name in own if name in open_names())
    return {name: value for name, value in values.items() if not name.startswith(cleared)} | own


def _included(entry: Value | None) -> list[tuple[str, str]]:
    if entry is None or entry.value is None:
        return []
    names = entry.value if isinstance(entry.value, list) else [entry.value]
    if not all(isinstance(name, str) for name in names):
        raise SettingsError(f"{entry.where}: include = {_text(entry.value)}: expected a file name or a list of file names.")
    return [(name, entry.where) for name in names]


def _build(values: dict[str, Value]) -> Settings:
    """Check names first, then let pydantic check the values; report everything found."""
    known = _known(values)
    unknown = {name: value for name, value in values.items() if name not in known and open_name(name) is None}
    problems = [problem for name, value in unknown.items() for problem in _wrong_name(name, value)]
    problems += [_missing(name) for name, field in setting_fields().items() if field.is_required() and name not in known]
    try:
        # Through JSON: strict there takes a list for a tuple and text for a path, but no "4" and no true for a number.
        settings = Settings.model_validate_json(json.dumps(_nested(known), default=str), strict=True)
    except ValidationError as error:
        problems += _wrong_values(error, known)
        raise SettingsError("\n".join(problems)) from None
    if problems:
        raise SettingsError("\n".join(problems))
    return settings


def _known(values: dict[str, Value]) -> dict[str, Value]:
    """The values of settings that there are, the members of an open setting brought together in it."""
    known: dict[str, Value] = {}
    for name, value in values.items():
        setting = open_name(name)
        if setting is None:
            if name in setting_fields():
                known[name] = value
        elif setting == name:
            known[name] = value
        else:
            whole = known[setting].value if setting in known and isinstance(known[setting].value, dict) else {}
            known[setting] = replace(value, value=_with_member(whole, name.removeprefix(f"{setting}.").split("."), value.value))
    first_weights = known.get("policy.init")
    if first_weights is not None and first_weights.value != "random":
        known.setdefault("policy.config", first_weights)  # a checkpoint folder holds its own config
    return known


def _with_member(whole: dict[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """The mapping with a value put at a path of names."""
    first, *rest = path
    inner = whole.get(first)
    return whole | {first: _with_member(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def _nested(known: dict[str, Value]) -> dict[str, Any]:
    """All settings as nested mappings: what was given, else the default (strict JSON takes no default that is a Path)."""
    nested: dict[str, Any] = {}
    for name, field in setting_fields().items():
        *sections, last = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        if name in known:
            place[last] = _with_found_paths(name, known[name])
        elif not field.is_required():
            place[last] = field.default
    return nested


def _wrong_name(name: str, value: Value) -> Iterator[str]:
    if name in section_names():
        if value.value not in (None, {}):
            member = next(setting for setting in setting_fields() if setting.startswith(f"{name}."))
            yield f"{value.where}: {name} = {_text(value.value)}: this is a section. Set one of its members, such as {member}."
        return
    nearest = nearest_name(name)
    advice = f"Did you mean {nearest}?" if nearest else "`megatron-rl settings` lists all settings."
    yield f"{value.where}: unknown setting {name}. {advice}"


def _missing(name: str) -> str:
    section, _, last = name.rpartition(".")
    return f"{name} is not set and has no default. Add `{section}: {{{last}: ...}}` to the file or {name}=... to the command."


def _wrong_values(error: ValidationError, known: dict[str, Value]) -> Iterator[str]:
    """One line for each wrong setting, told from its declaration; pydantic only says which setting it is."""
    wrong = {".".join(map(str, detail["loc"])): None for detail in error.errors() if detail["type"] != "missing"}
    names = dict.fromkeys(name for location in wrong for name in known if f"{location}.".startswith(f"{name}."))
    for name in names:
        value, field = known[name], setting_fields()[name]
        told = f"{value.where}: {name} = {_text(value.value)}: expected {allowed_values(field)}."
        yield told + _in_quotes(name, value) if str in (field.annotation, *get_args(field.annotation)) else told


def _in_quotes(name: str, value: Value) -> str:
    """YAML takes 90 for a number and true for a yes: how to write them where text is meant. The shell takes quotes away."""
    if isinstance(value.value, list | dict | None):
        return ""
    text = f'"{_text(value.value)}"'
    on_command_line = f"'{name}={text}'"
    return f" In quotes it is text: {on_command_line if value.where == COMMAND_LINE else text}."


def _with_found_paths(name: str, value: Value) -> Any:
    """The value of a setting, input paths in it found."""
    if name in INPUT_PATHS:
        return _found_path(value)
    if name in INPUT_LISTS and isinstance(value.value, list):
        return [
            entry | {"path": _found_path(replace(value, value=entry["path"]))}
            if isinstance(entry, dict) and "path" in entry
            else entry
            for entry in value.value
        ]
    return value.value


def _found_path(value: Value) -> Any:
    """An input path: beside the file that names it if it exists there, else in the working directory.

    A path that exists is made absolute, so that settings saved with a run mean the same file from any directory.
    """
    if not isinstance(value.value, str):
        return value.value
    candidates = (value.folder / value.value, Path(value.value))
    return next((str(path.resolve()) for path in candidates if os.path.exists(path)), value.value)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
