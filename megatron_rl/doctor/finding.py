"""What a check has found."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

type Level = Literal["ok", "warning", "error"]

LEVELS: tuple[Level, ...] = ("ok", "warning", "error")  # from the best to the worst


@dataclass(frozen=True)
class Finding:
    """A fact, and where it is not fine, what to do.

    `numbers` are what was measured, for programs to read. Who looked (`check`, `host`, `rank`) is filled in by the examination.
    """

    level: Level
    what: str
    where: str
    fix: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    check: str = ""
    host: str = ""
    rank: int = 0

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"a finding is {' or '.join(LEVELS)}, not {self.level}")
        if self.level != "ok" and not self.fix:
            raise ValueError(f"a finding that is no good needs a fix: {self.what}")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "numbers": dict(self.numbers)}


def well(what: str, where: str, **numbers: float) -> Finding:
    return Finding("ok", what, where, numbers=numbers)


def warning(what: str, where: str, fix: str, **numbers: float) -> Finding:
    return Finding("warning", what, where, fix, numbers)


def error(what: str, where: str, fix: str, **numbers: float) -> Finding:
    return Finding("error", what, where, fix, numbers)


def worst(findings: Iterable[Finding]) -> Level:
    """The verdict on all of them; on none it is ok."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")
