"""Who is told what a run does. The main rank tells; the others stay silent."""

from collections.abc import Sequence
from typing import Protocol

from megatron_rl.observe.records import EvaluationRecord, RunRecord, StepRecord


class Observer(Protocol):
    """Is told of a run as it goes: a log, a screen, or a callback of your own. What it raises ends the run."""

    def started(self, run: RunRecord, step: int) -> None:
        """A run begins with this step, which is not 0 when it is resumed: what was told of later steps did not happen."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""

    def evaluated(self, record: EvaluationRecord) -> None:
        """An evaluation is done. One of the same step and name takes the place of an earlier one."""

    def finished(self) -> None:
        """The run has come to its end. A run that is killed never says so, one that fails or is preempted need not."""


class Everyone:
    """An observer that tells others, in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = tuple(observers)

    def started(self, run: RunRecord, step: int) -> None:
        for observer in self.observers:
            observer.started(run, step)

    def step(self, record: StepRecord) -> None:
        for observer in self.observers:
            observer.step(record)

    def evaluated(self, record: EvaluationRecord) -> None:
        for observer in self.observers:
            observer.evaluated(record)

    def finished(self) -> None:
        for observer in self.observers:
            observer.finished()
