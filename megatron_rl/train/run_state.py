"""What a run is beside its policy: which step it is at, and where drawing stands."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from megatron_rl.config.settings import Settings
from megatron_rl.rollout.collector import BEGINNING, Position
from megatron_rl.weights.checkpoint_files import latest_checkpoint, remove_halves

CHECKPOINTS, EXPORTS = "checkpoints", "exports"
SUPERVISED: Mapping[str, Any] = {"supervised": True}  # in the manifests of supervised fine-tuning, which has no such state


@dataclass(frozen=True)
class RunState:
    """Saved with every checkpoint, in its manifest."""

    step: int = 0  # training steps that are done
    position: Position = BEGINNING  # of drawing
    initial_entropy: float | None = None  # see Learner
    evaluated: int | None = None  # the step at which held-out prompts were last asked

    def after(self, position: Position, initial_entropy: float | None) -> Self:
        """One step later."""
        return replace(self, step=self.step + 1, position=position, initial_entropy=initial_entropy)

    def owes_evaluation(self, settings: Settings) -> bool:
        """Is it due now, and not done? A run that was told to stop in the middle of one goes on with it."""
        due = settings.evaluation.due(self.step, settings.run.steps) and settings.bank.replay is None
        return due and self.evaluated != self.step

    def over(self, settings: Settings) -> bool:
        """Is there nothing left to do?"""
        return self.step >= settings.run.steps and not self.owes_evaluation(settings)

    def to_json(self) -> dict[str, Any]:
        draws = {"draws": self.position.draws, "pending": list(self.position.pending)}
        return {"step": self.step, **draws, "initial_entropy": self.initial_entropy, "evaluated": self.evaluated}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """An empty one is the beginning: a checkpoint that a conversion made has none."""
        if not found:
            return cls()
        position = Position(found["draws"], tuple(found["pending"]))
        return cls(found["step"], position, found["initial_entropy"], found.get("evaluated"))


def newest(settings: Settings) -> Path | None:
    """The checkpoint to continue from; none when the run was killed before its first."""
    return latest_checkpoint(settings.run.directory / CHECKPOINTS)


def tidy(settings: Settings) -> None:
    """Remove checkpoints and exports that a kill has left half-written or half-deleted."""
    for name in (CHECKPOINTS, EXPORTS):
        remove_halves(settings.run.directory / name)
