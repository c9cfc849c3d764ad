"""A supervised toy run: the policy learns to count in steps.

It stands in for the trainer until that exists, and exercises everything below it: layout, packs, log-probs, updates,
checkpoints. A sequence says a step size and then counts by it, modulo a number; what is learned is what comes next.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import dump_settings
from megatron_rl.config.settings import Settings
from megatron_rl.objectives.sft import SupervisedLoss
from megatron_rl.policy.checkpoint import CheckpointWriter
from megatron_rl.policy.hf_export import HfExporter
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy, UpdateReport
from megatron_rl.policy.state import load_policy, save_policy
from megatron_rl.types import Sequence
from megatron_rl.weights.checkpoint_files import latest_checkpoint, step_folder

STEP_SIZES = 5
MODULUS = 31  # tokens below it are numbers, the STEP_SIZES tokens after it say the step size
BATCH = 16
HELD_OUT = 32


def counting_sequences(generator: np.random.Generator, count: int, longest: int) -> list[Sequence]:
    """[step size, first number | next numbers …]: everything after the bar is to be predicted."""
    sequences = []
    for index in range(count):
        length = int(generator.integers(8, longest + 1))
        size = int(generator.integers(STEP_SIZES))
        numbers = (generator.integers(MODULUS) + (size + 1) * np.arange(length - 1)) % MODULUS
        tokens = np.concatenate([[MODULUS + size], numbers]).astype(np.int64)
        sequences.append(Sequence(index, tokens, loss_mask=np.arange(length) >= 2))
    return sequences


def main(settings: Settings, *, resume: bool = False) -> None:
    """Train, checkpoint, and say what was learned. Every rank runs this."""
    launch = Launch.from_environment()
    console = Console(quiet=launch.rank != 0)
    checkpoints = settings.run.directory / "checkpoints"
    present = latest_checkpoint(checkpoints)
    if present and not resume:
        raise SettingsError(
            f"run.directory={settings.run.directory} already holds {present.name}. Continue with --resume, or choose another."
        )
    policy = Policy.open(settings, launch)
    if policy.architecture.vocab < MODULUS + STEP_SIZES:
        raise SettingsError(
            f"the toy run needs a vocabulary of {MODULUS + STEP_SIZES} tokens; this model has {policy.architecture.vocab}"
        )
    if policy.layout.is_main:
        settings.run.directory.mkdir(parents=True, exist_ok=True)
        (settings.run.directory / "settings.yaml").write_text(dump_settings(settings), encoding="utf-8")
    writer = CheckpointWriter(checkpoints, policy.layout, settings.checkpoint.keep_last)
    latest = policy.layout.from_main(present)
    if latest:
        load_policy(policy, latest)
        console.print(f"continuing from {latest}")
    console.print(
        f"Supervised toy run (no reinforcement learning yet): {policy.architecture.family}, {launch.world_size} ranks, "
        f"{settings.run.steps} steps. The policy learns to count in steps."
    )
    before = _held_out_loss(policy, settings)
    _train(policy, settings, writer, console)
    after = _held_out_loss(policy, settings)
    console.print(f"held-out loss {before:.3f} → {after:.3f} nats a token (guessing: {np.log(MODULUS):.3f})")
    console.print(f"settings, metrics and checkpoints are in {settings.run.directory}")
    policy.close()


def _train(policy: Policy, settings: Settings, writer: CheckpointWriter, console: Console) -> None:
    metrics_path = settings.run.directory / "metrics.jsonl"
    every, export_every = settings.checkpoint.every, settings.checkpoint.export_every
    exporter = HfExporter(policy, settings.checkpoint.export_dtype) if export_every else None
    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=settings.run.steps, completed=policy.steps, loss=float("nan"))
        for step in range(policy.steps + policy.skipped, settings.run.steps):
            report = policy.update(policy.pack(_batch(settings, step)), SupervisedLoss())
            if policy.layout.is_main:
                _append(metrics_path, report)
            progress.update(task, advance=1, loss=report.metrics["negative_log_likelihood"])
            writer.poll()
            if every and report.applied and policy.steps % every == 0:
                save_policy(writer, policy, asynchronous=settings.checkpoint.asynchronous)
            last_step = step + 1 == settings.run.steps
            if exporter and report.applied and (policy.steps % export_every == 0 or last_step):
                exporter.save(step_folder(settings.run.directory / "exports", policy.steps))
    writer.finish()
    last = latest_checkpoint(writer.root)
    if policy.layout.from_main(last is None or last.name != step_folder(writer.root, policy.steps).name):
        save_policy(writer, policy)


def _batch(settings: Settings, step: int) -> list[Sequence]:
    """The sequences of a step, a function of seed and step alone, so that a resumed run sees what it would have seen."""
    generator = np.random.default_rng([settings.run.seed, step])
    return counting_sequences(generator, BATCH, _longest(settings))


def _longest(settings: Settings) -> int:
    return min(64, settings.batch.max_sequence or settings.batch.max_tokens)


def _held_out_loss(policy: Policy, settings: Settings) -> float:
    """Mean −log p of the counting tokens of sequences that are never trained on."""
    sequences = counting_sequences(np.random.default_rng([settings.run.seed, 2**31]), HELD_OUT, _longest(settings))
    packs = policy.pack(sequences)
    arrays = policy.per_sequence(packs, [values.log_probs for values in policy.log_probs(packs)])
    shares = policy.layout.everyone_has({index: float(array.sum()) for index, array in arrays.items()})
    total = {index: value for share in shares for index, value in share.items()}
    return -sum(total.values()) / sum(sequence.loss_tokens for sequence in sequences)


def _append(path: Path, report: UpdateReport) -> None:
    line: dict[str, Any] = {
        "step": report.step,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "applied": report.applied,
        **report.metrics,
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
