"""What a run tells about itself: one record a step, one an evaluation, one a start."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Span:
    """A phase of a step: wait, sample, score, old, update, publish, evaluate, checkpoint, export. Spans may overlap.

    What one worker does after another shares a lane: sampling that goes on beside learning has its own.
    """

    name: str
    start: float  # seconds since the epoch
    stop: float
    lane: str = "train"

    @property
    def seconds(self) -> float:
        return self.stop - self.start


@dataclass(frozen=True)
class SequenceTrace:
    """What learning did with one sample. `row` finds the sample in the bank's sealed step."""

    row: int
    group: str
    advantage: float
    ratio: float  # new / old of the sequence, as the surrogate takes it
    clipped: bool
    log_ratio: NDArray[np.float32]  # [length] new − old of each token, 0 where the policy wrote nothing
    token_advantage: NDArray[np.float32] | None = None  # [length], where tokens have advantages of their own


@dataclass(frozen=True)
class StepRecord:
    """A training step that is done. `observe.vocabulary` knows what metrics mean; a name that it does not know is kept too."""

    step: int
    metrics: Mapping[str, float]
    spans: Sequence[Span] = ()
    expert_tokens: NDArray[np.int64] | None = None  # [moe layers, experts] tokens that each expert was given
    traces: Sequence[SequenceTrace] = ()

    def __post_init__(self) -> None:
        taken = {"step", "time"} & set(self.metrics)
        if taken:
            raise ValueError(f"a metric cannot be called {taken.pop()}: a step's line has that already")


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation that is done. `step` counts the training steps behind the weights that were evaluated."""

    step: int
    name: str  # of the held-out set
    metrics: Mapping[str, float]
    results: Path | None = None  # what came of every prompt: a file, relative to the run's directory


@dataclass(frozen=True)
class RunRecord:
    """What runs: written when it starts, and again when it is resumed."""

    settings: str  # YAML, whole
    layout: str  # which rank holds what, as `train --dry-run` prints it
    versions: Mapping[str, str]  # of packages, by name
    host: str
    ranks: int
    model: str  # the family
    parameters: int
    command: Sequence[str]
    started: float  # seconds since the epoch
    steps: int | None = None  # that the run shall have
    information: Mapping[str, str] = field(default_factory=dict)  # whatever else is worth knowing, in words
