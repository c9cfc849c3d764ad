"""Which phase of a step takes how long."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_rl.observe.records import Span


class Clock:
    """Notes phases as they end. Those of one lane follow one another; lanes go on side by side."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the trainer's own."""
        start = time.time()
        try:
            yield
        finally:
            self._spans.append(Span(name, start, time.time()))

    def add(self, *spans: Span) -> None:
        """Phases that somebody else went through."""
        self._spans += spans

    def take(self) -> list[Span]:
        """What was noted since the last time."""
        taken, self._spans = self._spans, []
        return taken


def seconds_by_phase(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of each phase; phases of one name add up."""
    found: dict[str, float] = {}
    for span in spans:
        name = f"seconds/{span.name}"
        found[name] = found.get(name, 0.0) + span.stop - span.start
    return found
