"""The commands that the documentation's pages tell their readers to type."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What may stand before the words of a command: variables, a launcher with its options.
BEGINNING = re.compile(r"\s*(?:\w+=\S+ )*(?:torchrun (?:\S+ )*-m megatron_rl\.cli|(?:\.venv/bin/)?megatron-rl)(?= |$)")
SCRIPT = re.compile(r"(?:python|torchrun --nproc-per-node \d+) (docs/examples/\w+\.py)([^#>]*)(?:> (\S+))?")


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def lines(page: Path) -> list[str]:
    """The page's lines, those that a backslash continues put together."""
    return re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8")).splitlines()


@dataclass(frozen=True)
class Line:
    """A command as a page writes it: the words behind the program's name."""

    page: Path
    words: list[str]
    whole: bool  # in a block, to be typed as it is; else in a sentence, where arguments may be missing
    number: int = 0  # of the line in the page

    def __str__(self) -> str:
        return f"{short(self.page)}: {' '.join(self.words)}"


def commands(page: Path) -> Iterator[Line]:
    fenced = False
    for number, line in enumerate(lines(page)):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        block = fenced or line.startswith("    ")
        for piece in [line] if block else re.findall(r"`([^`]+)`", line):
            start = BEGINNING.match(piece)
            if start:
                words = shlex.split(piece[start.end() :], comments=True)
                yield Line(page, words if block else ["1" if word == "N" else word for word in words], block, number)


@dataclass(frozen=True)
class Script:
    """An example that a page has its readers start."""

    path: str
    arguments: list[str]
    output: str | None  # the file that takes what it prints
    number: int

    def __str__(self) -> str:
        return " ".join([self.path, *self.arguments])


def scripts(page: Path) -> Iterator[Script]:
    for number, line in enumerate(lines(page)):
        found = SCRIPT.match(line)
        if found:
            yield Script(found[1], found[2].split(), found[3], number)


COMMANDS = [line for page in PAGES for line in commands(page) if line.words]
