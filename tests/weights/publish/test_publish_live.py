"""Publishing to real servers: every transport and every kind of pause, while 32 long requests are under way."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.server import Server, ServerOptions, start_servers
from megatron_rl.rollout.suitability import Demands, UnsuitableServer, inspect
from megatron_rl.train.publishing import publish_to_pool
from megatron_rl.weights.publish.files import MEMORY, PREFIX
from megatron_rl.weights.publish.ports import Target
from megatron_rl.weights.publish.publisher import Publisher
from megatron_rl.weights.publish.report import Report
from tests.parallel.cluster import Cluster
from tests.reference.tiny_checkpoint import write_served_checkpoint
from tests.rollout.talk import Watch
from tests.servers import SHAPE, VOCABULARY, TinyServer, server_options
from tests.weights.publish.live import (
    AT_ONCE,
    CLOSE,
    LONG,
    PROMPT_LENGTH,
    Load,
    Response,
    connect,
    log_probs,
    run,
    serves,
    settings_of,
    with_publisher,
)

WAYS = (("disk", "retract"), ("broadcast", "in_place"), ("tensor", "abort"))
DENSE_WAYS = (("disk", "abort"), ("broadcast", "retract"), ("tensor", "retract"))


@dataclass(frozen=True)
class More:
    """Two servers beside the shared one: a dense model without a prefix cache, and a twin of the shared server."""

    dense: Server
    dense_models: tuple[Path, Path]
    twin: Server


@pytest.fixture(scope="module")
def more(tiny_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[More]:
    folder = tmp_path_factory.mktemp("dense")
    models = (
        write_served_checkpoint(folder / "model", "qwen3", seed=2, num_hidden_layers=2),
        write_served_checkpoint(folder / "other", "qwen3", seed=3, num_hidden_layers=2),
    )
    plain = server_options(tiny_models[0], folder / "twin.log")
    arguments = {"max_total_tokens": 16384, "weight_version": "0", "disable_radix_cache": True}
    dense_options = ServerOptions(models[0], folder / "dense.log", arguments, device="cpu", threads=1, start_seconds=300)
    dense, twin = asyncio.run(start_servers([dense_options, plain]))
    with dense, twin:
        yield More(dense, models, twin)


@pytest.fixture(autouse=True)
def first_weights(tiny_server: TinyServer) -> Iterator[None]:
    """The shared server is left as it was."""
    yield

    async def put_back() -> None:
        async with tiny_server.client() as client:
            await client.resume()
            await client.update_from_disk(str(tiny_server.model), version=0)

    run(put_back())
    assert not list(MEMORY.glob(f"{PREFIX}*"))


def check_survivors(responses: list[Response], mode: str, old: Path, version: int, new: Path | None) -> None:
    """None lost: each is whole, or ended by the pause with what it had. None corrupted: tokens from before have the log-probs
    of the old weights; and where keys and values are computed anew (`new`), those from after have the new weights' own."""
    assert len(responses) == AT_ONCE
    sequences = [[*response.prompt, *response.tokens] for response in responses]
    before = log_probs(old, sequences)
    after = log_probs(new, sequences) if new is not None else before
    for response, olds, news in zip(responses, before, after, strict=True):
        finish, length = response.pieces[-1].finish, len(response.tokens)
        assert (finish, length) == ("length", LONG) if mode != "abort" else finish == "abort" and 0 < length < LONG
        assert {piece.version for piece in response.pieces} <= {version - 1, version}
        bound = response.before
        np.testing.assert_allclose(response.log_probs[:bound], olds[PROMPT_LENGTH : PROMPT_LENGTH + bound], atol=CLOSE)
        if new is not None and mode == "retract":
            assert bound < LONG
            # The piece in which the version changes may hold tokens of both.
            bound += next(len(piece.tokens) for piece in response.pieces if piece.version == version)
            np.testing.assert_allclose(response.log_probs[bound:], news[PROMPT_LENGTH + bound :], atol=CLOSE)


@pytest.mark.parametrize(("way", "mode"), WAYS)
def test_requests_live_through_a_publish(way: str, mode: str, tiny_server: TinyServer) -> None:
    url, load = tiny_server.server.url, Load(seed=0)

    async def work(publisher: Publisher) -> None:
        report = await publisher.publish(1, [Target(url)])
        assert report.way == way and report.serving == (url,) and report.failures == ()
        check_survivors(load.finished, mode, tiny_server.model, 1, None)
        assert (await publisher.publish(1, [Target(url)])).outcomes[0].result == "current"

    with_publisher(tiny_server.other, work, load.connect, publish={"transport": way}, servers={"update": mode})
    run(serves(url, tiny_server.other, 1))


def test_a_dense_server_and_tokens_of_new_weights(more: More) -> None:
    """Without a prefix cache a retracted request computes all anew: what it samples afterwards is the new weights' own."""
    url, (old, new) = more.dense.url, more.dense_models
    for version, (way, mode) in enumerate(DENSE_WAYS, 1):
        load = Load(seed=version)

        async def work(publisher: Publisher, version: int = version) -> None:
            report = await publisher.publish(version, [Target(url)])
            assert report.serving == (url,), report.failures

        with_publisher(new, work, load.connect, publish={"transport": way}, servers={"update": mode})
        check_survivors(load.finished, mode, old, version, new)
        run(serves(url, new, version))
        old, new = new, old


def test_a_server_that_returns_no_routing_is_refused_where_replay_asks_for_it(more: More) -> None:
    async def meet() -> None:
        async with connect(more.dense.url) as client:
            with pytest.raises(
                UnsuitableServer, match=r"does not return routing.* start it with --enable-return-routed-experts"
            ):
                await inspect(client, Demands("qwen3", VOCABULARY, SHAPE))

    run(meet())


def test_a_pool_of_servers_goes_on_with_every_response(tiny_server: TinyServer) -> None:
    """The pool pauses its servers and asks again for what the pause ended; each token has the version that sampled it."""

    async def work(publisher: Publisher) -> None:
        settings = ServerSettings(urls=(tiny_server.server.url,), piece=4, probe_seconds=0.5)
        async with Pool(settings, Demands("qwen3_moe", VOCABULARY, SHAPE)) as pool:
            await pool.begin()
            generator = np.random.default_rng(0)
            prompts = [generator.integers(0, VOCABULARY, PROMPT_LENGTH).tolist() for _ in range(8)]
            sampling = Sampling(max_new_tokens=LONG, ignore_end=True)
            (worker,) = pool.fleet.workers.values()
            seen = Watch(worker)
            requests = [asyncio.create_task(pool.generate(prompt, sampling, group=str(i))) for i, prompt in enumerate(prompts)]
            await seen.until(len(requests), 4)
            report = await publish_to_pool(publisher, 1, pool)
            assert report.serving == (tiny_server.server.url,) and pool.fleet.version == 1
            for prompt, response in zip(prompts, await asyncio.gather(*requests), strict=True):
                assert [span.version for span in response.spans] == [0, 1] and len(response.tokens) == LONG
                first = response.spans[0].length
                sequence = [*prompt, *response.tokens.tolist()]
                expected = [log_probs(model, [sequence])[0][PROMPT_LENGTH:] for model in (tiny_server.model, tiny_server.other)]
                np.testing.assert_allclose(response.log_probs[:first], expected[0][:first], atol=CLOSE)
                np.testing.assert_allclose(response.log_probs[first:], expected[1][first:], atol=CLOSE)

    with_publisher(tiny_server.other, work)


@pytest.mark.parametrize(
    ("layout", "way"), [({"tensor": 2}, "broadcast"), ({"expert": 2}, "disk"), ({"pipeline": 2}, "tensor")]
)
def test_several_ranks(layout: dict[str, int], way: str, tiny_server: TinyServer, cluster: Cluster) -> None:
    """Spread over ranks, the same weights arrive; and the ranks' own log-probs agree with the server's."""
    settings = settings_of(tiny_server.other, {"transport": way}, layout=layout)
    reports: list[Report] = cluster.run(
        "tests.parallel.publish_jobs:publish", 2, settings=settings, version=3, urls=[tiny_server.server.url]
    )
    assert reports[0] == reports[1] or reports[0].outcomes == reports[1].outcomes
    (outcome,) = reports[0].outcomes
    assert outcome.result == "updated" and outcome.difference is not None and outcome.difference < CLOSE

    run(serves(tiny_server.server.url, tiny_server.other, 3))


def test_the_command(tiny_server: TinyServer) -> None:
    url = tiny_server.server.url
    result = CliRunner().invoke(app, ["publish", str(tiny_server.other), "--server", url, "--bucket-mb", "1"])
    assert result.exit_code == 0, result.output
    assert "updated" in result.output and "by disk" in result.output

    run(serves(url, tiny_server.other, 1))  # one above the server's own
    result = CliRunner().invoke(app, ["publish", str(tiny_server.other), "--server", url, "--server", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "updated" in result.output and "All connection attempts failed" in result.output


def test_a_server_killed_on_the_way(more: More, tiny_server: TinyServer, cluster: Cluster, tmp_path: Path) -> None:
    """Two ranks send to two servers; one is killed in the middle. The other goes on; the first gets all when it is back."""
    twin, first = more.twin, tiny_server.server

    settings = settings_of(tiny_server.other, {"transport": "broadcast", "senders": 2}, layout={"tensor": 2})
    job = partial(cluster.run, "tests.parallel.publish_jobs:publish", 2, settings=settings, urls=[first.url, twin.url])
    (pid,) = (int(line.split()[0]) for line in Path(f"/proc/{twin.pid}/task/{twin.pid}/children").read_text().splitlines())
    report: Report = job(version=1, kill=(pid, 3, 1))[0]
    outcomes = {outcome.url: outcome for outcome in report.outcomes}
    assert outcomes[first.url].result == "updated" and report.serving == (first.url,)
    assert outcomes[twin.url].result == "lost"
    assert report.failures == (f"{twin.url} (lost): {outcomes[twin.url].failure}",)
    assert "could not be reached" in report.failures[0]
    run(serves(first.url, tiny_server.other, 1))
    again = Server.start(twin.options, int(twin.url.rsplit(":", 1)[1]))
    with again:
        asyncio.run(again.ready())
        late: Report = job(version=1, known=[first.url])[0]
        assert {outcome.url: outcome.result for outcome in late.outcomes} == {first.url: "current", again.url: "updated"}
        run(serves(again.url, tiny_server.other, 1))
