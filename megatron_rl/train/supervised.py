"""Supervised fine-tuning: the policy learns given responses to prompts. What reinforcement learning starts from.

One rank reads the data and deals each step's sequences to all. What a step learns from follows from the settings and the
step's number alone, so a run that was killed goes on as if it had not been.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megatron_rl.config.checks import require_valid
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import Settings
from megatron_rl.data.demonstrations import Demonstrations, Demonstrator, held_out_sequences
from megatron_rl.data.prompts import open_prompts, open_tokenizer
from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.objectives.sft import SupervisedLoss
from megatron_rl.observe.observer import Observer
from megatron_rl.observe.records import EvaluationRecord
from megatron_rl.policy.checkpoint import CheckpointWriter, on_main
from megatron_rl.policy.hf_export import HfExporter
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.state import load_policy, save_policy
from megatron_rl.train.clock import Clock
from megatron_rl.train.folder import SUPERVISED_RUN, begin, require_kind
from megatron_rl.train.run_state import SUPERVISED, tidy
from megatron_rl.train.stopping import Stopper
from megatron_rl.train.telling import run_record, supervised_record
from megatron_rl.types import Sequence as TokenSequence
from megatron_rl.weights.checkpoint_files import latest_checkpoint, step_folder

LAST_EXPORT = "final"  # the name of the export at the end, below run.directory/exports
HELD_OUT = "held_out"  # the name of what is measured on rows that are not learned from


@dataclass(frozen=True)
class Lessons:
    """What is learned, and what it is measured on. The main rank alone has them."""

    demonstrations: Demonstrations
    held_out: list[TokenSequence]
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


def main(
    settings: Settings, *, resume: bool = False, observers: Sequence[Observer] = (), console: Console | None = None
) -> bool:
    """Train, measure, save. Every rank runs this, and `observers` are told on the main one. False when it was told to stop."""
    launch = Launch.from_environment()
    console = console or Console(quiet=launch.rank != 0, highlight=False)
    require_valid(settings, read_architecture(settings.policy.config), launch.world_size)
    checkpoints = settings.run.directory / "checkpoints"
    present = latest_checkpoint(checkpoints)
    if present and not resume:
        raise SettingsError(
            f"run.directory={settings.run.directory} already holds {present.name}. Continue with --resume, or choose another."
        )
    if launch.rank == 0:
        require_kind(settings, SUPERVISED_RUN)
    lessons = open_lessons(settings, console) if launch.rank == 0 else None
    with _opened(settings, launch) as policy, Stopper(settings.checkpoint.grace_seconds) as stopper:
        latest = policy.layout.from_main(present)
        if latest:
            load_policy(policy, latest)
            console.print(f"continuing from {latest}")
        record, told = run_record(settings, policy), tuple(observers) if policy.layout.is_main else ()
        done = policy.steps + policy.skipped

        def start() -> None:
            if policy.layout.is_main:
                tidy(settings)
                begin(settings, SUPERVISED_RUN)
            for observer in told:
                observer.started(record, done)

        on_main(policy.layout, start, "the run cannot be written")
        stopper.learns = True
        console.print(f"supervised fine-tuning, {settings.run.steps} steps of {settings.supervised.batch} sequences")
        return Course(settings, policy, lessons, told, stopper, console).run()


@contextmanager
def _opened(settings: Settings, launch: Launch) -> Iterator[Policy]:
    policy = Policy.open(settings, launch)
    yield policy
    policy.close()  # only where all went well: ranks that failed would wait for each other


class Course:
    """A run from the step that the policy stands at to the last."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        lessons: Lessons | None,
        observers: Sequence[Observer],
        stopper: Stopper,
        console: Console,
    ) -> None:
        """`lessons` and `observers` on the main rank alone."""
        self.settings, self.policy, self.lessons = settings, policy, lessons
        self.observers, self.stopper, self.console = observers, stopper, console
        self.writer = CheckpointWriter(settings.run.directory / "checkpoints", policy.layout, settings.checkpoint.keep_last)
        self.exporter = HfExporter(policy, settings.checkpoint.export_dtype)
        self.exports = settings.run.directory / "exports"
        self._clock = Clock()

    @property
    def done(self) -> int:
        """Steps behind us, those included that were skipped for a gradient that is not finite."""
        return self.policy.steps + self.policy.skipped

    def run(self) -> bool:
        before = self._measure() if self.done == 0 else None
        finished = self._train()
        self.writer.finish()
        last = latest_checkpoint(self.writer.root)
        if self.policy.layout.from_main(last is None or last.name != step_folder(self.writer.root, self.policy.steps).name):
            save_policy(self.writer, self.policy, run=SUPERVISED)
        if not finished:
            how = f"stopped after step {self.done} of {self.settings.run.steps}, saved"
            self.console.print(f"{how}; go on with the same command and --resume")
            return False
        after = self._measure()
        exported = self._export(self.exports / LAST_EXPORT)
        for observer in self.observers:
            observer.finished()
        if before is not None and after is not None:
            self.console.print(f"held-out loss {before:.3f} → {after:.3f} nats a token")
        folder = self.settings.run.directory
        self.console.print(f"settings, metrics and checkpoints are in {folder} (look with megatron-rl report {folder})")
        self.console.print(f"the model is {exported}: start from it with policy.init={exported}")
        return True

    def _train(self) -> bool:
        """To the last step, or until the run is told to stop."""
        checkpoint = self.settings.checkpoint
        while self.done < self.settings.run.steps:
            if self.policy.layout.agree(self.stopper.asked):
                return False
            applied = self._step()
            self.writer.poll()
            if checkpoint.every and applied and self.policy.steps % checkpoint.every == 0:
                with self._clock.phase("checkpoint"):
                    save_policy(self.writer, self.policy, asynchronous=checkpoint.asynchronous, run=SUPERVISED)
            if checkpoint.export_every and applied and self.policy.steps % checkpoint.export_every == 0:
                with self._clock.phase("export"):
                    self._export(step_folder(self.exports, self.policy.steps))
        return True

    def _step(self) -> bool:
        """One optimizer step; was it applied?"""
        with self._clock.phase("data"):
            sequences = self.policy.layout.from_main(self.lessons.demonstrations.step(self.done) if self.lessons else None)
        with self._clock.phase("update"):
            report = self.policy.update(self.policy.pack(sequences), SupervisedLoss())
        record = supervised_record(self.policy, sequences, report, self._clock.take())
        for observer in self.observers:
            observer.step(record)
        return report.applied

    def _measure(self) -> float | None:
        """Mean −log p of the held-out responses' tokens, if there are any."""
        sequences: list[TokenSequence] = self.policy.layout.from_main(self.lessons.held_out if self.lessons else None)
        if not sequences:
            return None
        with self._clock.phase("evaluate"):
            packs = self.policy.pack(sequences)
            arrays = self.policy.per_sequence(packs, [values.log_probs for values in self.policy.log_probs(packs)])
            shares = self.policy.layout.everyone_has({index: float(array.sum()) for index, array in arrays.items()})
        total = {index: value for share in shares for index, value in share.items()}
        loss = -sum(total.values()) / sum(sequence.loss_tokens for sequence in sequences)
        for observer in self.observers:
            observer.evaluated(EvaluationRecord(self.done, HELD_OUT, {"negative_log_likelihood": loss}))
        return loss

    def _export(self, folder: Path) -> Path:
        """The model with the tokenizer and template that it was taught with."""
        self.exporter.save(folder)
        data = self.settings.data
        if self.lessons is not None and (data.tokenizer is not None or data.chat_template is not None):
            self.lessons.tokenizer.save(folder)
        return folder
