"""One training step of sampling with servers that only pretend: what the main rank itself has to do for each response.

Collector, strategy, pool, queue, dispatch and bank are the product's own. A server is a client that brings a response's tokens
when its turn comes, without HTTP and without a model: the work that is left is the coordination.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.client import Client, Sampling
from megatron_rl.rollout.collector import Collected, Collector, Plan
from megatron_rl.rollout.dispatch import Capacity
from megatron_rl.rollout.health import Healthy
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.replies import Piece
from megatron_rl.rollout.strategies.base import Floor, Limits
from megatron_rl.rollout.strategies.grouped import Grouped
from megatron_rl.rollout.suitability import Demands
from megatron_rl.rollout.worker import Worker
from megatron_rl.types import Group, Prompt, Sample

PROMPT, RESPONSE = 16, 16  # tokens: few, for they cost the same wherever they are
AT_ONCE = 64  # requests that a server runs
AT_A_TIME = 16  # of them that end between two looks


@dataclass
class Servers:
    """What all of them have under way; `run` ends requests, server after server, until it is cancelled."""

    waiting: dict[str, deque["asyncio.Future[None]"]] = field(default_factory=dict)

    async def run(self) -> None:
        while True:
            for queue in self.waiting.values():
                for _ in range(min(AT_A_TIME, len(queue))):
                    queue.popleft().set_result(None)
            await asyncio.sleep(0)


@dataclass
class Pretender:
    """A client of a server that is not there: it has what the pool asks of one."""

    url: str
    servers: Servers

    async def stream(self, tokens: Sequence[int], sampling: Sampling, **_: Any) -> AsyncGenerator[Piece]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.servers.waiting.setdefault(self.url, deque()).append(done)
        await done
        yield Piece([1] * sampling.max_new_tokens, [-1.0] * sampling.max_new_tokens, 0, "length")


class Counted:
    """Prompt d is made of d."""

    def at(self, draw: int) -> Prompt:
        return Prompt(f"p{draw}", np.full(PROMPT, draw % 1000, dtype=np.int64))


class Judge:
    """Rewards by turns."""

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> Sequence[Sample]:
        return [replace(sample, reward=float(number % 2)) for number, sample in enumerate(samples)]


@dataclass
class Memory:
    """A bank in memory, so that the disk is measured by itself."""

    groups: dict[str, Group] = field(default_factory=dict)
    steps: dict[int, list[str]] = field(default_factory=dict)

    async def add(self, group: Group) -> None:
        self.groups[group.key] = group

    def carry(self, group: Group) -> None:
        raise AssertionError("nothing is cut off here")

    def discard(self, key: str, reason: str) -> None:
        del self.groups[key]

    def carried(self) -> list[str]:
        return []

    def waiting(self, step: int | None = None) -> list[str]:
        return [key for key, group in self.groups.items() if step in (None, group.step)]

    def read(self, key: str) -> Group:
        return self.groups[key]

    def sealed_keys(self, step: int) -> list[str] | None:
        return self.steps.get(step)

    def seal(self, step: int, keys: list[str]) -> None:
        self.steps[step] = keys
        for key in keys:
            del self.groups[key]


async def sample_a_step(servers: int, samples: int, group_size: int) -> tuple[Collected, Memory]:
    """Fill one step of so many samples; returns what was collected, and the bank."""
    pretended, bank = Servers(), Memory()
    pool = Pool(ServerSettings(urls=("http://pretended",)), Demands("none", 1000))
    for number in range(servers):
        url = f"http://server{number}:30000"
        worker = Worker(cast(Client, Pretender(url, pretended)), pool._servers_changed, forgiven=3)
        worker.desk.resize(Capacity(AT_ONCE, AT_ONCE * 4.0 * (PROMPT + RESPONSE)))
        pool.fleet.workers[url] = worker
        worker.become(Healthy())
    floor = Floor(pool, Judge(), Sampling(RESPONSE), Limits(RESPONSE, PROMPT + RESPONSE))
    collector = Collector(Counted(), Grouped(group_size), floor, bank, Plan(samples // group_size))
    running = asyncio.create_task(pretended.run())
    try:
        return await collector.collect(0), bank
    finally:
        running.cancel()
        await collector.close()
