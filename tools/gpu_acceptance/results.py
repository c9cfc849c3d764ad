"""What parts found out, as JSON lines in a folder: each line is durable when it is there, whatever happens to the process.

A part's lines stand between its beginning and its end. One that begins again makes what it said before void; one that has begun
and not ended was killed, and is run again.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

FILE = "results.jsonl"
State = Literal["done", "skipped", "failed", "interrupted"]


@dataclass(frozen=True)
class Finding:
    """A row of the table: something measured, counted or read. With a bound it is a promise, kept or broken."""

    name: str
    value: float | str
    unit: str = ""
    bound: float | None = None  # the largest value allowed
    note: str = ""
    series: tuple[float, ...] = ()  # what the value was made of, for who wants to know more

    @property
    def kept(self) -> bool | None:
        """None where nothing was promised. Not-a-number keeps no promise."""
        if self.bound is None:
            return None
        return isinstance(self.value, int | float) and not math.isnan(self.value) and self.value <= self.bound


@dataclass(frozen=True)
class Outcome:
    """How a part ended, and what it found."""

    part: str
    state: State
    reason: str = ""  # of everything but done
    seconds: float = 0.0
    when: str = ""
    where: str = ""  # the GPU, or none
    smoke: bool = False
    findings: tuple[Finding, ...] = field(default=(), compare=False)

    @property
    def good(self) -> bool:
        return self.state in ("done", "skipped") and not any(finding.kept is False for finding in self.findings)


class Results:
    """The file of one folder. Several processes may append to it, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FILE

    def begin(self, part: str, smoke: bool) -> None:
        self._append({"line": "begin", "part": part, "smoke": smoke})

    def add(self, part: str, finding: Finding) -> None:
        self._append({"line": "finding", "part": part, **asdict(finding)})

    def end(
        self, part: str, state: State, *, reason: str = "", seconds: float = 0.0, where: str = "", smoke: bool = False
    ) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        told = {"state": state, "reason": reason, "seconds": round(seconds, 1), "when": when, "where": where, "smoke": smoke}
        self._append({"line": "end", "part": part, **told})

    def read(self) -> dict[str, Outcome]:
        """The last word on every part."""
        return read_results([self.folder])

    def _append(self, line: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line, ensure_ascii=False) + "\n"
        if self.path.exists() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
            text = "\n" + text  # a kill tore the last line
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def read_results(folders: Iterable[Path]) -> dict[str, Outcome]:
    """Of several folders together; of a part that is in more than one, the later folder's word counts."""
    outcomes: dict[str, Outcome] = {}
    for folder in folders:
        findings: dict[str, list[Finding]] = {}
        for line in _lines(folder / FILE):
            part, kind = line.pop("part"), line.pop("line")
            if kind == "begin":
                findings[part] = []
                outcomes[part] = Outcome(part, "interrupted", "it was ended before its end", smoke=line["smoke"])
            elif kind == "finding":
                findings[part].append(_finding(line))
            else:
                outcomes[part] = Outcome(part, findings=tuple(findings[part]), **line)
        for part, found in findings.items():
            if outcomes[part].state == "interrupted" and not outcomes[part].when:
                outcomes[part] = Outcome(**{**_shallow(outcomes[part]), "findings": tuple(found)})
    return outcomes


def _shallow(outcome: Outcome) -> dict[str, Any]:
    return {each.name: getattr(outcome, each.name) for each in fields(outcome)}


def _finding(line: Mapping[str, Any]) -> Finding:
    return Finding(**{**line, "series": tuple(line["series"])})


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """Whole lines. A line that a kill tore says nothing."""
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        yield line
