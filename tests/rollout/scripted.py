"""Ports of the strategies for tests of coordination: who is asked what, in which order, and what is cut off when.

What a server does with tokens is tested with real servers; here replies come at moments that the test chooses.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.replies import Generation, Span
from megatron_rl.rollout.strategies.base import Floor, Limits
from megatron_rl.types import Group, Prompt, Sample

END = 2


class Writer:
    """Writes until there are `length(tokens)` tokens, then an end; one at each turn of the event loop."""

    def __init__(self, length: Callable[[NDArray[np.int64]], int], seed: int = 0) -> None:
        self.length, self.version, self.asked = length, 0, 0
        self.random = random.Random(seed)
        self._cut = asyncio.Event()

    async def generate(self, tokens: NDArray[np.int64], sampling: Sampling, *, group: str) -> Generation:
        self.asked += 1
        cut = self._cut
        written: list[int] = []
        versions: list[int] = []
        finish, goal = "length", self.length(tokens)
        for _ in range(sampling.max_new_tokens):
            await asyncio.sleep(0)
            if cut.is_set():
                finish = "abort"
                break
            done = len(tokens) + len(written) >= goal
            written.append(END if done else self.random.randrange(3, 100))
            versions.append(self.version)
            if done:
                finish = "stop"
                break
        spans = tuple(Span(version, versions.count(version)) for version in dict.fromkeys(versions))
        return Generation(np.array(written, np.int64), np.full(len(written), -1.0, np.float32), spans, finish)  # type: ignore[arg-type]

    async def interrupt(self) -> None:
        self._cut.set()
        self._cut = asyncio.Event()


class Grader:
    """Rewards by a function of the prompt and the place in the group."""

    def __init__(self, reward: Callable[[Prompt, int], float] = lambda prompt, index: float(index)) -> None:
        self.reward = reward

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> Sequence[Sample]:
        await asyncio.sleep(0)
        return [replace(sample, reward=self.reward(prompt, index)) for index, sample in enumerate(samples)]


class Shelf:
    """A bank in memory, as strict as the real one about doubles."""

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}
        self.carries: dict[str, Group] = {}
        self.sealed: dict[int, list[Group]] = {}
        self.discarded: list[str] = []

    async def add(self, group: Group) -> None:
        await asyncio.sleep(0)
        assert group.key not in self.groups
        assert all(group.key not in {g.key for g in step} for step in self.sealed.values())
        self.groups[group.key] = group
        self.carries.pop(group.key, None)

    def carry(self, group: Group) -> None:
        self.carries[group.key] = group

    def discard(self, key: str, reason: str) -> None:
        del self.groups[key]
        self.discarded.append(key)

    def carried(self) -> list[str]:
        return list(self.carries)

    def waiting(self, step: int | None = None) -> list[str]:
        return [key for key, group in self.groups.items() if step in (None, group.step)]

    def read(self, key: str) -> Group:
        return self.groups.get(key) or self.carries[key]

    def sealed_keys(self, step: int) -> list[str] | None:
        return [group.key for group in self.sealed[step]] if step in self.sealed else None

    def seal(self, step: int, keys: list[str]) -> None:
        assert step not in self.sealed and keys
        self.sealed[step] = [self.groups.pop(key) for key in keys]


class Counting:
    """Prompt d is made of d."""

    def at(self, draw: int) -> Prompt:
        return Prompt(f"p{draw}", np.array([5, 6, 7 + draw % 5], np.int64))


def floor(writer: Writer, grader: Grader | None = None, *, response: int = 50, total: int = 200, turns: int = 1) -> Floor:
    return Floor(writer, grader or Grader(), Sampling(response), Limits(response, total, turns))
