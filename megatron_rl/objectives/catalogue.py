"""What there is, in words: every idea with its formula, source and options, read from the docstrings of this package.

A module's docstring holds its formulas, indented. Where it has several ideas it is a table whose rows begin with their names,
and a row that tells its source ends with it in brackets, set off by three blanks; otherwise all that is indented is the
formula, and the source stands in the first brackets of the text. The options are the fields of the idea's dataclass.
"""

import re
import sys
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any

from megatron_rl.objectives.registry import ADVANTAGES, PENALTIES, SURROGATES, WEIGHTS, Option, describe, find

KINDS = {"advantage": ADVANTAGES, "surrogate": SURROGATES, "weight": WEIGHTS, "penalty": PENALTIES}
INDENT = "    "
ARXIV = re.compile(r"(?:arXiv )?\b(\d{4}\.\d{5})\b")
ROW_SOURCE = re.compile(r" {3,}\(([^()]*)\)$")  # at the end of a row
TEXT_SOURCE = re.compile(r"\A[^\n]*?\(([^()]*)\)")  # in the first line


@dataclass(frozen=True)
class Entry:
    """One idea."""

    name: str
    kind: str
    text: str  # of its class
    formula: str  # maybe several lines
    source: str  # who says so: papers as `arXiv` with their numbers, or in words where there is none
    background: str  # of its module, which may tell of others too
    options: tuple[Option, ...]

    @property
    def title(self) -> str:
        """The first line of its text."""
        return self.text.partition("\n")[0]

    @property
    def papers(self) -> tuple[str, ...]:
        """arXiv numbers."""
        return tuple(ARXIV.findall(self.source))


def catalogue() -> list[Entry]:
    """Every idea: advantages, surrogates, weights, penalties, each in the registry's order."""
    return [entry_of(kind, name, cls) for kind, table in KINDS.items() for name, cls in table.items()]


def look_up(name: str) -> list[Entry]:
    """The ideas of that name, one of each kind at most; a dotted path is the user's own."""
    if ":" in name:
        cls = find("objective", {}, name)
        return [entry_of(getattr(cls, "kind", "objective"), name, cls)]
    found = [entry for entry in catalogue() if entry.name == name]
    if not found:
        find("objective", {name: cls for table in KINDS.values() for name, cls in table.items()}, name)
    return found


def entry_of(kind: str, name: str, cls: type) -> Entry:
    """What the docstrings of a class and its module say."""
    background = cleandoc(sys.modules[cls.__module__].__doc__ or "")
    formula, source = _row(background, name) or _whole(background)
    text = cleandoc(cls.__doc__ or "")
    return Entry(name, kind, text, formula, ARXIV.sub(r"arXiv \1", source), background, tuple(describe(cls)))


def written(value: Any) -> str:
    """A default as settings write it."""
    words: dict[Any, str] = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _row(background: str, name: str) -> tuple[str, str] | None:
    """The row of a table that begins with the name, with what is indented further below it; and its source."""
    lines = background.splitlines()
    start = re.compile(rf"{INDENT}{re.escape(name)} +(?! )")
    places = [i for i, line in enumerate(lines) if start.match(line)]
    if not places:
        return None
    first = places[0]
    row = [start.sub("", lines[first])]
    for line in lines[first + 1 :]:
        if not line.startswith(2 * INDENT):
            break
        row.append(line.strip())
    sources = [found[1] for line in row if (found := ROW_SOURCE.search(line))]
    return "\n".join(re.sub(r" {3,}", "   ", ROW_SOURCE.sub("", line)) for line in row), "; ".join(sources)


def _whole(background: str) -> tuple[str, str]:
    """All that is indented, and the source that the first line names."""
    lines = [line.removeprefix(INDENT) for line in background.splitlines() if line.startswith(INDENT)]
    found = TEXT_SOURCE.match(background)
    return "\n".join(lines), found[1] if found else ""
