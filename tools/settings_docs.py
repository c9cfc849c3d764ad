"""Write docs/settings.md from the typed settings: `python tools/settings_docs.py`. A test compares."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_rl.config.names import allowed_values, setting_fields
from megatron_rl.config.settings import Settings
from megatron_rl.config.show import shown

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """\
# Settings

<!-- written by tools/settings_docs.py -->

Every setting of a run, with what it may be, its default and its meaning. `megatron-rl settings` prints the same of the
version that you have. Settings are checked, names and values and what they mean together, before anything is loaded.

- In a file: `optimizer: {lr: 1.0e-6}`. A file may begin with `include: base.yaml`, or a list of files: they are read first,
  relative to the file that names them.
- On the command line: `optimizer.lr=1e-6`, a dotted name and a value as in YAML. Lists and named values stand in quotes for
  the shell's sake: `'rewards=[{name: exact}]'`.
- In several files: every command that takes a settings file takes more behind it, whose names end in `.yaml` or `.yml`, such
  as a recipe and the machines that it shall run on. What comes later wins, setting by setting: includes, the file, then
  further files and overrides in the order in which they are given.
- A run keeps all of its settings in `settings.yaml` of its folder, defaults included.
- Input paths are looked for beside the file that names them, then in the working directory.
"""


def text() -> str:
    """The page as it should be."""
    sections: dict[str, list[tuple[str, FieldInfo]]] = {}
    for name, field in setting_fields().items():
        sections.setdefault(name.partition(".")[0], []).append((name, field))
    names = " · ".join(f"[{section}](#{section})" for section in sections)
    return "\n".join([HEAD, names, "", *(line for name, fields in sections.items() for line in _section(name, fields))])


def _section(name: str, fields: list[tuple[str, FieldInfo]]) -> Iterator[str]:
    kind = Settings.model_fields[name].annotation
    yield f"## {name}"
    yield ""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from _words(kind)
    yield from _table(fields)
    entries: dict[type[BaseModel], list[str]] = {}
    for setting, field in fields:
        entry = _entry(field)
        if entry is not None:
            entries.setdefault(entry, []).append(setting)
    for entry, owners in entries.items():
        yield f"### An entry of {' or '.join(owners)}"
        yield ""
        yield from _words(entry)
        yield from _table([(member.alias or own, member) for own, member in entry.model_fields.items()])


def _words(kind: type[BaseModel]) -> Iterator[str]:
    yield inspect.getdoc(kind) or ""
    yield ""


def _table(fields: list[tuple[str, FieldInfo]]) -> Iterator[str]:
    yield "| setting | allowed | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in fields:
        allowed = "a list of entries, as below" if _entry(field) else allowed_values(field)
        default = "required" if field.is_required() else _code(shown(field.default))
        yield f"| `{name}` | {_cell(allowed)} | {default} | {_cell(field.description or '')} |"
    yield ""


def _entry(field: FieldInfo) -> type[BaseModel] | None:
    """What a list of sections consists of."""
    if get_origin(field.annotation) is not tuple:
        return None
    first = get_args(field.annotation)[0]
    return first if isinstance(first, type) and issubclass(first, BaseModel) else None


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", "\\n")


def _code(words: str) -> str:
    return f"`{words.replace('|', chr(92) + '|')}`" if words else "empty"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
