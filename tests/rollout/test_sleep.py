"""Servers that sleep: who is left alone, who is woken, and what is made of one that somebody has left asleep.

On a CPU a server keeps its memory; what it answers, and what would end it, is as on a GPU.
"""

import asyncio
from dataclasses import replace

import httpx
import pytest

from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.client import Client, Sampling
from megatron_rl.rollout.errors import ServerError
from megatron_rl.rollout.health import Asleep, Healthy, Outdated, Quarantined
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.replies import ServerInfo
from megatron_rl.rollout.suitability import UnsuitableServer, shortcomings
from tests.faults.proxy import Proxy
from tests.rollout.talk import PROMPT, SECONDS, talk
from tests.rollout.test_pool import DEMANDS, PATIENT, check_against, until, with_pool
from tests.servers import TinyServer

SHORT = Sampling(6, ignore_end=True)


async def call_weights(server: TinyServer, name: str) -> None:
    """Name the server's weights, as somebody who died."""
    async with httpx.AsyncClient(base_url=server.server.url, trust_env=False) as http:
        body = {"new_version": name, "abort_all_requests": False}
        (await http.post("/update_weight_version", json=body)).raise_for_status()


def test_a_server_that_sleeps_is_left_alone_until_an_update(tiny_server: TinyServer) -> None:
    """Looks at its health would count against it, and end it on a GPU."""

    async def sleep(pool: Pool) -> None:
        (worker,) = pool.fleet.workers.values()
        await pool.fleet.lie_down()
        await pool.fleet.lie_down()  # it may be said twice
        assert isinstance(worker.health, Asleep)
        async with tiny_server.client() as client:
            assert (await client.model_info()).state == "asleep"
        waiting = asyncio.create_task(pool.generate(PROMPT, SHORT, group="g"))
        await asyncio.sleep(5 * PATIENT["probe_seconds"])
        assert isinstance(worker.health, Asleep) and worker.strikes == 0 and not waiting.done()
        failed = await pool.fleet.update(1, lambda client: client.update_from_disk(str(tiny_server.other), 1))
        assert failed == {} and worker.works and not pool.fleet.asleep and not worker.client.asleep
        response = await waiting
        assert [span.version for span in response.spans] == [1]
        check_against(tiny_server.other, response)

    with_pool(tiny_server, sleep)


def test_a_server_left_asleep_is_woken_and_has_no_weights(tiny_server: TinyServer) -> None:
    """By a run that was killed. It is not taken for one that has the first weights, which nobody has named yet."""

    async def wake(pool: Pool) -> None:
        (worker,) = pool.fleet.workers.values()
        assert isinstance(worker.health, Outdated) and "none of a run's weights" in worker.health.reason
        await pool.fleet.update(0, lambda client: client.update_from_disk(str(tiny_server.model), 0))
        check_against(tiny_server.model, await pool.generate(PROMPT, SHORT, group="g"))

    talk(tiny_server, Client.sleep)
    with_pool(tiny_server, wake)


def test_a_server_whose_memory_nobody_knows_is_refused(tiny_server: TinyServer) -> None:
    async def nothing(_: Pool) -> None:
        return

    asyncio.run(call_weights(tiny_server, "unsettled"))
    with pytest.raises(UnsuitableServer, match=r"left while it gave its memory back or took it.*Start it again"):
        with_pool(tiny_server, nothing)
    asyncio.run(call_weights(tiny_server, "0"))


def test_a_server_that_was_woken_by_others_is_not_woken_again(tiny_server: TinyServer) -> None:
    """Or was started anew. To take memory that it has would end it."""

    async def update(pool: Pool) -> None:
        (worker,) = pool.fleet.workers.values()
        await pool.fleet.lie_down()
        async with tiny_server.client() as other:
            await other.rouse()
        with pytest.raises(ServerError, match="does not sleep any more"):
            await worker.client.wake()
        await pool.fleet.update(1, lambda client: client.update_from_disk(str(tiny_server.other), 1))
        await until(worker, Healthy)  # found well, and given the weights
        check_against(tiny_server.other, await pool.generate(PROMPT, SHORT, group="g"))

    with_pool(tiny_server, update)


def test_a_server_that_cannot_be_put_to_sleep_is_lost_for_the_while(tiny_server: TinyServer) -> None:
    """It is not called back before the others are woken: the trainer has the GPUs."""

    async def sleep() -> None:
        async with asyncio.timeout(SECONDS), Proxy(tiny_server.server.port) as proxy:
            own = ServerSettings(urls=(proxy.url,), **PATIENT)
            async with Pool(own, DEMANDS) as pool:
                await pool.begin()
                (worker,) = pool.fleet.workers.values()
                proxy.fault = "refuse"
                proxy.cut()
                await pool.fleet.lie_down()
                proxy.fault = "none"
                await asyncio.sleep(5 * own.probe_seconds)
                assert isinstance(worker.health, Quarantined) and "could not be paused" in worker.health.reason
                await pool.fleet.update(0, lambda client: client.update_from_disk(str(tiny_server.model), 0))
                await until(worker, Healthy)
                check_against(tiny_server.model, await pool.generate(PROMPT, SHORT, group="g"))

    asyncio.run(sleep())


def test_a_server_that_cannot_sleep_is_refused(tiny_server: TinyServer) -> None:
    async def ask(client: Client) -> ServerInfo:
        return await client.server_info()

    info = talk(tiny_server, ask)
    assert shortcomings(info, replace(DEMANDS, sleeps=True)) == []  # on a CPU it says that it did
    (problem,) = shortcomings(replace(info, sleeps=False), replace(DEMANDS, sleeps=True))
    assert "start it with --enable-memory-saver" in problem
    assert shortcomings(replace(info, sleeps=False), DEMANDS) == []
