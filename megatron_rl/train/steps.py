"""Where training steps come from: servers that sample them, or a bank that holds them already.

Every rank has a source and calls it alike. Of servers only the main rank knows: it samples, the others wait for its word.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_rl.config.errors import SettingsError, UserError
from megatron_rl.config.settings import Settings
from megatron_rl.observe.records import Span
from megatron_rl.policy.policy import Policy
from megatron_rl.rollout.bank.folder import Folder
from megatron_rl.rollout.bank.sealed import SealedStep
from megatron_rl.rollout.bank.writer import open_step
from megatron_rl.rollout.client import Client
from megatron_rl.rollout.collector import BEGINNING, Collected, Position
from megatron_rl.rollout.health import Outdated
from megatron_rl.rollout.keys import api_key
from megatron_rl.rollout.own_servers import served_model
from megatron_rl.rollout.session import Session
from megatron_rl.train.experience import Experience
from megatron_rl.train.publishing import open_publisher, publish_to_pool
from megatron_rl.train.sampling import SamplingThread
from megatron_rl.train.stopping import Stopper

TICK = 1.0  # seconds between the main rank's words to ranks that wait


class SamplingFailed(UserError, RuntimeError):
    """Sampling cannot go on. What is finished is in the bank, and the run can be resumed."""


@dataclass(frozen=True)
class Arrived:
    """A sealed step, and what it took."""

    step: int
    position: Position = BEGINNING  # of drawing, behind this step
    metrics: dict[str, float] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()


class Source(Protocol):
    """Sealed steps, one after the other."""

    def collect(self, step: int) -> Arrived | None:
        """Wait until the step is sealed; None when the run is told to stop meanwhile."""
        ...

    def rows(self, step: int) -> SealedStep: ...

    def has(self, step: int) -> bool:
        """Is the step sealed already, so that no server is needed for it?"""
        ...

    def sleep(self) -> None:
        """Servers that share the policy's GPUs give their memory back, until weights are published to them."""
        ...

    def publish(self, version: int) -> dict[str, float]:
        """Bring the policy's weights to whoever samples."""
        ...

    def go_on(self, version: int) -> None:
        """New weights are out: sampling may begin what it waited with."""
        ...


class Replay:
    """Steps of a bank that was filled before. No server is needed, and none is started."""

    def __init__(self, policy: Policy, bank: Path) -> None:
        self._layout, self._folder = policy.layout, Folder(bank)

    def collect(self, step: int) -> Arrived | None:
        held = self._layout.from_main(list(self._folder.sealed()))
        if step not in held:
            raise SettingsError(
                f"bank.replay = {self._folder.path}: it has no step {step} (it has {_range(held)}). Set run.steps to at most "
                f"{max(held, default=-1) + 1}, or fill it further with megatron-rl rollout."
            )
        return Arrived(step)

    def rows(self, step: int) -> SealedStep:
        return open_step(self._folder, step)

    def has(self, step: int) -> bool:
        return True

    def sleep(self) -> None:
        return

    def publish(self, version: int) -> dict[str, float]:
        return {}

    def go_on(self, version: int) -> None:
        return


def require_routing(settings: Settings) -> None:
    """Raise a SettingsError where updates shall repeat the servers' routing, and the replayed bank does not have it."""
    if settings.objective.routing_replay != "rollout" or settings.bank.replay is None:
        return
    for step, path in Folder(settings.bank.replay).sealed().items():
        with SealedStep(path) as rows:
            if step < settings.run.steps and Experience.read(rows).without_routing() == 1:
                raise SettingsError(
                    f"objective.routing_replay = rollout with bank.replay = {settings.bank.replay}: the bank has no routing of "
                    f"step {step}. Fill one with sampling.routing=true, or set objective.routing_replay=policy."
                )


class Rollouts:
    """Steps that servers sample while the run goes on."""

    def __init__(self, settings: Settings, policy: Policy, stopper: Stopper, thread: SamplingThread | None) -> None:
        """`thread` on the main rank alone."""
        self._policy, self._layout, self._stopper, self._thread = policy, policy.layout, stopper, thread
        self._colocated = settings.servers.colocated
        self._folder = Folder(settings.bank_directory)
        key = partial(api_key, settings)
        served, vocabulary = served_model(settings), policy.architecture.vocab
        self._publisher = open_publisher(policy, lambda url: Client(url, vocabulary, key), served)
        self._version: int | None = None  # that servers have been brought
        self._updates: int | None = None  # that the policy had seen then

    def open(self) -> bool:
        """Wait until servers are up and everything is found well; False when the run is told to stop meanwhile."""
        return self._attend(lambda: self._thread.opened if self._thread else None) is not None

    def collect(self, step: int) -> Arrived | None:
        async def filled(session: Session) -> Arrived:
            start = time.time()
            collected = await session.collector.collect(step)
            return Arrived(step, collected.position, _numbers(collected), (Span("sample", start, time.time(), "sampling"),))

        return self.attend(filled)

    def rows(self, step: int) -> SealedStep:
        return open_step(self._folder, step)

    def has(self, step: int) -> bool:
        found: bool = self._layout.from_main(step in self._folder.sealed())
        return found

    def sleep(self) -> None:
        """The policy takes the memory when all servers have given theirs. Seconds, so that a signal to stop can wait."""

        async def asleep(session: Session) -> bool:
            await session.pool.fleet.lie_down()
            return True

        self._attend(lambda: self._thread.submit(asleep) if self._thread else None, whole=True)
        self._policy.take_room()

    def publish(self, version: int) -> dict[str, float]:
        """Weights that no server takes, since all are dead or ill, wait until one is back (`_attend`)."""
        self._version, self._updates = version, self._policy.steps + self._policy.skipped
        if self._colocated:
            self._policy.make_room()
        pool = self._thread.session.pool if self._thread is not None else None
        on_pool = self._thread.wait if self._thread is not None else None
        report = asyncio.run(publish_to_pool(self._publisher, version, pool, on_pool=on_pool))
        differences = [outcome.difference for outcome in report.outcomes if outcome.difference is not None]
        return {
            "publish/seconds": report.seconds,
            "publish/megabytes": report.bytes / 1e6,
            "publish/paused_seconds": max((outcome.paused for outcome in report.outcomes), default=0.0),
            "publish/servers": float(len(report.serving)),
            "publish/failed_servers": float(len(report.outcomes) - len(report.serving)),
            **({"publish/difference": max(differences)} if differences else {}),
        }

    def go_on(self, version: int) -> None:
        async def updated(session: Session) -> None:
            session.collector.updated(version)

        if self._thread is not None:
            self._thread.call(updated)

    def attend[T](self, work: Callable[[Session], Coroutine[Any, Any, T]]) -> T | None:
        """What the main rank's session makes of the work, on every rank; None when the run is told to stop meanwhile."""
        return self._attend(lambda: self._thread.submit(work) if self._thread else None)

    def _attend[T](self, begin: Callable[[], Future[T] | None], *, whole: bool = False) -> T | None:
        """All ranks wait together, and hear now and then that there is still something to wait for.

        What is begun `whole` is seen through, also when the run is told to stop, and nobody is published to meanwhile. A single
        long wait would run into the time-outs of process groups, and no rank could tell the others of a signal.
        """
        future = begin()
        while True:
            word: Word = self._layout.from_main(Word.of(future) if future is not None else None)
            if word.failure is not None:
                error = future.exception() if future is not None else None
                if isinstance(error, UserError):
                    raise error
                raise SamplingFailed(f"{word.failure}\nWhat is finished is in the bank; go on with --resume.") from error
            if word.done:
                return word.value
            if whole:
                continue
            if self._layout.agree(self._stopper.asked):
                if future is not None:
                    future.cancel()
                return None
            if self._layout.agree(self._behind):
                assert self._version is not None
                self.publish(self._version)

    @property
    def _behind(self) -> bool:
        """Has a server come back, or come new, that waits for the published weights? It may be all that there are.

        Steps that the bank held already are learned from without a word to servers; what the policy is by then has no version
        of its own until it is published.
        """
        if self._thread is None or self._updates != self._policy.steps + self._policy.skipped:
            return False
        known = tuple(self._thread.session.pool.fleet.workers.values())  # at once: in their thread some may come or go
        return any(isinstance(worker.health, Outdated) for worker in known)


@dataclass(frozen=True)
class Word:
    """What the main rank tells the others of something that all wait for."""

    done: bool = False
    value: Any = None
    failure: str | None = None

    @classmethod
    def of(cls, future: Future[Any]) -> "Word":
        """After a short wait."""
        if not wait([future], TICK).done:
            return cls()
        error = future.exception()
        if error is not None:
            return cls(failure=f"{type(error).__name__}: {error}")
        value = future.result()
        return cls(done=True, value=True if isinstance(value, Session) else value)  # sessions stay where they are


def _numbers(collected: Collected) -> dict[str, float]:
    return {
        "sampling/thrown_away": float(collected.thrown),
        "sampling/failed_prompts": float(collected.failed),
        "sampling/cut_off": float(collected.cut),
    }


def _range(steps: list[int]) -> str:
    return f"{min(steps)} to {max(steps)}" if steps else "none"
