"""The main loop: prompts to groups of responses, groups to updates, new weights to the servers, again and again.

    for each step:  collect → learn → publish → save → evaluate → tell

Every rank runs it. Servers sample for the main rank, in a thread beside it (`sampling`); what is sampled goes through the
bank on disk, from which every rank reads its own rows. Killed at any moment, a run goes on from its last checkpoint: steps
that the bank holds already are learned from again, bit for bit, and only what is missing is sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rl.config.settings import Settings
from megatron_rl.observe.observer import Observer
from megatron_rl.observe.records import EvaluationRecord
from megatron_rl.policy.checkpoint import CheckpointWriter
from megatron_rl.policy.hf_export import HfExporter
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.state import save_policy
from megatron_rl.train.clock import Clock
from megatron_rl.train.learner import Learner
from megatron_rl.train.run_state import RunState
from megatron_rl.train.steps import Arrived, Source
from megatron_rl.train.stopping import Stopper
from megatron_rl.train.telling import step_record
from megatron_rl.weights.checkpoint_files import step_folder


class Evaluations(Protocol):
    """Held-out prompts, asked now and then."""

    def due(self, step: int) -> bool: ...

    def run(self, step: int) -> Sequence[EvaluationRecord]: ...


@dataclass
class Trainer:
    """A run, opened. `state` says how far it is."""

    settings: Settings
    policy: Policy
    source: Source
    learner: Learner
    writer: CheckpointWriter
    exporter: HfExporter | None
    evaluations: Evaluations | None
    observers: Sequence[Observer]  # on the main rank; none on the others
    stopper: Stopper
    clock: Clock
    state: RunState
    saved: int | None = None  # the step of the newest checkpoint

    def run(self) -> RunState:
        """Until all steps are done, or the run is told to stop; either way everything is saved."""
        if not self.source.has(self.state.step):
            self._publish()
        if self.state.step == 0:
            self._evaluate()
        while self.state.step < self.settings.run.steps:
            arrived = self._collect()
            if arrived is None:
                break
            self._take(arrived)
            if self.policy.layout.agree(self.stopper.asked):
                break
        self._save(last=True)
        return self.state

    def _take(self, arrived: Arrived) -> None:
        """One step: learn from what arrived, and hand the new weights on."""
        with self.source.rows(arrived.step) as rows:
            report = self.learner.learn(arrived.step, rows, self.clock)
        self.clock.add(*arrived.spans)
        self.state = self.state.after(arrived.position, self.learner.initial_entropy)
        due = self.evaluations is not None and self.evaluations.due(self.state.step)
        published = {} if self._idle and not due else self._publish()
        self._save()
        if due:
            self._evaluate()
        record = step_record(self.policy, arrived, report, published, self.clock.take())
        for observer in self.observers:
            observer.step(record)

    # -- parts of a step -----------------------------------------------------------------------------------------------

    def _collect(self) -> Arrived | None:
        with self.clock.phase("wait"):
            return self.source.collect(self.state.step)

    @property
    def _idle(self) -> bool:
        """Do the servers have nothing to do with the present weights? The run ends, or the bank has the next step."""
        return self.state.step >= self.settings.run.steps or self.source.has(self.state.step)

    def _publish(self) -> dict[str, float]:
        with self.clock.phase("publish"):
            numbers = self.source.publish(self.state.step)
        if not self._idle:
            self.source.go_on(self.state.step)
        return numbers

    def _evaluate(self) -> None:
        if self.evaluations is not None:
            with self.clock.phase("evaluate"):
                records = self.evaluations.run(self.state.step)
            for record in records:
                for observer in self.observers:
                    observer.evaluated(record)

    def _save(self, *, last: bool = False) -> None:
        """A checkpoint and an export, where they are due."""
        step, settings = self.state.step, self.settings.checkpoint
        self.writer.poll()
        if step != self.saved and step and (last or (settings.every and step % settings.every == 0)):
            with self.clock.phase("checkpoint"):
                asynchronous = settings.asynchronous and not last
                save_policy(self.writer, self.policy, asynchronous=asynchronous, step=step, run=self.state.to_json())
            self.saved = step
        if self.exporter and step and (step % settings.export_every == 0 or step == self.settings.run.steps):
            folder = step_folder(self.settings.run.directory / "exports", step)
            if not self.policy.layout.from_main(folder.exists()):
                with self.clock.phase("export"):
                    self.exporter.save(folder)
        if last:
            self.writer.finish()
