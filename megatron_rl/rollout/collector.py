"""Fills training steps with groups: draws prompts, runs the strategy on them, keeps what comes in the bank, seals steps.

Two ways to fill a step. *In order*: a prompt has its place in a step from the moment it is drawn, so no group is older than
the bound allows, and sampling runs ahead of learning by as many steps as `ahead` says. *First done* (partial rollouts): more
prompts are drawn than a step needs, the step is full when enough groups are whole, and the responses under way are cut off
and go on in the next step, in the bank in between.

What a crash interrupts is found again: draw d is always the same prompt under the same key, and a key that the bank has is not
sampled twice.
"""

import asyncio
import logging
import math
from collections.abc import Container, Coroutine
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_rl.rollout.staleness import Staleness
from megatron_rl.rollout.strategies.base import Floor, Graded, Strategy, StrategyFailed, is_whole
from megatron_rl.types import Group, Prompt, Sample

logger = logging.getLogger(__name__)


class Prompts(Protocol):
    """Draw d of an endless series: a function of d alone."""

    def at(self, draw: int) -> Prompt: ...


class Keeper(Protocol):
    """What is needed of the bank."""

    async def add(self, group: Group) -> None: ...
    def carry(self, group: Group) -> object: ...
    def discard(self, key: str, reason: str) -> object: ...
    def carried(self) -> list[str]: ...
    def waiting(self, step: int | None = None) -> list[str]: ...
    def read(self, key: str) -> Group: ...
    def sealed_keys(self, step: int) -> list[str] | None: ...
    def seal(self, step: int, keys: list[str]) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How steps are filled."""

    groups: int  # a step
    ahead: int = 0  # updates that a group may be old
    dynamic: bool = False  # groups whose rewards are all equal teach nothing: draw others (DAPO)
    tries: int = 4  # at most tries * groups are drawn for a step, then equal rewards are taken
    partial: bool = False
    over_sampling: float = 1.5  # partial: draws at once, as a multiple of groups


@dataclass(frozen=True)
class Position:
    """Where drawing stands, for a checkpoint: plain numbers."""

    draws: int = 0  # prompts drawn so far
    pending: tuple[int, ...] = ()  # of these, the ones that later steps have begun with, place by place


BEGINNING = Position()


@dataclass
class Collected:
    """What filled a step."""

    step: int
    keys: list[str] = field(default_factory=list)
    position: Position = BEGINNING  # behind this step: where a resumed run goes on
    thrown: int = 0  # groups whose rewards were all equal
    failed: int = 0  # prompts that gave no group
    cut: int = 0  # responses that go on in the next step
    rewards: list[float] = field(default_factory=list)  # mean of each group


@dataclass(frozen=True)
class Outcome:
    """What became of a draw: groups in the bank, or why there are none."""

    keys: tuple[str, ...] = ()
    rewards: tuple[float, ...] = ()
    equal: bool = False
    cut: int = 0
    failure: str | None = None


@dataclass(frozen=True)
class Drawn:
    """A draw under way."""

    draw: int
    key: str
    task: "asyncio.Task[Outcome]"


class _Done[Name]:
    """Draws as they get done, by name. Each is watched once: to wait anew for all that are left would cost their square."""

    def __init__(self) -> None:
        self._tasks: asyncio.Queue[tuple[Name, asyncio.Task[Outcome]]] = asyncio.Queue()

    def watch(self, task: "asyncio.Task[Outcome]", name: Name) -> None:
        task.add_done_callback(lambda done: self._tasks.put_nowait((name, done)))

    async def next(self) -> tuple[Name, Outcome]:
        name, task = await self._tasks.get()
        return name, task.result()


class Collector:
    """One of them samples for a run. `collect` fills one step after the other, in order."""

    def __init__(
        self,
        prompts: Prompts,
        strategy: Strategy,
        floor: Floor,
        bank: Keeper,
        plan: Plan,
        *,
        step: int = 0,
        position: Position = BEGINNING,
        last: int | None = None,
    ) -> None:
        """`step` and `position`: where a resumed run goes on. Nothing is begun for steps after `last`."""
        self.prompts, self.strategy, self.floor, self.bank, self.plan = prompts, strategy, floor, bank, plan
        self.version, self._last = step, last
        self._staleness = Staleness(plan.groups, plan.ahead)
        self._draws, self._pending = position.draws, list(position.pending)
        self._begun = step * plan.groups  # places given to draws
        self._running: dict[int, Drawn] = {}  # by place
        self._replayed: dict[int, list[str]] = {}
        self._under_way: set[asyncio.Task[Outcome]] = set()
        self._left: dict[str, list[str]] = {}  # groups that were finished before a crash, by the key of their draw
        self._find_sealed(step)

    async def collect(self, step: int) -> Collected:
        """Returns when the step's groups are durable and sealed. With `ahead`, sampling goes on behind it."""
        tally = Collected(step)
        if step in self._replayed:
            tally.keys = self._replayed.pop(step)
            tally.position = self._position()
            return tally
        await (self._fill_with_first_done(tally) if self.plan.partial else self._fill_in_order(tally))
        self.bank.seal(step, tally.keys)
        tally.position = self._position()
        return tally

    def updated(self, version: int) -> None:
        """The servers have new weights: more may be sampled ahead."""
        self.version = version
        if not self.plan.partial:
            self._begin()

    async def close(self) -> None:
        """Stop what is under way; what is finished is in the bank."""
        self._running.clear()
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    def _position(self) -> Position:
        pending = [self._running[place].draw for place in sorted(self._running)]
        return Position(self._draws, tuple(pending + self._pending))

    def _find_sealed(self, step: int) -> None:
        """Steps that the bank has and the checkpoint had not: they are learned from as they are. Their draws are used."""
        used: set[int] = set()
        while (keys := self.bank.sealed_keys(step)) is not None:
            self._replayed[step] = keys
            used |= {draw_of(key) for key in keys}
            self._begun += self.plan.groups
            step += 1
        for name in self.bank.waiting():
            self._left.setdefault(_drawn_key(name), []).append(name)
        kept = {draw_of(key) for key in (*self.bank.waiting(), *self.bank.carried())}
        draws = max([self._draws, *(draw + 1 for draw in used | kept)])
        done = used | kept if self.plan.partial else used  # first-done steps find what is kept by themselves
        self._pending = [draw for draw in (*self._pending, *range(self._draws, draws)) if draw not in done]
        self._draws = draws

    # -- in order ------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Draw for every place that may be begun."""
        for _ in range(self._staleness.may_begin(self._begun, self.version)):
            step = self._staleness.step_of(self._begun)
            if self._last is not None and step > self._last:
                return
            place, self._begun = self._begun, self._begun + 1
            self._running[place] = self._draw(step)

    async def _fill_in_order(self, tally: Collected) -> None:
        """Every place of the step is filled by its own draw, or by the one that replaces it at once."""
        self._begin()
        places = range(tally.step * self.plan.groups, (tally.step + 1) * self.plan.groups)
        if not all(place in self._running for place in places):
            raise ValueError(f"step {tally.step} cannot be sampled after {self.version} updates with ahead = {self.plan.ahead}")
        filled: dict[int, Outcome] = {}
        drawn, done = self.plan.groups, _Done[int]()
        for place in places:
            done.watch(self._running[place].task, place)
        while len(filled) < self.plan.groups:
            place, outcome = await done.next()
            if self._fills(outcome, tally, last_try=drawn >= self.plan.tries * self.plan.groups):
                filled[place] = outcome
            else:
                drawn += 1
                self._running[place] = self._draw(tally.step)
                done.watch(self._running[place].task, place)
        for place in places:
            del self._running[place]
            _count(filled[place], tally)

    def _fills(self, outcome: Outcome, tally: Collected, *, last_try: bool) -> bool:
        """Is a place filled by what became of a draw?"""
        if outcome.failure is not None:
            tally.failed += 1
            if tally.failed > self.plan.tries * self.plan.groups:
                raise StrategyFailed(f"step {tally.step}: {tally.failed} prompts gave no group; the last: {outcome.failure}")
            return False
        if self.plan.dynamic and outcome.equal and not last_try:
            tally.thrown += 1
            for key in outcome.keys:
                self.bank.discard(key, "all rewards are equal")
            return False
        return True

    # -- first done ----------------------------------------------------------------------------------------------------

    async def _fill_with_first_done(self, tally: Collected) -> None:
        """Groups that were whole too late for the last step come first, then those that were cut off, then new ones."""
        self.floor.interrupted = False
        wanted, most = self.plan.groups, self.plan.tries * self.plan.groups
        for key in self.bank.waiting()[:wanted]:
            _count(_outcome([key], [self.bank.read(key).samples]), tally)
        running, done = dict[str, Drawn](), _Done[str]()
        counted = set(tally.keys)

        def begin(new: Drawn) -> None:
            running[new.key] = new
            done.watch(new.task, new.key)

        for key in self.bank.carried():
            begin(self._resume(key, tally.step))
        draws = 0
        while len(tally.keys) < wanted:
            while len(running) < math.ceil(self.plan.over_sampling * (wanted - len(tally.keys))):
                begin(self._draw(tally.step, running, counted))
                draws += 1
            key, outcome = await done.next()
            del running[key]
            if self._fills(outcome, tally, last_try=draws >= most):
                _count(outcome, tally)
                counted.update(outcome.keys)
        await self.floor.interrupt()
        for left in running.values():
            outcome = await left.task
            tally.cut += outcome.cut
            if not outcome.cut:
                self._fills(outcome, tally, last_try=False)

    # -- one draw ------------------------------------------------------------------------------------------------------

    def _draw(self, step: int, *besides: Container[str]) -> Drawn:
        """The next draw, first those that were begun before a crash; `besides` are under way already, or done."""
        while True:
            draw = self._pending.pop(0) if self._pending else self._draws
            self._draws = max(self._draws, draw + 1)
            prompt = self.prompts.at(draw)
            key = f"{prompt.key}@{draw}"
            if not any(key in keys for keys in besides):
                return self._started(draw, key, self._sampled(prompt, key, step))

    def _resume(self, key: str, step: int) -> Drawn:
        group = self.bank.read(key)
        return self._started(draw_of(key), key, self._sampled(group.prompt, key, step, group.samples))

    def _started(self, draw: int, key: str, sampling: Coroutine[None, None, Outcome]) -> Drawn:
        task = asyncio.create_task(sampling)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return Drawn(draw, key, task)

    async def _sampled(self, prompt: Prompt, key: str, step: int, unfinished: tuple[Sample, ...] = ()) -> Outcome:
        known = self._left.pop(key, None)
        if known is not None:
            return _outcome(known, [self.bank.read(name).samples for name in known])
        try:
            result = await self.strategy.run(prompt, key, self.floor, unfinished)
        except StrategyFailed as error:
            logger.warning("prompt %s gave no group: %s", prompt.key, error)
            return Outcome(failure=str(error))
        if result.unfinished is not None:
            return self._cut(prompt, key, step, result.unfinished)
        for graded in result.groups:
            await self.bank.add(Group(_name(key, graded), prompt, graded.samples, step, graded.information))
        return _outcome([_name(key, graded) for graded in result.groups], [graded.samples for graded in result.groups])

    def _cut(self, prompt: Prompt, key: str, step: int, samples: tuple[Sample, ...]) -> Outcome:
        """Into the bank, to go on with the next step; one of which nothing is left to keep begins anew there."""
        self.bank.carry(Group(key, prompt, samples, step))
        return Outcome(cut=max(sum(not is_whole(sample) for sample in samples), 1))


def draw_of(key: str) -> int:
    """The draw that a group's key names: prompt@draw, or prompt@draw/part."""
    return int(key.rpartition("@")[2].partition("/")[0])


def _drawn_key(name: str) -> str:
    """The key of a draw, of which a group with this name is all or a part."""
    prompt, at, rest = name.rpartition("@")
    return f"{prompt}{at}{rest.partition('/')[0]}"


def _name(key: str, graded: Graded) -> str:
    return f"{key}/{graded.part}" if graded.part else key


def _count(outcome: Outcome, tally: Collected) -> None:
    tally.keys += outcome.keys
    tally.rewards += outcome.rewards


def _outcome(keys: list[str], groups: list[tuple[Sample, ...]]) -> Outcome:
    rewards = [[sample.reward for sample in samples] for samples in groups]
    equal = all(max(each) == min(each) for each in rewards)
    return Outcome(tuple(keys), tuple(float(np.mean(each)) for each in rewards), equal)
