"""What ranks do in tests of publishing."""

import asyncio
import os
import signal
from collections.abc import Sequence
from typing import Any

from megatron_rl.config.settings import Settings
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from megatron_rl.rollout.client import Client
from megatron_rl.train.publishing import open_publisher
from megatron_rl.weights.publish.ports import Target
from megatron_rl.weights.publish.report import Report

SECONDS = 120.0  # a publish that hangs fails


def publish(
    launch: Launch,
    settings: dict[str, Any],
    version: int,
    urls: Sequence[str],
    kill: tuple[int, int, int] | None = None,
    known: Sequence[str] = (),
) -> Report:
    """Publish the policy's first weights. `kill` names a process, and the bucket and the rank after which it is killed.

    `known` servers have been given this version by an earlier publisher of the same run.
    """
    policy = Policy.open(Settings(**settings), launch)
    publisher = open_publisher(policy, lambda url: Client(url, policy.architecture.vocab))
    publisher.given.update(dict.fromkeys(known, version))

    def tell(done: int, total: int) -> None:
        if kill is not None and launch.rank == kill[2] and done == kill[1] < total:
            os.kill(kill[0], signal.SIGKILL)

    async def in_time() -> Report:
        async with asyncio.timeout(SECONDS):
            return await publisher.publish(version, [Target(url) for url in urls], tell)

    return asyncio.run(in_time())
