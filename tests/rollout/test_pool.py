"""The pool on a real server: responses that live through updates, interruptions and cuts; who comes and goes; who may not."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.families import read_architecture
from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.client import Client, Sampling
from megatron_rl.rollout.errors import Refused
from megatron_rl.rollout.fleet import UpdateFailed
from megatron_rl.rollout.health import Healthy, Left, Outdated, Quarantined, Starting
from megatron_rl.rollout.pool import NoServer, Pool
from megatron_rl.rollout.replies import Generation
from megatron_rl.rollout.server import Server, free_ports
from megatron_rl.rollout.suitability import Demands, UnsuitableServer
from megatron_rl.rollout.worker import Worker
from tests.faults.proxy import Proxy
from tests.reference.tiny_checkpoint import tiny_tokenizer
from tests.rollout.talk import PROMPT, SECONDS, Watch, flush, reference_log_probs
from tests.servers import SHAPE, VOCABULARY, TinyServer, server_options

CLOSE = 1e-4  # log-probs in float32, by different kernels
DEMANDS = Demands("qwen3_moe", VOCABULARY, SHAPE)
PATIENT: dict[str, Any] = {"probe_seconds": 0.2, "answer_seconds": 5.0, "silence_seconds": 10.0, "piece": 4}


def decode(tokens: Sequence[int]) -> str:
    text: str = tiny_tokenizer().decode(list(tokens))
    return text


def with_pool[T](server: TinyServer, work: Callable[[Pool], Awaitable[T]], demands: Demands = DEMANDS, **settings: Any) -> T:
    """Run something on a pool that has the shared server, and leave that server as it was."""

    async def run() -> T:
        own = ServerSettings(**{"urls": (server.server.url,), **PATIENT, **settings})
        async with asyncio.timeout(SECONDS), Pool(own, demands, decode=decode) as pool:
            await pool.begin()
            try:
                return await work(pool)
            finally:
                async with server.client() as client:
                    await client.resume()
                    await client.update_from_disk(str(server.model), version=0)

    return asyncio.run(run())


async def talk_of_nothing(_: Pool) -> None:
    """Begin, and end."""


def check_against(model: Path, response: Generation, start: int = 0, stop: int | None = None) -> None:
    """The tokens start … stop of a response have the log-probs that transformers gives them with these weights."""
    expected = reference_log_probs(model, [*PROMPT, *response.tokens.tolist()])[len(PROMPT) :]
    np.testing.assert_allclose(response.log_probs[start:stop], expected[start:stop], atol=CLOSE)


def watch(pool: Pool) -> Watch:
    """Of the pool's one server."""
    (worker,) = pool.fleet.workers.values()
    return Watch(worker)


async def until(worker: Worker, health: type) -> None:
    while not isinstance(worker.health, health):
        await asyncio.sleep(0.02)


def test_many_responses_at_once(tiny_server: TinyServer) -> None:
    async def sample(pool: Pool) -> list[Generation]:
        sampling = Sampling(12, ignore_end=True)
        responses = await asyncio.gather(*(pool.generate(PROMPT, sampling, group=str(n // 4)) for n in range(40)))
        (worker,) = pool.fleet.workers.values()
        assert (worker.desk.requests, worker.desk.tokens, worker.attempts) == (0, 0, {})
        return responses

    responses = with_pool(tiny_server, sample, max_in_flight=6)
    assert all(len(response.tokens) == 12 and response.finish == "length" for response in responses)
    assert all(response.routing is not None and response.routing.shape == (18, 2, 2) for response in responses)
    assert len({response.tokens.tobytes() for response in responses}) > 30
    check_against(tiny_server.model, responses[7])


def test_a_response_goes_on_under_new_weights(tiny_server: TinyServer) -> None:
    """Old tokens have the log-probs of the old weights, new ones those of the new weights given what the old ones wrote."""

    async def update(pool: Pool) -> list[Generation]:
        sampling = Sampling(120, ignore_end=True)
        running = [asyncio.create_task(pool.generate(PROMPT, sampling, group="g")) for _ in range(3)]
        await watch(pool).until(3, 8)
        failed = await pool.fleet.update(1, lambda client: client.update_from_disk(str(tiny_server.other), 1))
        assert failed == {} and pool.fleet.version == 1
        return await asyncio.gather(*running)

    for response in with_pool(tiny_server, update):
        assert [span.version for span in response.spans] == [0, 1]
        assert (len(response.tokens), response.finish) == (120, "length")
        old = response.spans[0].length
        check_against(tiny_server.model, response, stop=old)
        check_against(tiny_server.other, response, start=old)
        assert response.routing is not None and len(response.routing) == len(PROMPT) + 120 - 1


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_response_lives_through_an_update(tiny_server: TinyServer, mode: str) -> None:
    async def update(pool: Pool) -> tuple[Generation, Generation]:
        running = asyncio.create_task(pool.generate(PROMPT, Sampling(120, ignore_end=True), group="g"))
        await watch(pool).until(1, 8)
        async with pool.fleet.paused(1) as paused:
            for client in paused.clients:
                await client.update_from_disk(str(tiny_server.other), 1)
        later = await pool.generate(PROMPT, Sampling(20, ignore_end=True), group="g")
        return await running, later

    response, later = with_pool(tiny_server, update, update=mode)
    check_against(tiny_server.other, later)  # the prompt is in the prefix cache, as the old weights saw it
    assert [span.version for span in response.spans] == [0, 1]
    old = response.spans[0].length
    check_against(tiny_server.model, response, stop=old)
    with pytest.raises(AssertionError):  # the very next token is not of the old weights any more
        check_against(tiny_server.model, response, start=old, stop=old + 1)


def test_interrupted_responses_come_back_as_they_are(tiny_server: TinyServer) -> None:
    async def interrupt(pool: Pool) -> tuple[Sequence[Generation], Generation]:
        sampling = Sampling(1000, ignore_end=True)
        running = [asyncio.create_task(pool.generate(PROMPT, sampling, group=str(n))) for n in range(6)]
        await watch(pool).until(4, 4)
        await pool.interrupt()
        cut = await asyncio.gather(*running)
        return cut, await pool.generate(PROMPT, Sampling(5, ignore_end=True), group="later")

    cut, later = with_pool(tiny_server, interrupt, max_in_flight=4)
    assert [response.finish for response in cut] == ["abort"] * 6
    assert [len(response.tokens) > 0 for response in cut] == [True] * 4 + [False] * 2  # two had not been given to the server
    assert all(len(response.tokens) < 1000 for response in cut)
    check_against(tiny_server.model, cut[0])
    assert len(later.tokens) == 5


def test_an_update_that_fails_leaves_no_server_at_work(tiny_server: TinyServer) -> None:
    """Its weights may be half of each version, whatever it reports; the next update mends it."""

    async def fail(pool: Pool) -> None:
        (worker,) = pool.fleet.workers.values()
        with pytest.raises(ZeroDivisionError):
            async with pool.fleet.paused(1) as update:
                await update.clients[0].update_from_disk(str(tiny_server.other), 1)
                raise ZeroDivisionError
        assert not worker.works and pool.fleet.version == 0
        await until(worker, Outdated)

        with pytest.raises(UpdateFailed, match=rf"No server took weights 1:\n  {worker.url}: .*update_weights_from_disk"):
            await pool.fleet.update(1, lambda client: client.update_from_disk("/nowhere/at/all", 1))
        await until(worker, Outdated)

        await pool.fleet.update(2, lambda client: client.update_from_disk(str(tiny_server.other), 2))
        assert isinstance(worker.health, Healthy)
        response = await pool.generate(PROMPT, Sampling(8, ignore_end=True), group="g")
        check_against(tiny_server.other, response)

    with_pool(tiny_server, fail)


def test_a_server_that_comes_late_gets_the_weights(tiny_server: TinyServer) -> None:
    async def join(pool: Pool) -> None:
        url = tiny_server.server.url
        pool.fleet.leave(url)
        await pool.fleet.update(5, lambda client: client.update_from_disk(str(tiny_server.other), 5))  # reaches nobody
        worker = pool.fleet.join(url)
        response = await pool.generate(PROMPT, Sampling(8, ignore_end=True), group="g")
        assert isinstance(worker.health, Healthy)
        assert [span.version for span in response.spans] == [5]
        check_against(tiny_server.other, response)

    with_pool(tiny_server, join)


def test_servers_come_and_go_with_the_file(tiny_server: TinyServer, tmp_path: Path) -> None:
    path = tmp_path / "urls"
    url = tiny_server.server.url

    async def elastic(pool: Pool) -> None:
        worker = pool.fleet.workers[url]
        running = asyncio.create_task(pool.generate(PROMPT, Sampling(100, ignore_end=True), group="g"))
        await asyncio.sleep(0.1)
        path.write_text("# nobody\n")
        while pool.fleet.workers:
            await asyncio.sleep(0.02)
        assert isinstance(worker.health, Left)
        assert len((await running).tokens) == 100  # what it worked on it finished
        path.write_text("no url\n")
        waiting = asyncio.create_task(pool.generate(PROMPT, Sampling(5, ignore_end=True), group="g"))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        path.write_text(f"{url}/  # back\n")
        assert len((await waiting).tokens) == 5

    path.write_text(f"\n{url}\n")
    with_pool(tiny_server, elastic, urls=(), urls_file=path)


@pytest.fixture(scope="module")
def model(tiny_server: TinyServer) -> Architecture:
    return read_architecture(tiny_server.model)


def test_who_cannot_sample_is_refused_with_a_fix(tiny_server: TinyServer, model: Architecture) -> None:
    demands = Demands.of(model, routing=True, longest=2000)
    assert demands == replace(DEMANDS, longest=2000, model=model)
    with_pool(tiny_server, talk_of_nothing, demands)
    for wrong, said in {
        replace(demands, family="llama"): "a qwen3_moe model; this run trains a llama model.*correct servers.urls",
        replace(demands, vocabulary=600): "has 512 tokens; the policy's has 600",
        replace(demands, longest=5000): r"takes 20\d\d tokens at most, samples may have 5000.*--context-length",
        replace(demands, seeded=True): "--enable-deterministic-inference",
        replace(demands, model=replace(model, hidden=128)): r"hidden of its model .* is 64; the policy's 128; start it with",
    }.items():
        with pytest.raises(UnsuitableServer, match=said):
            with_pool(tiny_server, talk_of_nothing, wrong)
    dead = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(UnsuitableServer, match=rf"{dead}.*Is an SGLang server running.*megatron-rl serve"):
        with_pool(tiny_server, talk_of_nothing, urls=(tiny_server.server.url, dead))


def test_what_is_refused_is_not_tried_again(tiny_server: TinyServer) -> None:
    async def too_long(pool: Pool) -> None:
        with pytest.raises(Refused, match="longer than the model's context"):
            await pool.generate(PROMPT * 500, Sampling(5), group="g")
        (worker,) = pool.fleet.workers.values()
        assert worker.works and worker.desk.requests == 0

    with_pool(tiny_server, too_long)


def test_nobody_waits_forever(tiny_server: TinyServer) -> None:
    async def outage(pool: Pool) -> None:
        pool.fleet.leave(tiny_server.server.url)
        with pytest.raises(NoServer, match=r"servers\.outage_seconds"):
            await pool.generate(PROMPT, Sampling(5), group="g")

    with_pool(tiny_server, outage, outage_seconds=0.5)


def test_a_server_that_starts_is_waited_for(tiny_server: TinyServer, tmp_path: Path) -> None:
    """Loading a large model again may take longer than servers may be away."""

    async def outage(pool: Pool) -> None:
        pool.fleet.leave(tiny_server.server.url)
        server = Server.start(server_options(tmp_path / "no-model", tmp_path / "log"))
        worker = pool.fleet._add(server.url, server)
        response = asyncio.create_task(pool.generate(PROMPT, Sampling(5), group="g"))
        await asyncio.wait([response], timeout=2.5)
        assert isinstance(worker.health, Starting) and not response.done()
        server.kill()
        with pytest.raises(NoServer, match=f"{server.url}: dead"):
            await response

    with_pool(tiny_server, outage, outage_seconds=0.5, restarts=0)


@asynccontextmanager
async def pool_behind_proxy(server: TinyServer, **settings: Any) -> AsyncIterator[tuple[Pool, Proxy]]:
    async with asyncio.timeout(SECONDS), Proxy(server.server.port) as proxy:
        own = ServerSettings(**{"urls": (proxy.url,), **PATIENT, **settings})
        async with Pool(own, DEMANDS) as pool:
            await pool.begin()
            yield pool, proxy


def test_a_response_that_was_cut_off_goes_on_from_its_tokens(tiny_server: TinyServer) -> None:
    """The tokens that were streamed before the cut are in the response: greedy, it is the same as without a cut."""

    async def cut() -> tuple[Generation, Generation, int]:
        async with pool_behind_proxy(tiny_server) as (pool, proxy):
            greedy = Sampling(200, temperature=0.0, ignore_end=True)
            whole = await pool.generate(PROMPT, greedy, group="g")
            seen = watch(pool)
            running = asyncio.create_task(pool.generate(PROMPT, greedy, group="g"))
            for _ in range(3):
                await seen.until(1, 8)
                proxy.cut()
            return whole, await running, len(seen.tokens)

    whole, resumed, requests = asyncio.run(cut())
    assert requests == 4
    assert resumed.tokens.tolist() == whole.tokens.tolist()
    np.testing.assert_allclose(resumed.log_probs, whole.log_probs, atol=CLOSE)
    assert resumed.routing is not None and len(resumed.routing) == len(PROMPT) + 200 - 1


def test_a_server_that_hangs_is_quarantined_and_comes_back(tiny_server: TinyServer) -> None:
    async def hang() -> None:
        async with pool_behind_proxy(tiny_server, answer_seconds=3.0, probes=1, silence_seconds=60.0) as (pool, proxy):
            (worker,) = pool.fleet.workers.values()
            running = asyncio.create_task(pool.generate(PROMPT, Sampling(150, ignore_end=True), group="g"))
            await asyncio.sleep(0.2)
            proxy.fault = "hang"
            await until(worker, Quarantined)
            proxy.fault = "none"
            proxy.cut()
            assert len((await running).tokens) == 150
            assert isinstance(worker.health, Healthy)

    asyncio.run(hang())


def test_a_response_is_cancelled_with_its_task(tiny_server: TinyServer) -> None:
    async def cancel(pool: Pool) -> None:
        sampling = Sampling(1500, ignore_end=True)
        running = [asyncio.create_task(pool.generate(PROMPT, sampling, group="g")) for _ in range(4)]
        await asyncio.sleep(0.3)
        for task in running:
            task.cancel()
        assert all(
            isinstance(ended, asyncio.CancelledError) for ended in await asyncio.gather(*running, return_exceptions=True)
        )
        (worker,) = pool.fleet.workers.values()
        assert (worker.desk.requests, worker.attempts, len(pool._queue)) == (0, {}, 0)
        await pool.generate(PROMPT, Sampling(300, ignore_end=True), group="g")
        async with Client(worker.url, VOCABULARY) as client:
            await flush(client)  # refused while any of the cancelled still runs

    with_pool(tiny_server, cancel, max_in_flight=2)


def test_generation_goes_through_a_router_and_nothing_else_does(tiny_server: TinyServer) -> None:
    """The server itself stands in for a router that passes everything to it, and a proxy counts what does."""
    demands = replace(DEMANDS, routing=None)

    async def route() -> tuple[list[Generation], Sequence[Generation]]:
        async with asyncio.timeout(SECONDS), Proxy(tiny_server.server.port) as proxy:
            settings = ServerSettings(**{**PATIENT, "urls": (tiny_server.server.url,), "router": proxy.url, "max_in_flight": 3})
            async with Pool(settings, demands) as pool:
                await pool.begin()
                (worker,) = pool.fleet.workers.values()
                sampling = Sampling(100, ignore_end=True)
                running = [asyncio.create_task(pool.generate(PROMPT, sampling, group=str(n))) for n in range(5)]
                router = pool.fleet.router
                assert router is not None
                seen = Watch(router)
                await seen.until(3, 8)
                assert not worker.attempts and len(router.attempts) == 3
                await pool.fleet.update(1, lambda client: client.set_version(1))
                whole = await asyncio.gather(*running)
                cut = [asyncio.create_task(pool.generate(PROMPT, replace(sampling, max_new_tokens=900), group="g"))]
                await seen.until(1, 8)
                await pool.interrupt()
                ended = await asyncio.gather(*cut)
                await worker.client.set_version(0)
                return whole, ended

    whole, ended = asyncio.run(route())
    assert all(len(response.tokens) == 100 for response in whole)
    assert [span.version for span in whole[0].spans] == [0, 1]
    assert ended[0].finish == "abort" and 0 < len(ended[0].tokens) < 900
    with pytest.raises(UnsuitableServer, match=r"servers\.router = .*drops the routing"):
        with_pool(tiny_server, talk_of_nothing, router=tiny_server.server.url)
    with pytest.raises(UnsuitableServer, match=r"/workers: no connection \(Connection refused\)"):
        with_pool(tiny_server, talk_of_nothing, demands, router=f"http://127.0.0.1:{free_ports(1)[0]}")
