"""Runs made up for the tests of this room, told through the real observers: as much of a run as a page needs, without one."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rl.observe.observer import Observer
from megatron_rl.observe.records import EvaluationRecord, RunRecord, SequenceTrace, Span, StepRecord

START = 1.8e9  # seconds since the epoch
STEP_SECONDS = 12.0


def run_record(steps: int = 40, settings: str = "run:\n  steps: 40\n") -> RunRecord:
    return RunRecord(
        settings=settings,
        layout="world 2 = pipeline 1 x data 2 x context 1 x tensor 1",
        versions={"megatron-rl": "0.1.0", "torch": "2.11.0"},
        host="node7",
        ranks=2,
        model="qwen3_moe",
        parameters=1_234_567,
        command=("megatron-rl", "train", "recipe.yaml", "run.steps=40"),
        started=START,
        steps=steps,
    )


def spans(step: int) -> list[Span]:
    """Sampling of the next step goes on beside learning from this one."""
    begin = START + step * STEP_SECONDS
    parts = {"wait": 1.0, "score": 0.5, "old": 2.0, "update": 5.5, "publish": 1.0}
    found = [Span("sample", begin + 0.5, begin + 11.0, "rollout")]
    for name, seconds in parts.items():
        found.append(Span(name, begin, begin := begin + seconds))
    return found


def metrics(step: int, rng: np.random.Generator) -> dict[str, float]:
    rise = 1 - math.exp(-step / 15)
    noise = rng.normal(0, 0.03, 4)
    return {
        "reward/mean": 0.1 + 0.7 * rise + noise[0],
        "reward/std": 0.3 - 0.1 * rise,
        "reward/exact": 0.05 + 0.75 * rise + noise[1],
        "reward/format": 0.5 + 0.45 * rise + noise[2],
        "loss": -0.01 + noise[3] / 10,
        "grad_norm": 1.2 - 0.5 * rise + abs(noise[1]),
        "lr": 1e-6 * min(1.0, (step + 1) / 5),
        "clip_fraction": 0.12 + noise[2] / 2,
        "clip_fraction_tokens": 0.14 + noise[2] / 2,
        "ratio": 1 + noise[0] / 100,
        "ratio_deviation": 0.002,
        "entropy": 1.6 - 0.9 * rise,
        "old_k3": 1e-4 * (1 + abs(noise[0])),
        "mismatch_k1": 2e-5 + noise[1] / 1e4,
        "mismatch_k3": 3e-5 * (1 + abs(noise[1])),
        "mismatch_chi2": 6e-5 * (1 + abs(noise[2])),
        "mismatch_effective_share": 0.9999 - abs(noise[2]) / 100,
        "mismatch_max": 0.02 + abs(noise[0]),
        "response/tokens": 60 + 80 * rise,
        "response/longest": 128.0,
        "response/cut_off": 0.05,
        "advantage/zero_groups": 0.1 + 0.3 * rise,
        "rate/tokens": 2_000 + 5_000 * noise[0],
        "moe/max_over_mean": 1.8 - 0.3 * rise,
        "memory/peak": 3.2e9,
    }


@dataclass(frozen=True)
class MadeRun:
    """Tells observers of a run that follows from its numbers alone."""

    layers: int = 4
    experts: int = 16
    evaluate_every: int = 10
    seed: int = 7
    traced: Sequence[Sequence[SequenceTrace]] = ()  # of the last steps

    def tell(self, observer: Observer, first: int, stop: int, steps: int | None = None) -> None:
        """Steps first … stop − 1 of a run that begins, or goes on, with `first`."""
        observer.started(run_record(steps or stop), first)
        for step in range(first, stop):
            if step % self.evaluate_every == 0:
                self._evaluate(observer, step)
            observer.step(self.record(step, stop))
        if stop == (steps or stop):
            self._evaluate(observer, stop)
            observer.finished()

    def record(self, step: int, stop: int) -> StepRecord:
        rng = np.random.default_rng([self.seed, step])
        place = step - (stop - len(self.traced))
        tokens = rng.multinomial(4096, rng.dirichlet(np.full(self.experts, 4.0)), self.layers) if self.experts else None
        traces = self.traced[place] if place >= 0 else (small_trace(step),) if step % 2 else ()
        return StepRecord(step, metrics(step, rng), spans(step), tokens, traces)

    def _evaluate(self, observer: Observer, step: int) -> None:
        rise = 1 - math.exp(-step / 15)
        found = {"avg@4": 0.1 + 0.6 * rise, "pass@4": 0.2 + 0.7 * rise, "maj@4": 0.1 + 0.7 * rise}
        observer.evaluated(EvaluationRecord(step, "held-out", found, Path(f"evaluations/step-{step:06d}.jsonl")))


def small_trace(step: int) -> SequenceTrace:
    log_ratio = np.linspace(-0.1, 0.1, 5, dtype=np.float32)
    return SequenceTrace(0, f"prompt/{step}#0", 0.5, 1.001, step % 3 == 0, log_ratio, log_ratio * 2 if step % 5 else None)


class Ticks:
    """A clock that is the same in every run: the time of a line follows from how many were written since a step."""

    def __init__(self, start: float = START) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now


def wait_for(path: Path, seconds: float = 20.0) -> None:
    """Until a file is there."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)
