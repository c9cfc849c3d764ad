"""The main loop: prompts to groups of responses, groups to updates, new weights to the servers, again and again.

    for each step:  collect → learn → publish → evaluate → tell → save

Servers that share our GPUs sleep from collect to publish, which wakes them: they are awake whenever they are asked anything.

Every rank runs it. Servers sample for the main rank, in a thread beside it (`sampling`); what is sampled goes through the
bank on disk, from which every rank reads its own rows. Killed at any moment, a run goes on from its last checkpoint: steps
that the bank holds already are learned from again, bit for bit, and only what is missing is sampled.
"""

from collections.abc import Sequence
from dataclasses import replace
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
from megatron_rl.train.run_state import CHECKPOINTS, EXPORTS, RunState
from megatron_rl.train.steps import Arrived, Source
from megatron_rl.train.stopping import Stopper
from megatron_rl.train.telling import step_record
from megatron_rl.weights.checkpoint_files import step_folder


class Evaluations(Protocol):
    """Held-out prompts, asked now and then."""

    def due(self, step: int) -> bool: ...

    def run(self, step: int) -> Sequence[EvaluationRecord]: ...


class Trainer:
    """A run, opened. `state` says how far it is."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        source: Source,
        evaluations: Evaluations | None,
        learner: Learner,
        observers: Sequence[Observer],
        stopper: Stopper,
        state: RunState,
        saved: int | None = None,
    ) -> None:
        """`observers` on the main rank, none on the others. `saved` is the step of the checkpoint that the run goes on from."""
        self.settings, self.policy, self.source, self.learner = settings, policy, source, learner
        self.evaluations, self.observers, self.stopper, self.state = evaluations, observers, stopper, state
        self._saved, self._clock, own = saved, Clock(), settings.checkpoint
        self._writer = CheckpointWriter(settings.run.directory / CHECKPOINTS, policy.layout, own.keep_last)
        self._exporter = HfExporter(policy, own.export_dtype) if own.export_every else None

    def run(self) -> RunState:
        """Until all steps are done, or the run is told to stop; either way everything is saved."""
        due = self.evaluations is not None and self.state.owes_evaluation(self.settings)
        if due or not self.source.has(self.state.step):
            self._publish()
        if due:
            self._evaluate()
        while self.state.step < self.settings.run.steps:
            arrived = self._collect()
            if arrived is None:
                break
            if self.settings.servers.colocated:
                self._let_sleep()
            self._take(arrived)
            if self.policy.layout.agree(self.stopper.asked):
                break
        self._save(last=True)
        return self.state

    def _take(self, arrived: Arrived) -> None:
        """One step: learn from what arrived, and hand the new weights on."""
        with self.source.rows(arrived.step) as rows:
            report = self.learner.learn(arrived.step, rows, self._clock, traces=self._traces(arrived.step))
        self._clock.add(*arrived.spans)
        self.state = self.state.after(arrived.position, self.learner.initial_entropy)
        due = self.evaluations is not None and self.evaluations.due(self.state.step)
        published = {} if self._idle and not due else self._publish()
        if due:
            self._evaluate()
        record = step_record(self.policy, arrived, report, published, self._clock.take())
        for observer in self.observers:
            observer.step(record)
        self._save()  # last: what a checkpoint has behind it has been told, and what it has not will be told anew

    # -- parts of a step -----------------------------------------------------------------------------------------------

    def _collect(self) -> Arrived | None:
        with self._clock.phase("wait"):
            return self.source.collect(self.state.step)

    def _let_sleep(self) -> None:
        """The servers' turn with the GPUs is over."""
        with self._clock.phase("sleep"):
            self.source.sleep()

    def _traces(self, step: int) -> int | None:
        """Groups to be traced after this step; None when it is not looked at."""
        observe = self.settings.observe
        return observe.traces if observe.look_every and step % observe.look_every == 0 else None

    @property
    def _idle(self) -> bool:
        """Do the servers have nothing to do with the present weights? The run ends, or the bank has the next step."""
        return self.state.step >= self.settings.run.steps or self.source.has(self.state.step)

    def _publish(self) -> dict[str, float]:
        with self._clock.phase("publish"):
            numbers = self.source.publish(self.state.step)
        if not self._idle:
            self.source.go_on(self.state.step)
        return numbers

    def _evaluate(self) -> None:
        if self.evaluations is not None:
            with self._clock.phase("evaluate"):
                records = self.evaluations.run(self.state.step)
            if records:  # none when it is told to stop meanwhile
                self.state = replace(self.state, evaluated=self.state.step)
                self._saved = None  # a checkpoint that a resumed run begins with does not know of it
            for record in records:
                for observer in self.observers:
                    observer.evaluated(record)

    def _save(self, *, last: bool = False) -> None:
        """An export and a checkpoint, where they are due."""
        step, settings = self.state.step, self.settings.checkpoint
        self._writer.poll()
        if self._exporter and step and (step % settings.export_every == 0 or step == self.settings.run.steps):
            folder = step_folder(self.settings.run.directory / EXPORTS, step)
            if not self.policy.layout.from_main(folder.exists()):  # before the checkpoint: a run goes on behind that
                with self._clock.phase("export"):
                    self._exporter.save(folder)
        if step != self._saved and step and (last or (settings.every and step % settings.every == 0)):
            with self._clock.phase("checkpoint"):
                asynchronous = settings.asynchronous and not last
                save_policy(self._writer, self.policy, asynchronous=asynchronous, step=step, run=self.state.to_json())
            self._saved = step
        if last:
            self._writer.finish()
