"""Whatever fails on the way, and whenever: a server is left with whole weights and at work, or put aside."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.client import Client, Sampling
from megatron_rl.rollout.errors import Unreachable
from megatron_rl.rollout.health import Healthy, Outdated
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.suitability import Demands
from megatron_rl.train.publishing import publish_to_pool
from megatron_rl.weights.publish.errors import WrongWeights
from megatron_rl.weights.publish.files import PREFIX
from megatron_rl.weights.publish.ports import Target
from megatron_rl.weights.publish.publisher import Publisher
from tests.servers import SHAPE, VOCABULARY, TinyServer
from tests.weights.publish.live import CLOSE, connect, log_probs, run, serves, with_publisher

When = Literal["before", "after", "from then on"]
CONTROL = (
    "join_group",
    "pause",
    "update_from_distributed",
    "update_from_disk",
    "set_version",
    "flush_cache",
    "resume",
    "leave_group",
)
SHORT = {"probe_sequences": 1, "probe_tokens": 16}  # that many a probe, of which there are many here
TOKENS = [7, 300, 41, 5, 99, 120, 8]


class Fault:
    """The n-th control call fails: before the server hears of it, after it has done it, or like all that follow."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.at: int | None = None
        self.when: When = "before"

    def connect(self, url: str) -> Client:
        client = Client(url, VOCABULARY)
        for name in CONTROL:
            setattr(client, name, partial(self._call, name, getattr(client, name)))
        return client

    async def _call(self, name: str, call: Callable[..., Awaitable[None]], *arguments: Any, **options: Any) -> None:
        self.calls.append(name)
        number = len(self.calls) - 1
        fails = number == self.at or (self.when == "from then on" and self.at is not None and number > self.at)
        if fails and self.when != "after":
            raise Unreachable("the wire", name, "cut before")
        await call(*arguments, **options)
        if fails:
            raise Unreachable("the wire", name, "cut after")


@pytest.fixture(autouse=True)
def first_weights(tiny_server: TinyServer) -> Iterator[None]:
    yield
    run(put_back(tiny_server))


async def put_back(tiny_server: TinyServer) -> None:
    async with tiny_server.client() as client:
        await client.resume()
        await client.update_from_disk(str(tiny_server.model), version=0)


async def assert_put_aside(url: str) -> None:
    """It answers, and generates for nobody until it is told to."""
    async with connect(url) as client:
        request = asyncio.create_task(client.generate(TOKENS, Sampling(max_new_tokens=1)))
        assert (await client.server_info()).sglang
        await asyncio.wait([request], timeout=0.2)
        assert not request.done()
        await client.resume()
        await request


@pytest.mark.parametrize("when", ["before", "after", "from then on"])
@pytest.mark.parametrize("way", ["broadcast", "disk"])
def test_a_call_that_fails(way: str, when: When, tiny_server: TinyServer) -> None:
    url, fault = tiny_server.server.url, Fault()
    old, new = (log_probs(model, [TOKENS])[0] for model in (tiny_server.model, tiny_server.other))
    seen: set[str] = set()

    async def work(publisher: Publisher) -> None:
        await publisher.publish(1, [Target(url)])  # none fails: which calls there are
        calls = list(fault.calls)
        assert calls.count("pause") == calls.count("resume") == 1 and set(calls) <= set(CONTROL)
        fault.when = when
        for number, name in enumerate(calls):
            await put_back(tiny_server)
            fault.calls, fault.at = [], number
            report = await publisher.publish(2 + number, [Target(url)])
            (outcome,) = report.outcomes
            assert outcome.failure is not None and "cut" in outcome.failure, name
            assert report.serving == ()
            seen.add(outcome.result)
            changed = calls.index("pause") + (1 if when == "before" else 0) < number or "update" in name
            if outcome.result == "unchanged":
                assert not changed, name
                async with connect(url) as client:
                    np.testing.assert_allclose(await client.score(TOKENS), old, atol=CLOSE)
                    assert (await client.model_info()).version == 0
            elif outcome.result == "quarantined":
                assert changed, name
                await assert_put_aside(url)
            else:
                assert outcome.result == "lost" and when == "from then on", name
        await put_back(tiny_server)
        fault.at = None
        report = await publisher.publish(99, [Target(url)])  # what failed before is whole again
        assert report.serving == (url,)
        async with connect(url) as client:
            np.testing.assert_allclose(await client.score(TOKENS), new, atol=CLOSE)

    mode = "abort" if way == "broadcast" else "in_place"
    publish = {"transport": way, "bucket_bytes": 400_000 if when == "before" else 700_000, **SHORT}  # two buckets, or one
    with_publisher(tiny_server.other, work, fault.connect, publish=publish, servers={"update": mode})
    assert ("lost" if when == "from then on" else "quarantined") in seen


def test_a_pool_hears_which_server_failed(tiny_server: TinyServer) -> None:
    """It was held by the pool, which puts it aside; when the wire is whole again it is brought up to date."""
    url, fault = tiny_server.server.url, Fault()

    async def work(publisher: Publisher) -> None:
        settings = ServerSettings(urls=(url,), probe_seconds=0.2)
        async with Pool(settings, Demands("qwen3_moe", VOCABULARY, SHAPE)) as pool:
            await pool.begin()
            (worker,) = pool.fleet.workers.values()
            fault.at = 0  # the update itself: pausing is the pool's
            for version in (0, 1):  # also one that it says it has
                fault.calls, fault.at = [], 0
                report = await publish_to_pool(publisher, version, pool)
                assert report.serving == () and "cut before" in report.failures[0]
                assert not worker.works and pool.fleet.version == version
                fault.at = None
                while not isinstance(worker.health, Healthy | Outdated):
                    await asyncio.sleep(0.05)
                assert isinstance(worker.health, Outdated)
                report = await publish_to_pool(publisher, version, pool)
                assert report.serving == (url,) and isinstance(worker.health, Healthy)

    with_publisher(tiny_server.other, work, fault.connect, publish={"transport": "disk"})
    run(serves(url, tiny_server.other, 1))


def test_a_server_that_began_anew_gets_everything(tiny_server: TinyServer, tmp_path: Path) -> None:
    """Whatever version it has, and has got before: as one that was started again has the number of the first weights.

    What another process died over is removed before there is anything to publish.
    """
    url = tiny_server.server.url
    dead = tmp_path / f"{PREFIX}.{socket.gethostname()}.{2**22 + 1}.3"  # above the largest process id
    dead.mkdir()

    async def work(publisher: Publisher) -> None:
        assert not dead.exists()
        results = []
        for anew in (False, False, True):
            report = await publisher.publish(0, [Target(url, anew=anew)])
            results += [outcome.result for outcome in report.outcomes]
        assert results == ["updated", "current", "updated"]

    with_publisher(tiny_server.other, work, publish={"transport": "disk", "folder": tmp_path})


class Corrupting(Client):
    """A link that spoils one tensor, once."""

    spoiled = False

    async def update_from_tensors(self, tensors: Mapping[str, Tensor], version: int, tensor_parallel: int = 1) -> None:
        name = "model.layers.1.self_attn.k_proj.weight"
        if name in tensors and not self.spoiled:
            self.spoiled = True
            tensors = {**tensors, name: torch.flip(tensors[name], [0])}
        await super().update_from_tensors(tensors, version, tensor_parallel)


def test_a_tensor_that_arrives_wrong_is_named_and_ends_the_run(tiny_server: TinyServer) -> None:
    url = tiny_server.server.url

    async def work(publisher: Publisher) -> None:
        expected = r"log-probs differ .* model\.layers\.\*\.self_attn\.k_proj\.weight had not arrived as it was sent"
        with pytest.raises(WrongWeights, match=expected):
            await publisher.publish(1, [Target(url)])
        await assert_put_aside(url)

    with_publisher(tiny_server.other, work, lambda url: Corrupting(url, VOCABULARY), publish={"transport": "tensor", **SHORT})


def test_a_policy_that_computes_otherwise_is_told_apart_from_a_bad_link(tiny_server: TinyServer) -> None:
    async def work(publisher: Publisher) -> None:
        score = publisher.score
        assert score is not None

        def shifted(sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
            return [values - np.float32(0.3) for values in score(sequences)]

        publisher.score = shifted
        with pytest.raises(WrongWeights, match="Every kind of tensor, sent again, changes nothing"):
            await publisher.publish(1, [Target(tiny_server.server.url)])

    with_publisher(tiny_server.other, work, publish=SHORT)


def test_versions_count_upwards(tiny_server: TinyServer) -> None:
    async def work(publisher: Publisher) -> None:
        await publisher.publish(5, [Target(tiny_server.server.url)])
        with pytest.raises(ValueError, match="version 4 cannot follow 5"):
            await publisher.publish(4, [])
        nobody = await publisher.publish(6, [Target("http://127.0.0.1:9")])
        assert nobody.outcomes[0].result == "unreachable" and nobody.serving == () and nobody.way is None

    with_publisher(tiny_server.other, work, publish={"probe": False})
    run(serves(tiny_server.server.url, tiny_server.other, 5))


def test_kept_files_bring_a_late_server_to_the_version(tiny_server: TinyServer) -> None:
    url = tiny_server.server.url

    async def work(publisher: Publisher) -> None:
        assert publisher.kept(1) is None
        await publisher.publish(1, [Target(url)])
        await put_back(tiny_server)  # as a server that was started anew
        load = publisher.kept(1)
        assert load is not None
        async with connect(url) as client:
            await client.pause("abort")
            await load(client)
            await client.resume()
        await serves(url, tiny_server.other, 1)
        publisher.forget_files()
        assert publisher.kept(1) is None

    with_publisher(tiny_server.other, work, publish={"transport": "disk", "keep_files": True})
