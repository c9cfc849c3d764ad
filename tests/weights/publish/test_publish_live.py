"""Publishing to real servers: every transport and every kind of pause, while 32 long requests are under way."""

import asyncio
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.rollout.replies import Generation
from megatron_rl.rollout.server import Server, ServerOptions, free_ports
from megatron_rl.rollout.suitability import Demands, UnsuitableServer, inspect
from megatron_rl.weights.convert import Conversion, convert
from megatron_rl.weights.publish.files import MEMORY, PREFIX
from megatron_rl.weights.publish.ports import Target
from megatron_rl.weights.publish.publisher import Publisher
from megatron_rl.weights.publish.report import Report
from tests.parallel.cluster import Cluster
from tests.parallel.publish_jobs import ENDURING, Survived, Victim
from tests.reference.tiny_checkpoint import write_served_checkpoint
from tests.servers import SHAPE, VOCABULARY, TinyServer, read, server_options
from tests.weights.publish.live import (
    AT_ONCE,
    CLOSE,
    KEY,
    PROMPT_LENGTH,
    Load,
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
    """Two servers beside the shared one: a dense model without a prefix cache, begun with random weights as a policy's servers
    are that begins so, and a twin of the shared server."""

    dense: Server
    dense_models: tuple[Path, Path]
    twin: Server

    async def ready(self) -> None:
        await asyncio.gather(self.dense.ready(), self.twin.ready())
        async with connect(self.dense.url) as client:
            await client.update_from_disk(str(self.dense_models[0]), version=0)


@pytest.fixture(scope="module", autouse=True)
def starting(tiny_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[More]:
    """They start, which takes half a minute, while the first tests run."""
    folder = tmp_path_factory.mktemp("dense")
    models = (
        write_served_checkpoint(folder / "model", "qwen3", seed=2, num_hidden_layers=2),
        write_served_checkpoint(folder / "other", "qwen3", seed=3, num_hidden_layers=2),
    )
    arguments = {"max_total_tokens": 65536, "weight_version": "0", "disable_radix_cache": True, "load_format": "dummy"}
    dense_options = ServerOptions(
        models[0], folder / "dense.log", arguments, api_key=KEY, device="cpu", threads=1, start_seconds=300
    )
    first, second = free_ports(2)
    with (
        Server.start(dense_options, first) as dense,
        Server.start(server_options(tiny_models[0], folder / "twin.log"), second) as twin,
    ):
        yield More(dense, models, twin)


@pytest.fixture(scope="module")
def more(starting: More) -> More:
    asyncio.run(starting.ready())
    return starting


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


def check_survivors(load: Load, mode: str, old: Path, version: int, new: Path | None) -> None:
    """None lost: each is whole, or ended by the pause with what it had. None corrupted: tokens from before have the log-probs
    of the old weights; and where keys and values are computed anew (`new`), those from after have the new weights' own."""
    responses, long = load.finished, load.length
    assert len(responses) == AT_ONCE
    sequences = [[*response.prompt, *response.tokens] for response in responses]
    before = log_probs(old, sequences)
    after = log_probs(new, sequences) if new is not None else before
    for response, olds, news in zip(responses, before, after, strict=True):
        finish, length = response.pieces[-1].finish, len(response.tokens)
        assert (finish, length) == ("length", long) if mode != "abort" else finish == "abort" and 0 < length < long
        assert {piece.version for piece in response.pieces} <= {version - 1, version, None}  # None: see protocol.UNFINISHED
        bound = response.before
        assert mode == "abort" or bound < long  # it was under way: an update that waits for its end would be no update of it
        np.testing.assert_allclose(response.log_probs[:bound], olds[PROMPT_LENGTH : PROMPT_LENGTH + bound], atol=CLOSE)
        if new is not None and mode == "retract":
            # The piece in which the version changes may hold tokens of both.
            bound += next(len(piece.tokens) for piece in response.pieces if piece.version == version)
            np.testing.assert_allclose(response.log_probs[bound:], news[PROMPT_LENGTH + bound :], atol=CLOSE)


@pytest.mark.parametrize(("way", "mode"), WAYS)
def test_requests_live_through_a_publish(way: str, mode: str, tiny_server: TinyServer) -> None:
    url, load = tiny_server.server.url, Load(seed=0)

    async def work(publisher: Publisher) -> None:
        report = await publisher.publish(1, [Target(url)])
        assert report.way == way and report.serving == (url,) and report.failures == ()
        check_survivors(load, mode, tiny_server.model, 1, None)
        assert (await publisher.publish(1, [Target(url)])).outcomes[0].result == "current"

    with_publisher(tiny_server.other, work, load.connect, publish={"transport": way}, servers={"update": mode})
    run(serves(url, tiny_server.other, 1))


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


def test_the_command(tiny_server: TinyServer, tmp_path: Path) -> None:
    url = tiny_server.server.url
    dense = write_served_checkpoint(tmp_path / "dense", "qwen3", seed=0, num_hidden_layers=2)
    result = CliRunner().invoke(app, ["publish", str(dense), "--server", url])
    assert result.exit_code == 2 and "Publish a checkpoint of the model that it serves" in result.stderr

    result = CliRunner().invoke(app, ["publish", str(tiny_server.other), "--server", url, "--bucket-mb", "1"])
    assert result.exit_code == 0, result.output
    assert "updated" in result.output and "by disk" in result.output

    run(serves(url, tiny_server.other, 1))  # one above the server's own
    servers = ["--server", url, "--server", "http://127.0.0.1:9"]
    result = CliRunner().invoke(app, ["publish", str(tiny_server.other), *servers, "--version", "40"])
    assert result.exit_code == 1
    assert "updated" in result.output and "no connection (Connection refused)" in result.output

    convert(Conversion(tiny_server.model, tmp_path / "converted", "megatron"))
    result = CliRunner().invoke(app, ["publish", str(tmp_path / "converted"), "--server", url, "--transport", "broadcast"])
    assert result.exit_code == 0, result.output
    run(serves(url, tiny_server.model, 41))  # these weights are of no step either


def test_a_server_with_a_key_answers_nobody_without(more: More) -> None:
    """And tells nobody: its key is in no command line, no environment, and starred out of its log."""
    for path in ("/generate", "/pause_generation", "/update_weights_from_disk", "/update_weights_from_tensor"):
        for headers in ({}, {"Authorization": "Bearer another"}):
            assert httpx.post(more.dense.url + path, json={}, headers=headers, trust_env=False).status_code == 401
    assert httpx.get(f"{more.dense.url}/server_info", trust_env=False).status_code == 401
    known = [
        file for name in ("cmdline", "environ") for file in Path("/proc").glob(f"[0-9]*/{name}") if KEY.encode() in read(file)
    ]
    log = more.dense.options.log
    assert known == [] and [path.name for path in log.parent.glob("dense*") if path.suffix != ".log"] == []
    assert "api_key=" in log.read_text() and KEY not in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_dense_server_and_tokens_of_new_weights(more: More) -> None:
    """Without a prefix cache a retracted request computes all anew: what it samples afterwards is the new weights' own."""
    url, (old, new) = more.dense.url, more.dense_models
    for version, (way, mode) in enumerate(DENSE_WAYS, 1):
        load = Load(seed=version)

        async def work(publisher: Publisher, version: int = version) -> None:
            report = await publisher.publish(version, [Target(url)])
            assert report.serving == (url,), report.failures

        with_publisher(new, work, load.connect, publish={"transport": way}, servers={"update": mode})
        check_survivors(load, mode, old, version, new)
        run(serves(url, new, version))
        old, new = new, old
    # Else each publish that empties the cache would wait half a second for a collection of garbage.
    assert "Freezing GC in Scheduler" in more.dense.options.log.read_text()


def test_a_server_that_returns_no_routing_is_refused_where_replay_asks_for_it(more: More) -> None:
    async def meet() -> None:
        async with connect(more.dense.url) as client:
            with pytest.raises(
                UnsuitableServer, match=r"does not return routing.* start it with --enable-return-routed-experts"
            ):
                await inspect(client, Demands("qwen3", VOCABULARY, SHAPE))

    run(meet())


def test_a_server_killed_in_the_middle_of_a_publish(more: More, tiny_server: TinyServer, cluster: Cluster) -> None:
    """A pool of two servers, a rank sending to each, requests under way on both; one is killed with -9 after three buckets.

    The other goes on with the new weights and finishes all requests. The dead one, started again, gets no work until the next
    publish has brought it the weights too.
    """
    twin, survivor, new = more.twin, tiny_server.server.url, tiny_server.other
    settings = settings_of(new, {"transport": "broadcast", "senders": 2}, layout={"tensor": 2})
    (pid,) = (int(line.split()[0]) for line in Path(f"/proc/{twin.pid}/task/{twin.pid}/children").read_text().splitlines())
    seen: Survived = cluster.run(
        "tests.parallel.publish_jobs:publish_while_a_server_dies",
        2,
        settings=settings,
        survivor=survivor,
        victim=Victim(twin.options, twin.url, pid, bucket=3),
        demands=Demands("qwen3_moe", VOCABULARY, SHAPE),
    )[0]
    during = {outcome.url: outcome.result for outcome in seen.during.outcomes}
    assert during == {survivor: "updated", twin.url: "dropped"} and seen.during.serving == (survivor,)
    (failure,) = seen.during.failures
    broken = (
        r"(/update_weights_from_distributed: \S|: the broadcast of weights to it broke off: \S)"  # whichever is noticed first
    )
    assert re.match(rf"{twin.url} \(dropped\): {twin.url}{broken}", failure), failure
    assert seen.version == 1 and seen.health == {survivor: "healthy", twin.url: "quarantined"}
    after = {outcome.url: outcome.result for outcome in seen.after.outcomes}
    assert after == {survivor: "current", twin.url: "updated"} and seen.after.failures == ()
    for response, late in zip(seen.responses, seen.late, strict=True):
        assert versions(response) in ([0], [0, 1], [1]) and versions(late) == [1]
    assert any(versions(response) == [0, 1] for response in seen.responses)
    check_tokens(seen.prompts, seen.responses, tiny_server.model, new)
    check_tokens(seen.prompts, seen.late, tiny_server.model, new)


def versions(response: Generation) -> list[int]:
    return [span.version for span in response.spans if span.version is not None]


def check_tokens(prompts: list[list[int]], responses: list[Generation], old: Path, new: Path) -> None:
    """All are there; those from before version 1 have the old weights' log-probs, the others the new ones'."""
    sequences = [[*prompt, *response.tokens.tolist()] for prompt, response in zip(prompts, responses, strict=True)]
    for response, before, after in zip(responses, log_probs(old, sequences), log_probs(new, sequences), strict=True):
        assert len(response.tokens) == ENDURING
        first = sum(span.length for span in response.spans if span.version != 1)
        expected = [*before[PROMPT_LENGTH:][:first], *after[PROMPT_LENGTH + first :]]
        np.testing.assert_allclose(response.log_probs, expected, atol=CLOSE)
