"""Supervised fine-tuning: the policy learns given responses to prompts. What reinforcement learning starts from.

One rank reads the data and deals each step's sequences to all. What a step learns from follows from the settings and the
step's number alone, so a run that was killed goes on as if it had not been.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn

from megatron_rl.config.checks import require_valid
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import Settings
from megatron_rl.data.demonstrations import Demonstrations, Demonstrator, held_out_sequences
from megatron_rl.data.prompts import open_prompts, open_tokenizer
from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.objectives.sft import SupervisedLoss
from megatron_rl.policy.checkpoint import CheckpointWriter, on_main
from megatron_rl.policy.hf_export import HfExporter
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy, UpdateReport
from megatron_rl.policy.state import load_policy, save_policy
from megatron_rl.train.folder import begin
from megatron_rl.types import Sequence
from megatron_rl.weights.checkpoint_files import latest_checkpoint, step_folder

LAST_EXPORT = "final"  # the name of the export at the end, below run.directory/exports


@dataclass(frozen=True)
class Lessons:
    """What is learned, and what it is measured on. The main rank alone has them."""

    demonstrations: Demonstrations
    held_out: list[Sequence]
    tokenizer: Tokenizer


def open_lessons(settings: Settings, console: Console) -> Lessons:
    """Read the data and look at every row that the run will see; a UserError says what is wrong with it."""
    tokenizer = open_tokenizer(settings, vocab=read_architecture(settings.policy.config).vocab)
    longest = settings.batch.max_sequence or settings.batch.max_tokens
    demonstrator = Demonstrator(tokenizer, settings.supervised.response, longest)
    prompts = open_prompts(settings, tokenizer)
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        task = progress.add_task("looking at the data", total=None)
        demonstrations = Demonstrations(
            prompts,
            demonstrator,
            batch=settings.supervised.batch,
            steps=settings.run.steps,
            strict=settings.data.too_long == "error",
            advance=lambda done, total: progress.update(task, completed=done, total=total),
        )
    held_out = []
    if settings.data.validation_share or settings.data.validation_sources:
        validation = open_prompts(settings, tokenizer, "validation")
        held_out = held_out_sequences(validation, demonstrator, settings.supervised.held_out)
    console.print(f"{len(prompts):,} rows to learn from, {len(held_out):,} held out")
    if demonstrations.passed_over:
        key, reason = next(iter(demonstrations.passed_over.items()))
        console.print(f"warning: {len(demonstrations.passed_over):,} rows are passed over; {key}, for one: {reason}")
    return Lessons(demonstrations, held_out, tokenizer)


def main(settings: Settings, *, resume: bool = False) -> None:
    """Train, measure, save. Every rank runs this."""
    launch = Launch.from_environment()
    console = Console(quiet=launch.rank != 0, highlight=False)
    require_valid(settings, read_architecture(settings.policy.config), launch.world_size)
    checkpoints = settings.run.directory / "checkpoints"
    present = latest_checkpoint(checkpoints)
    if present and not resume:
        raise SettingsError(
            f"run.directory={settings.run.directory} already holds {present.name}. Continue with --resume, or choose another."
        )
    lessons = open_lessons(settings, console) if launch.rank == 0 else None
    with _opened(settings, launch) as policy:
        latest = policy.layout.from_main(present)
        if latest:
            load_policy(policy, latest)
            console.print(f"continuing from {latest}")
        metrics = Metrics(settings.run.directory / "metrics.jsonl", policy.layout.is_main)
        on_main(policy.layout, lambda: _begin(settings, metrics, policy.steps + policy.skipped), "the run cannot be written")
        console.print(
            f"supervised fine-tuning of a {policy.architecture.family} on {launch.world_size} ranks, "
            f"{settings.run.steps} steps of {settings.supervised.batch} sequences"
        )
        Course(settings, policy, lessons, metrics, console).run()


@contextmanager
def _opened(settings: Settings, launch: Launch) -> Iterator[Policy]:
    policy = Policy.open(settings, launch)
    yield policy
    policy.close()  # only where all went well: ranks that failed would wait for each other


def _begin(settings: Settings, metrics: "Metrics", step: int) -> None:
    """The run's folder, its settings, and its metrics up to here: what followed a lost checkpoint never was."""
    begin(settings)
    metrics.keep_until(step)


class Course:
    """A run from the step that the policy stands at to the last."""

    def __init__(
        self, settings: Settings, policy: Policy, lessons: Lessons | None, metrics: "Metrics", console: Console
    ) -> None:
        self.settings, self.policy, self.lessons = settings, policy, lessons
        self.metrics, self.console = metrics, console
        self.writer = CheckpointWriter(settings.run.directory / "checkpoints", policy.layout, settings.checkpoint.keep_last)
        self.exporter = HfExporter(policy, settings.checkpoint.export_dtype)
        self.exports = settings.run.directory / "exports"

    @property
    def done(self) -> int:
        """Steps behind us, those included that were skipped for a gradient that is not finite."""
        return self.policy.steps + self.policy.skipped

    def run(self) -> None:
        before = self._measure()
        self._train()
        self.writer.finish()
        last = latest_checkpoint(self.writer.root)
        if self.policy.layout.from_main(last is None or last.name != step_folder(self.writer.root, self.policy.steps).name):
            save_policy(self.writer, self.policy)
        after = self._measure()
        exported = self._export(self.exports / LAST_EXPORT)
        if before is not None and after is not None:
            self.console.print(f"held-out loss {before:.3f} → {after:.3f} nats a token")
        self.console.print(f"settings, metrics and checkpoints are in {self.settings.run.directory}")
        self.console.print(f"the model is {exported}: start from it with policy.init={exported}")

    def _train(self) -> None:
        checkpoint = self.settings.checkpoint
        columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}"))
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("learning", total=self.settings.run.steps, completed=self.done, loss=float("nan"))
            while self.done < self.settings.run.steps:
                report = self._step()
                progress.update(task, advance=1, loss=report.metrics["negative_log_likelihood"])
                self.writer.poll()
                if checkpoint.every and report.applied and self.policy.steps % checkpoint.every == 0:
                    save_policy(self.writer, self.policy, asynchronous=checkpoint.asynchronous)
                if checkpoint.export_every and report.applied and self.policy.steps % checkpoint.export_every == 0:
                    self._export(step_folder(self.exports, self.policy.steps))

    def _step(self) -> UpdateReport:
        sequences = self.policy.layout.from_main(self.lessons.demonstrations.step(self.done) if self.lessons else None)
        report = self.policy.update(self.policy.pack(sequences), SupervisedLoss())
        self.metrics.append(
            {
                "step": self.done,
                "loss": report.loss,
                "grad_norm": report.grad_norm,
                "applied": report.applied,
                "tokens": sum(sequence.loss_tokens for sequence in sequences),
                **report.metrics,
            }
        )
        return report

    def _measure(self) -> float | None:
        """Mean −log p of the held-out responses' tokens, if there are any."""
        sequences: list[Sequence] = self.policy.layout.from_main(self.lessons.held_out if self.lessons else None)
        if not sequences:
            return None
        packs = self.policy.pack(sequences)
        arrays = self.policy.per_sequence(packs, [values.log_probs for values in self.policy.log_probs(packs)])
        shares = self.policy.layout.everyone_has({index: float(array.sum()) for index, array in arrays.items()})
        total = {index: value for share in shares for index, value in share.items()}
        loss = -sum(total.values()) / sum(sequence.loss_tokens for sequence in sequences)
        self.metrics.append({"step": self.done, "held_out_loss": loss})
        return loss

    def _export(self, folder: Path) -> Path:
        """The model with the tokenizer and template that it was taught with."""
        self.exporter.save(folder)
        data = self.settings.data
        if self.lessons is not None and (data.tokenizer is not None or data.chat_template is not None):
            self.lessons.tokenizer.save(folder)
        return folder


class Metrics:
    """A line of JSON a step, written by the main rank."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self._writes = path, writes

    def append(self, line: dict[str, Any]) -> None:
        if self._writes:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def keep_until(self, step: int) -> None:
        """Forget what was written of later steps, and a line that a crash cut short."""
        if not self.path.exists():
            return
        kept = []
        for text in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not text.endswith("\n") or json.loads(text)["step"] > step:
                break
            kept.append(text)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.path)
