"""What ranks do in tests of publishing."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.config.settings import Settings
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from megatron_rl.rollout.client import Client, Sampling
from megatron_rl.rollout.health import Outdated, name
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.replies import Generation
from megatron_rl.rollout.server import Server, ServerOptions
from megatron_rl.rollout.suitability import Demands
from megatron_rl.train.publishing import open_publisher, publish_to_pool
from megatron_rl.weights.publish.ports import Target
from megatron_rl.weights.publish.publisher import Publisher
from megatron_rl.weights.publish.report import Report

SECONDS = 120.0  # a publish that hangs fails
PROMPT_LENGTH, ENDURING = 8, 384  # tokens of a request and of its response, which no server can finish in the blink of an eye


def open_policy(launch: Launch, settings: dict[str, Any]) -> tuple[Policy, Publisher]:
    policy = Policy.open(Settings(**settings), launch)
    return policy, open_publisher(policy, lambda url: Client(url, policy.architecture.vocab))


def publish(launch: Launch, settings: dict[str, Any], version: int, urls: Sequence[str]) -> Report:
    """Publish the policy's first weights."""
    _, publisher = open_policy(launch, settings)

    async def in_time() -> Report:
        async with asyncio.timeout(SECONDS):
            return await publisher.publish(version, [Target(url) for url in urls])

    return asyncio.run(in_time())


@dataclass(frozen=True)
class Victim:
    """A server that is killed with -9 after so many buckets: how it was started, and its process."""

    options: ServerOptions
    url: str
    pid: int
    bucket: int


@dataclass(frozen=True)
class Survived:
    """What a pool saw of a publish in whose middle a server died, and of the next, when the server was back."""

    during: Report
    after: Report
    version: int  # of the pool, after the first
    health: dict[str, str]  # then
    prompts: list[list[int]]
    responses: list[Generation]  # to what was under way
    late: list[Generation]  # to the same prompts, of the server that was back alone, with its new weights


def publish_while_a_server_dies(
    launch: Launch, settings: dict[str, Any], survivor: str, victim: Victim, demands: Demands
) -> Survived | None:
    """A pool of two servers, a rank sending to each; requests are under way when they pause. Rank 0 has the pool, and tells."""
    _, publisher = open_policy(launch, settings)

    def tell(done: int, total: int) -> None:
        if launch.rank == 0 and done == victim.bucket < total:
            os.kill(victim.pid, signal.SIGKILL)

    async def in_time(pool: Pool | None, tell: Any = None) -> Report:
        async with asyncio.timeout(SECONDS):
            return await publish_to_pool(publisher, 1, pool, tell)

    async def follow() -> None:
        await in_time(None, tell)
        await publish_to_pool(publisher, 1, None)  # when rank 0 comes to it

    async def lead() -> Survived:
        servers = ServerSettings(urls=(victim.url, survivor), probe_seconds=0.2, piece=4)
        async with Pool(servers, demands) as pool:
            await pool.begin()
            generator, requests = np.random.default_rng(0), list[asyncio.Task[Generation]]()
            prompts = [generator.integers(0, demands.vocabulary, PROMPT_LENGTH).tolist() for _ in range(8)]

            async def begin() -> None:
                requests.extend(_requests(pool, prompts))
                await _under_way(pool)

            plain, publisher.connect = publisher.connect, lambda url: _Beginning(url, demands.vocabulary, begin)
            during = await in_time(pool, tell)
            publisher.connect = plain
            version, health = pool.fleet.version, {url: name(worker.health) for url, worker in pool.fleet.workers.items()}
            responses = list(await asyncio.gather(*requests))
            with Server.start(victim.options, int(victim.url.rpartition(":")[2])) as again:
                await again.ready()
                while not isinstance(pool.fleet.workers[again.url].health, Outdated):
                    await asyncio.sleep(0.1)
                after = await in_time(pool)
                pool.fleet.leave(survivor)
                late = list(await asyncio.gather(*_requests(pool, prompts)))
            return Survived(during, after, version, health, prompts, responses, late)

    return asyncio.run(lead()) if launch.rank == 0 else asyncio.run(follow())


class _Beginning(Client):
    """A client that brings requests under way before its server joins a group: late in a publish, just before servers pause."""

    def __init__(self, url: str, vocabulary: int, begin: Callable[[], Awaitable[None]]) -> None:
        super().__init__(url, vocabulary)
        self._begin = begin

    async def join_group(self, *arguments: Any, **options: Any) -> None:
        await self._begin()
        await super().join_group(*arguments, **options)


async def _under_way(pool: Pool) -> None:
    """Wait until each server has sampled for requests of the pool: it has answered one that came after them."""
    workers = pool.fleet.workers.values()
    while not all(worker.attempts for worker in workers):
        await asyncio.sleep(0.01)
    short = Sampling(max_new_tokens=8, ignore_end=True)
    await asyncio.gather(*(worker.client.generate([1, 2, 3], short, cache_key="after them") for worker in workers))


def _requests(pool: Pool, prompts: Sequence[Sequence[int]]) -> list[asyncio.Task[Generation]]:
    sampling = Sampling(max_new_tokens=ENDURING, ignore_end=True)
    return [asyncio.create_task(pool.generate(prompt, sampling, group=str(i))) for i, prompt in enumerate(prompts)]
