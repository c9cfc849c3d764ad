"""Scoring samples: all components at once, while sampling goes on. What fails, fails one sample."""

import asyncio
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_rl.config.reward_settings import ScoringSettings
from megatron_rl.rewards.base import AwaitedReward, ComputedReward, RewardError, Scored, checked
from megatron_rl.rewards.registry import Component
from megatron_rl.rewards.worker import say
from megatron_rl.rewards.workers import WorkerPool
from megatron_rl.types import Prompt, Sample

MOST_WORKERS = 16  # by default
type Decode = Callable[[NDArray[np.int64]], str]


class RewardModel:
    """Components made ready. Use it as `async with RewardModel(components, settings, decode) as model`."""

    def __init__(self, components: Sequence[Component], settings: ScoringSettings, decode: Decode) -> None:
        self.components = tuple(components)
        self.settings = settings
        self.decode = decode
        self.scored = 0
        self.failures: Counter[str] = Counter()  # of samples, by component
        computed = {i: each.words for i, each in enumerate(components) if isinstance(each.reward, ComputedReward)}
        workers = settings.workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        memory = None if settings.worker_memory is None else int(settings.worker_memory * 2**30)
        self.pool = WorkerPool(computed, workers if computed else 0, memory)
        self.turns: dict[int, asyncio.Semaphore] = {}

    async def __aenter__(self) -> Self:
        """Start workers, open connections, find the walls of the sandbox; a UserError where one of them cannot be."""
        try:
            for i, component in enumerate(self.components):
                if isinstance(component.reward, AwaitedReward):
                    self.turns[i] = asyncio.Semaphore(component.reward.concurrency)
                    await component.reward.open()
            await self.pool.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.pool.close()
        for component in self.components:
            if isinstance(component.reward, AwaitedReward):
                await component.reward.close()

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Scored]:
        """What each sample is worth, in their order."""
        return list(await asyncio.gather(*(self._score_one(prompt, sample) for sample in samples)))

    async def _score_one(self, prompt: Prompt, sample: Sample) -> Scored:
        try:
            text = policy_text(sample, self.decode, self.settings.text)
        except Exception as error:
            self.scored += 1
            self.failures["text"] += 1
            return Scored({}, self.settings.failure_reward, f"its text cannot be read: {say(error)}")
        answers = await asyncio.gather(*(self._ask(i, prompt, text, sample) for i in range(len(self.components))))
        rewards = {c.name: answer for c, answer in zip(self.components, answers, strict=True) if isinstance(answer, float)}
        failed = {c.name: answer for c, answer in zip(self.components, answers, strict=True) if isinstance(answer, str)}
        self.scored += 1
        self.failures.update(failed.keys())
        if failed:
            return Scored(rewards, self.settings.failure_reward, "; ".join(f"{name}: {text}" for name, text in failed.items()))
        return Scored(rewards, math.fsum(component.weight * rewards[component.name] for component in self.components))

    async def _ask(self, index: int, prompt: Prompt, text: str, sample: Sample) -> float | str:
        """One component's answer, or why there is none. Nothing but being cancelled leaves here as an exception."""
        reward: Any = self.components[index].reward
        try:
            if isinstance(reward, ComputedReward):
                return checked(await self.pool.score(index, prompt, text, sample, reward.patience()))
            async with self.turns[index]:
                return await _within(reward, prompt, text, sample)
        except (Exception, SystemExit) as error:
            return say(error)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():  # it is we who shall stop; else the reward cancelled itself
                raise
            return say(error)


@dataclass(frozen=True)
class Grader:
    """A reward model as sampling strategies ask for it: samples in, the same samples with their rewards out."""

    model: RewardModel

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Sample]:
        scored = await self.model.score(prompt, samples)
        return [each.onto(sample) for each, sample in zip(scored, samples, strict=True)]


async def _within(reward: AwaitedReward[Any], prompt: Prompt, text: str, sample: Sample) -> float:
    patience = reward.patience()
    try:
        async with asyncio.timeout(patience) as limit:
            return checked(await reward.score(prompt, text, sample))
    except TimeoutError:
        if limit.expired():
            raise RewardError(f"took more than {patience:g} s") from None
        raise


def policy_text(sample: Sample, decode: Decode, which: str) -> str:
    """What the policy wrote, and nobody else: in its last turn, or in all."""
    own = [segment for segment in sample.segments if segment.author == "policy"]
    if which == "last_turn" and own:
        last = max(segment.turn for segment in own)
        own = [segment for segment in own if segment.turn == last]
    pieces = [sample.tokens[segment.start : segment.stop] for segment in own]
    return decode(np.concatenate(pieces)) if pieces else ""
