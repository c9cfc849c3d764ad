"""A run from its settings: everything is opened, the loop runs, everything is closed, whatever happens."""

import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from functools import partial
from pathlib import Path

from megatron_rl.config.checks import require_valid
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import Settings
from megatron_rl.observe.observer import Observer
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.reference import Reference
from megatron_rl.policy.state import load_policy
from megatron_rl.rollout.bank.files import private_folder
from megatron_rl.rollout.keys import api_key
from megatron_rl.rollout.own_servers import own_servers, require_ranks, served_model
from megatron_rl.rollout.session import Session, open_session
from megatron_rl.train import objective
from megatron_rl.train.folder import REINFORCEMENT, begin, require_fresh, require_kind
from megatron_rl.train.held_out import HeldOut
from megatron_rl.train.learner import Learner
from megatron_rl.train.loop import Evaluations, Trainer
from megatron_rl.train.publishing import require_same_layers
from megatron_rl.train.run_state import SUPERVISED, RunState, newest, tidy
from megatron_rl.train.sampling import SamplingThread
from megatron_rl.train.steps import Replay, Rollouts, Source, require_routing
from megatron_rl.train.stopping import Stopper
from megatron_rl.train.telling import run_record
from megatron_rl.weights.checkpoint_files import CheckpointFiles

logger = logging.getLogger(__name__)


def train(settings: Settings, *, resume: bool = False, observers: Sequence[Observer] = ()) -> RunState:
    """Train until the run's steps are done, or it is told to stop. Every rank calls it; returns how far the run is.

    `observers` are told of every step, on the main rank. With `resume` the run in run.directory goes on, from its newest
    checkpoint or, killed before that, from its beginning; what the bank holds is not sampled again.
    """
    launch = Launch.from_environment()
    architecture = read_architecture(settings.policy.config)
    require_valid(settings, architecture, launch.world_size)
    goal, advantage = objective.build(settings.objective)
    if not resume and launch.rank == 0:
        require_fresh(settings)
    if launch.rank == 0:
        require_kind(settings, REINFORCEMENT)
        private_folder(settings.run.directory)
        require_routing(settings)
        if settings.bank.replay is None:
            require_same_layers(settings, architecture, served_model(settings))
    checkpoint = newest(settings) if resume else None
    state = _state_of(checkpoint)
    samples = launch.rank == 0 and settings.bank.replay is None and not state.over(settings)
    colocated = settings.servers.colocated
    if samples and colocated:
        require_ranks(own_servers(settings), launch.local_world_size)
    with Stopper(settings.checkpoint.grace_seconds) as stopper, ExitStack() as stack:
        thread = _sampling(settings, state, stack) if samples and not colocated else None
        policy = Policy.open(settings, launch)
        stack.callback(policy.close)
        checkpoint, state = policy.layout.from_main((checkpoint, state))
        reference = Reference(policy) if settings.objective.reference == "initial" else None
        if checkpoint is not None:
            load_policy(policy, checkpoint)
        if state.over(settings):
            if policy.layout.is_main:
                tidy(settings)  # it may have been killed in its last moment
            return state
        if samples and colocated:  # servers take of the GPUs what the policy has left them
            thread = _sampling(settings, state, stack)
        opened = _source(settings, policy, stopper, thread)
        if opened is None:
            return state
        stopper.learns = True
        learner = Learner(policy, goal, advantage, settings, reference)
        learner.initial_entropy = state.initial_entropy
        told = tuple(observers) if policy.layout.is_main else ()
        if policy.layout.is_main:
            tidy(settings)
            begin(settings, REINFORCEMENT)
        record = run_record(settings, policy)
        for observer in told:
            observer.started(record, state.step)
        saved = state.step if checkpoint is not None else None
        trainer = Trainer(settings, policy, *opened, learner, told, stopper, state, saved)
        state = trainer.run()
        for observer in told if state.over(settings) else ():
            observer.finished()
    return state


def _state_of(checkpoint: Path | None) -> RunState:
    if checkpoint is None:
        return RunState()
    found = CheckpointFiles(checkpoint).manifest.get("run", {})
    if found == SUPERVISED:
        raise SettingsError(
            f"{checkpoint} is of supervised fine-tuning. Go on with that by `megatron-rl sft CONFIG --resume`, or begin a run "
            "of reinforcement learning with its exports/final as policy.init and a run.directory of its own."
        )
    return RunState.from_json(found)


def _source(
    settings: Settings, policy: Policy, stopper: Stopper, thread: SamplingThread | None
) -> tuple[Source, Evaluations | None] | None:
    """Where steps come from, and who evaluates; None when the run is told to stop before servers are up."""
    if settings.bank.replay is not None:
        return Replay(policy, settings.bank.replay), None  # without servers there is nobody to ask
    rollouts = Rollouts(settings, policy, stopper, thread)
    if not rollouts.open():
        return None
    return rollouts, HeldOut(settings, policy, rollouts) if settings.evaluation.every else None


def _sampling(settings: Settings, state: RunState, stack: ExitStack) -> SamplingThread:
    """Begun on the main rank; what it starts ends with the run."""
    thread = SamplingThread(lambda: _session(settings, state))
    stack.callback(thread.close)
    return thread


def _session(settings: Settings, state: RunState) -> AbstractAsyncContextManager[Session]:
    """Of the main rank, where a run at this state goes on."""
    return open_session(
        settings,
        read_architecture(settings.policy.config),
        own_servers(settings),
        api_key=partial(api_key, settings),
        version=state.step,
        step=state.step,
        position=state.position,
        last=settings.run.steps - 1,
    )
