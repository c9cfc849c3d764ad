"""Servers whose weights are not a run's, whatever they call them."""

import asyncio
from dataclasses import replace

import pytest

from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout import caretaker
from megatron_rl.rollout.client import Client
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.health import Outdated, Quarantined
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.replies import ServerInfo
from megatron_rl.rollout.suitability import Demands, UnsuitableServer, inspect
from tests.rollout.talk import talk
from tests.rollout.test_pool import until, with_pool
from tests.servers import TinyServer


def test_who_missed_the_first_weights_does_not_have_them(tiny_server: TinyServer) -> None:
    """Though it calls its own by the same number: it was away, or is new."""

    async def miss(pool: Pool) -> None:
        (worker,) = pool.fleet.workers.values()
        worker.become(Quarantined("away"))
        async with pool.fleet.paused(0):
            pass
        await until(worker, Outdated)
        pool.fleet.leave(worker.url)
        await until(pool.fleet.join(worker.url), Outdated)

    talk(tiny_server, lambda client: client.update_from_disk(str(tiny_server.other), 0))
    with_pool(tiny_server, miss)


def test_who_started_anew_behind_our_back_has_no_weights_of_the_run(
    tiny_server: TinyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took part in the first publish, and somebody else has restarted it since: it gives no number to what it has."""

    async def as_restarted(client: Client, demands: Demands) -> ServerInfo:
        return replace(await inspect(client, demands), version=None)

    async def restart(pool: Pool) -> None:
        async with pool.fleet.paused(0):
            pass
        (worker,) = pool.fleet.workers.values()
        monkeypatch.setattr(caretaker, "inspect", as_restarted)
        worker.become(Quarantined("its connection broke"))
        await until(worker, Outdated)

    talk(tiny_server, lambda client: client.update_from_disk(str(tiny_server.other), 0))
    with_pool(tiny_server, restart)


def test_a_mistake_of_a_caretaker_is_told_to_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def mistaken(client: Client, demands: Demands) -> ServerInfo:
        raise ZeroDivisionError("a mistake")

    async def begin() -> None:
        settings = ServerSettings(urls=("http://127.0.0.1:9",))
        fleet = Fleet(settings, Demands(family="any", vocabulary=8), None, 0, lambda: None)
        async with asyncio.timeout(30):
            await fleet.begin([])

    monkeypatch.setattr(caretaker, "inspect", mistaken)
    with pytest.raises(UnsuitableServer, match=r"looking after it failed: ZeroDivisionError\('a mistake'\)"):
        asyncio.run(begin())
