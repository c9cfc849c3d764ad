"""The pool's queue: nobody waits while a server has room for it, whatever finishes, comes and goes, and in whatever order."""

import asyncio
import random
from typing import cast

import pytest

from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.client import Client
from megatron_rl.rollout.dispatch import Capacity
from megatron_rl.rollout.health import Healthy, Suspect
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.suitability import Demands
from megatron_rl.rollout.worker import Worker


def queue_of(servers: int) -> tuple[Pool, list[Worker]]:
    """A pool whose servers are never spoken to."""
    pool = Pool(ServerSettings(urls=("http://none",)), Demands("none", 10))
    for number in range(servers):
        client = cast(Client, type("Nobody", (), {"url": f"http://{number}"})())
        worker = Worker(client, pool._servers_changed, forgiven=3)
        worker.desk.resize(Capacity(3 + number % 2, 100.0))
        pool.fleet.workers[worker.url] = worker
        worker.become(Healthy())
    return pool, list(pool.fleet.workers.values())


async def play(seed: int) -> int:
    """Random work; returns how often somebody had to wait. After each move the front of the queue fits nowhere."""
    dice = random.Random(seed)
    pool, workers = queue_of(4)
    asked: list[tuple[asyncio.Task[Worker | None], int]] = []
    waited = 0
    for _ in range(400):
        given = [pair for pair in asked if pair[0].done()]
        move = dice.random()
        if move < 0.5:
            weight = dice.randint(5, 70)
            asked.append((asyncio.create_task(pool._place(str(dice.randrange(9)), weight)), weight))
        elif move < 0.9 and given:
            pair = dice.choice(given)
            asked.remove(pair)
            worker = pair[0].result()
            assert worker is not None
            worker.desk.finish(pair[1])
            pool._hand_out(worker)
        elif move < 0.95 and asked:
            task, weight = dice.choice(asked)
            if not task.done():
                asked.remove((task, weight))
                task.cancel()
        else:
            worker = dice.choice(workers)
            worker.become(Suspect(1, "it was said to be") if worker.works else Healthy())
        for _ in range(3):
            await asyncio.sleep(0)
        front = next((waiting for waiting in pool._queue if not waiting.place.done()), None)
        if front is not None:
            waited += 1
            assert not any(worker.works and worker.desk.has_room(front.weight) for worker in workers)
        assert all(worker.desk.requests <= worker.desk.capacity.requests for worker in workers)
    for task, _ in asked:
        task.cancel()
    await asyncio.gather(*(task for task, _ in asked), return_exceptions=True)
    return waited


@pytest.mark.parametrize("seed", range(8))
def test_nobody_waits_while_a_server_has_room(seed: int) -> None:
    assert asyncio.run(play(seed)) > 20
