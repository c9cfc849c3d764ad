"""What a run tells its observers, put together."""

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console

from megatron_rl import __version__
from megatron_rl.config.counting import model_parameters
from megatron_rl.config.load import dump_settings
from megatron_rl.config.settings import Settings
from megatron_rl.config.show import render_layout
from megatron_rl.observe.records import RunRecord, Span, StepRecord
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.schedule import learning_rate
from megatron_rl.train.clock import seconds_by_phase
from megatron_rl.train.learner import LearnReport
from megatron_rl.train.steps import Arrived

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
    """A step that is done. Every rank calls it."""
    seconds = seconds_by_phase(spans)
    step = policy.steps + policy.skipped - 1
    metrics = {
        **report.metrics,
        "lr": learning_rate(policy.settings.optimizer, max(step, 0), policy.settings.optimizer_steps),
        **arrived.metrics,
        **published,
        **_rates(report, seconds),
        **_utilisation(policy, report, seconds),
        **seconds,
        "memory/peak": float(max(policy.layout.everyone_has(policy.layout.device.peak_memory()))),
    }
    if report.look is None:
        return StepRecord(arrived.step, metrics, spans)
    return StepRecord(arrived.step, metrics, spans, report.look.expert_tokens, report.look.traces)


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


def _utilisation(policy: Policy, report: LearnReport, seconds: Mapping[str, float]) -> dict[str, float]:
    """MFU of the updates. A backward pass is two forward passes; what is computed anew to save memory does not count."""
    most, taken = policy.layout.device.flops, seconds.get("seconds/update", 0.0)
    if most is None or taken <= 0:
        return {}
    return {"rate/mfu": 3 * policy.settings.batch.epochs * report.flops / (taken * most * policy.layout.world_size)}


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3])), "system": os.uname().sysname + " " + os.uname().release}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
