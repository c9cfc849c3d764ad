"""What a run tells its observers, put together."""

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from rich.console import Console

from megatron_rl import __version__
from megatron_rl.config.counting import model_parameters
from megatron_rl.config.load import dump_settings
from megatron_rl.config.settings import Settings
from megatron_rl.config.show import render_layout
from megatron_rl.data.packing import CostModel
from megatron_rl.observe.records import RunRecord, Span, StepRecord
from megatron_rl.policy.policy import Policy, UpdateReport
from megatron_rl.policy.schedule import learning_rate
from megatron_rl.train.clock import seconds_by_phase
from megatron_rl.train.learner import LearnReport
from megatron_rl.train.steps import Arrived
from megatron_rl.types import Sequence as TokenSequence

PACKAGES = ("megatron-core", "torch", "sglang", "transformer-engine", "apex", "transformers")
WIDTH = 120  # columns of the layout's table


def run_record(settings: Settings, policy: Policy) -> RunRecord:
    """What runs."""
    console = Console(width=WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(render_layout(settings, policy.architecture, policy.layout.world_size))
    return RunRecord(
        settings=dump_settings(settings),
        layout=capture.get(),
        versions={"megatron-rl": __version__, **_versions()},
        host=socket.gethostname(),
        ranks=policy.layout.world_size,
        model=policy.architecture.family,
        parameters=model_parameters(policy.architecture).total,
        command=tuple(sys.argv),
        started=time.time(),
        steps=settings.run.steps,
    )


def step_record(
    policy: Policy, arrived: Arrived, report: LearnReport, published: Mapping[str, float], spans: Sequence[Span]
) -> StepRecord:
    """A step of reinforcement learning that is done. Every rank calls it."""
    seconds = seconds_by_phase(spans)
    epochs = policy.settings.batch.epochs
    rates = {**_rates(report, seconds), **_utilisation(policy, epochs * report.flops, seconds)}
    metrics = {**report.metrics, **arrived.metrics, **published, **rates, **_always(policy, seconds)}
    if report.look is None:
        return StepRecord(arrived.step, metrics, spans)
    return StepRecord(arrived.step, metrics, spans, report.look.expert_tokens, report.look.traces)


def supervised_record(
    policy: Policy, sequences: Sequence[TokenSequence], report: UpdateReport, spans: Sequence[Span]
) -> StepRecord:
    """A step of supervised fine-tuning that is done. Every rank calls it."""
    seconds = seconds_by_phase(spans)
    lengths = np.array([sequence.length for sequence in sequences], dtype=np.int64)
    metrics = {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "skipped_updates": float(not report.applied),
        "learned_tokens": float(sum(sequence.loss_tokens for sequence in sequences)),
        **report.metrics,
        "rate/tokens": float(lengths.sum() / sum(seconds.values())),
        **_utilisation(policy, float(CostModel.of(policy.architecture).cost(lengths).sum()), seconds),
        **_always(policy, seconds),
    }
    return StepRecord(policy.steps + policy.skipped - 1, metrics, spans)


def _always(policy: Policy, seconds: Mapping[str, float]) -> dict[str, float]:
    """What is told of a step of any kind."""
    step = policy.steps + policy.skipped - 1
    return {
        "lr": learning_rate(policy.settings.optimizer, max(step, 0), policy.settings.optimizer_steps),
        **seconds,
        "memory/peak": float(max(policy.layout.everyone_has(policy.layout.device.peak_memory()))),
    }


def _rates(report: LearnReport, seconds: Mapping[str, float]) -> dict[str, float]:
    """Tokens a second by phase; of the step as a whole, by the seconds of the trainer's own phases."""
    own = sum(taken for name, taken in seconds.items() if name != "seconds/sample")
    counted = {
        "rate/tokens": (report.tokens, own),
        "rate/sample": (report.written, seconds.get("seconds/sample", 0.0)),
        "rate/old": (report.tokens, seconds.get("seconds/old", 0.0)),
        "rate/update": (report.tokens, seconds.get("seconds/update", 0.0)),
    }
    return {name: tokens / taken for name, (tokens, taken) in counted.items() if taken > 0}


def _utilisation(policy: Policy, flops: float, seconds: Mapping[str, float]) -> dict[str, float]:
    """MFU of updates whose forward passes take so many FLOPs. A backward pass is two more; what is computed anew to save memory
    does not count."""
    most, taken = policy.layout.device.flops, seconds.get("seconds/update", 0.0)
    if most is None or taken <= 0:
        return {}
    return {"rate/mfu": 3 * flops / (taken * most * policy.layout.world_size)}


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3])), "system": os.uname().sysname + " " + os.uname().release}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
