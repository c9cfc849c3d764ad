"""What a publish did, server by server."""

from dataclasses import dataclass
from typing import Literal

Way = Literal["disk", "broadcast", "tensor"]
Result = Literal["updated", "current", "unreachable", "unchanged", "quarantined", "lost", "dropped"]


@dataclass(frozen=True)
class Outcome:
    """How a server came through a publish.

    updated: it has the version and generates. current: it had it already. unreachable: it did not answer before. unchanged: it
    failed before its weights were touched, and generates with the old ones. quarantined: it failed later, has no requests and
    is paused. lost: it failed and answers no more. dropped: it failed while somebody else held it, who was told.
    """

    url: str
    result: Result
    failure: str | None = None
    paused: float = 0.0  # seconds for which it did not generate
    difference: float | None = None  # of its log-probs from the policy's: the mean of the sequence that differs most


@dataclass(frozen=True)
class Report:
    """The same on every rank."""

    version: int
    way: Way | None  # None: no server needed anything
    bytes: int  # of the weights as the policy holds them, counted once
    seconds: float
    outcomes: tuple[Outcome, ...]

    @property
    def serving(self) -> tuple[str, ...]:
        """The servers that have this version and generate."""
        return tuple(outcome.url for outcome in self.outcomes if outcome.result in ("updated", "current"))

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for each server that has not."""
        return tuple(f"{each.url} ({each.result}): {each.failure}" for each in self.outcomes if each.failure)
