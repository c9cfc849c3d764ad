"""Training steps on one GPU: how fast, in which numbers, and do they mean the same?"""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_rl.config.checks import require_valid
from megatron_rl.config.counting import active_parameters, model_parameters
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import ObjectiveSettings, Settings
from megatron_rl.objectives.sft import SupervisedLoss
from megatron_rl.policy.policy import Policy
from megatron_rl.train import objective
from megatron_rl.train.clock import Clock, seconds_by_phase
from megatron_rl.train.experience import Rows
from megatron_rl.train.learner import Learner, LearnReport
from tools.gpu_acceptance.child import Task
from tools.gpu_acceptance.models import middle, opened, precision, sealed_step, sequences, settings_of
from tools.gpu_acceptance.results import Finding
from tools.gpu_acceptance.table import LOSSES, UPDATE

ROUNDS, SMOKE_ROUNDS = 6, 1  # timed steps, after two that are not
LOSS_STEPS, SMOKE_LOSS_STEPS = 50, 3
LOSS_SEQUENCES = 16  # of each of those steps
GIB = 2**30


def _settings(task: Task, **sections: Any) -> Settings:
    return settings_of(middle(task.smoke), task.scratch, precision=precision(task.variant), **sections)


def _learner(policy: Policy) -> Learner:
    """GRPO's: it tells of token ratios, and recomputes `old`."""
    goal, advantage = objective.build(policy.settings.objective)
    return Learner(policy, goal, advantage, policy.settings)


def _synchronized(policy: Policy) -> float:
    """The time when the device has done all that it was told."""
    if policy.layout.device.cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


# -- ratios ----------------------------------------------------------------------------------------------------------------


def ratio(task: Task) -> Iterator[Finding]:
    """`old` is scored, then learned from with the same weights: each ratio is 1. Again after the update, none is."""
    settings = _settings(task, objective=ObjectiveSettings(surrogate="grpo"), optimizer={"lr": 1e-3})
    with opened(settings, task.variant) as policy, sealed_step(middle(task.smoke), task.scratch / "bank") as rows:
        learner, counted = _learner(policy), int(rows.plan().column("loss_tokens").to_numpy().sum())
        for step in range(2):  # other weights, the same promise
            metrics = learner.learn(step, rows).metrics
            when = "at first" if step == 0 else "after an update"
            yield Finding(f"largest |ratio − 1| {when}", _furthest(metrics), "", 0.0, f"of {counted:,} tokens")
            yield Finding(f"mean |ratio − 1| {when}", metrics["ratio_deviation"], "", 0.0)
        yield Finding("mean |ratio − 1| where `old` is of other weights", _stale(policy, rows), "", None, "is not 0")


def _furthest(metrics: Any) -> float:
    return max(abs(metrics["ratio_max"] - 1.0), abs(metrics["ratio_min"] - 1.0))


def _stale(policy: Policy, rows: Rows) -> float:
    """What the same number is in the second of two updates that share their `old`: it can be other than 0."""
    settings = policy.settings.model_copy(update={"batch": policy.settings.batch.model_copy(update={"epochs": 2})})
    goal, advantage = objective.build(settings.objective)
    report = Learner(policy, goal, advantage, settings).learn(2, rows)
    value = report.updates[1].metrics["ratio_deviation"]
    if not value > 0:
        raise RuntimeError("after an update the ratio to what was before is still 1: nothing was learned, or measured")
    return value


def refused(task: Task) -> Iterator[Finding]:
    """Settings that could not keep the promise are refused, and say why."""
    settings = _settings(task)
    try:
        require_valid(settings, read_architecture(settings.policy.config), world_size=1)
    except SettingsError as error:
        yield Finding("refused by the settings", str(error).splitlines()[0])
    else:
        raise RuntimeError(f"precision.fp8_recipe={settings.precision.fp8_recipe} was not refused")


# -- throughput ------------------------------------------------------------------------------------------------------------


def update(task: Task) -> Iterator[Finding]:
    """Whole training steps of a learner: old log-probs, advantages, one update."""
    settings = _settings(task, objective=ObjectiveSettings(surrogate="gspo"))
    with opened(settings, task.variant) as policy, sealed_step(middle(task.smoke), task.scratch / "bank") as rows:
        architecture, device = policy.architecture, policy.layout.device
        yield Finding("parameters", model_parameters(architecture).total / 1e9, "billion")
        yield Finding("of these active", active_parameters(architecture) / 1e9, "billion")
        learner = _learner(policy)
        for step in range(2):
            learner.learn(step, rows)
        device.peak_memory()
        steps = [timed(learner, policy, rows, step) for step in range(2, 2 + (SMOKE_ROUNDS if task.smoke else ROUNDS))]
        report, old, seconds = steps[0][0], [each[1] for each in steps], [each[2] for each in steps]
        yield Finding("tokens of a step", float(report.tokens))
        yield Finding(UPDATE, report.tokens / statistics.median(seconds), "tokens/s", series=tuple(seconds))
        yield Finding("old log-probs", report.tokens / statistics.median(old), "tokens/s", series=tuple(old))
        yield from utilisation(report, statistics.median(seconds), device.flops)
        yield Finding("peak memory of a step", device.peak_memory() / GIB, "GiB", note="" if device.cuda else "of the process")


def timed(learner: Learner, policy: Policy, rows: Rows, step: int) -> tuple[LearnReport, float, float]:
    """A step, and its seconds for old log-probs and for the update with all that the device still had to do."""
    clock = Clock()
    _synchronized(policy)
    report = learner.learn(step, rows, clock)
    told = time.perf_counter()
    rest = _synchronized(policy) - told
    seconds = seconds_by_phase(clock.take())
    return report, seconds["seconds/old"], seconds["seconds/update"] + rest


def utilisation(report: LearnReport, seconds: float, most: float | None) -> Iterator[Finding]:
    """A backward pass is two forward passes, as `rate/mfu` counts."""
    done = 3 * report.flops / seconds
    yield Finding("products of an update", done / 1e12, "TFLOP/s")
    if most is not None:
        yield Finding("MFU of an update", done / most, f"of {most / 1e12:.0f} TFLOP/s, this GPU's stated rate in bfloat16")


# -- losses ----------------------------------------------------------------------------------------------------------------


def loss(task: Task) -> Iterator[Finding]:
    """Supervised steps on data with a pattern: the same weights, tokens and order in every format."""
    count = SMOKE_LOSS_STEPS if task.smoke else LOSS_STEPS
    with opened(_settings(task, optimizer={"lr": 3e-4, "warmup_steps": 5}), task.variant) as policy:
        losses = [step_loss(policy, task, step) for step in range(count)]
    yield Finding("loss before", losses[0], "nats a token")
    yield Finding(LOSSES, losses[-1], "nats a token", losses[0], f"{count} steps", tuple(losses))


def step_loss(policy: Policy, task: Task, step: int) -> float:
    given: Sequence[Any] = sequences(middle(task.smoke), seed=100 + step, pattern=True)[:LOSS_SEQUENCES]
    report = policy.update(policy.pack(given), SupervisedLoss())
    if not report.applied:
        raise RuntimeError(f"step {step}: the loss is {report.loss}, the norm of the gradient {report.grad_norm}")
    return report.loss
