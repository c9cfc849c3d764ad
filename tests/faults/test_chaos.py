"""Two real servers, and everything that can happen to a server while they sample: each group is finished exactly once.

One server is the shared one behind a proxy that refuses, garbles, truncates, trickles, hangs and cuts, and that leaves the pool
and joins again. The other is a process of the pool's own that is frozen (SIGSTOP), and killed (-9) and started again. The
tokens are judged by transformers: one that was lost, doubled or invented would not have its log-prob.

Each training step meets one fault, in its middle and until it is noticed, so that fast machines are struck as well.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.rollout.bank.writer import Bank
from megatron_rl.rollout.client import Client, Sampling
from megatron_rl.rollout.collector import Collector, Plan
from megatron_rl.rollout.health import Dead, Quarantined
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.replies import Span
from megatron_rl.rollout.server import Server
from megatron_rl.rollout.session import Kept
from megatron_rl.rollout.strategies.base import Floor, Limits
from megatron_rl.rollout.strategies.grouped import Grouped
from megatron_rl.rollout.suitability import Demands
from megatron_rl.rollout.worker import Worker
from megatron_rl.types import Prompt, Segment
from tests.faults.proxy import Proxy
from tests.reference.tiny_checkpoint import saved_tokenizer
from tests.rollout.scripted import Grader
from tests.servers import SHAPE, VOCABULARY, TinyServer, server_options

STRIKES = ("garbage", "freeze", "kill", "refuse", "truncate", "trickle", "hang", "cut", "leave", "leave it alone")
GROUPS, SIZE, NEW = 20, 4, 12  # groups of a step, responses of a group, tokens of a response
CLOSE = 1e-4  # log-probs in float32, by different kernels
SECONDS = 420.0  # far above what it takes: a hang fails


class Prompts:
    def at(self, draw: int) -> Prompt:
        return Prompt(f"p{draw}", np.random.default_rng(draw).integers(3, VOCABULARY, 6 + draw % 7))


def server_session(server: Server | None) -> int:
    """The process group of a server with its children: that of the keeper's one child."""
    assert server is not None
    (child,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return int(child)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def strike(how: str, pool: Pool, proxy: Proxy, own: Worker) -> None:
    """One fault, from a moment when its server is at work until the pool has noticed it."""
    other = pool.fleet.workers[proxy.url]
    await until(lambda: (own if how in ("freeze", "kill", "leave it alone") else other).works)
    match how:
        case "freeze":
            session = server_session(own.server)
            os.killpg(session, signal.SIGSTOP)
            await until(lambda: not own.works)
            os.killpg(session, signal.SIGCONT)
        case "kill":
            os.killpg(server_session(own.server), signal.SIGKILL)
            await until(lambda: not own.works)
        case "leave":
            pool.fleet.leave(proxy.url)
            await until(lambda: not other.attempts)
            pool.fleet.join(proxy.url)
        case "leave it alone":
            proxy.fault = "refuse"
            proxy.cut()
        case "cut":
            proxy.cut()
        case "refuse" | "garbage" | "truncate" | "hang":
            proxy.fault = how
            if how == "refuse":
                proxy.cut()
            await until(lambda: isinstance(other.health, Quarantined) if how == "hang" else not other.works)
            proxy.fault = "none"
            if how == "hang":
                proxy.cut()
        case "trickle":
            enough = proxy.spoilt + 20
            proxy.fault = how
            await until(lambda: proxy.spoilt > enough)
            proxy.fault = "none"


async def nights(pool: Pool, proxy: Proxy, own: Worker) -> None:
    """All servers sleep, as beside a trainer on the same GPUs. One that dies asleep is not started before the others wake."""
    other = pool.fleet.workers[proxy.url]
    proxy.fault = "none"
    await until(lambda: own.works and other.works)
    await pool.fleet.lie_down()
    assert own.client.asleep == other.client.asleep == {"weights", "kv_cache", "cuda_graph"}
    async with pool.fleet.paused(1) as update:
        # Ours ends with us. Of another nobody may find weights without a cache, so that it has woken whole.
        assert own.client.asleep == {"kv_cache", "cuda_graph"} and not other.client.asleep
        await asyncio.gather(*(client.set_version(1) for client in update.clients))
    assert own.works and other.works and not own.client.asleep
    assert (await own.client.generate([1, 2, 3], Sampling(2, ignore_end=True))).spans == (Span(1, 2),)

    await pool.fleet.lie_down()
    own.restarts = 0
    os.killpg(server_session(own.server), signal.SIGKILL)
    await until(lambda: isinstance(own.health, Dead))
    await asyncio.sleep(2.0)  # it would be started again after one
    assert isinstance(own.health, Dead) and own.restarts == 0
    assert await pool.fleet.update(2, lambda client: client.set_version(2)) == {}
    await until(lambda: own.restarts == 1)
    assert other.works
    await other.client.set_version(0)


async def sample_all(shared: TinyServer, folder: Path) -> int:
    """Sample every step into the bank, and strike in each; returns how often the own server was started again."""
    settings = ServerSettings(
        probe_seconds=0.2, answer_seconds=3.0, silence_seconds=30.0, probes=1, piece=4, tries=100, max_in_flight=24, restarts=20
    )
    dice, loaded = random.Random(5), Counter[str]()

    async def load(client: Client) -> None:
        loaded[client.url] += 1
        await client.set_version(0)

    async with (
        asyncio.timeout(SECONDS),
        Proxy(shared.server.port, seed=3) as proxy,
        Pool(settings, Demands("qwen3_moe", VOCABULARY, SHAPE)) as pool,
    ):
        await pool.begin([server_options(shared.model, folder / "own.log")])
        (own,) = pool.fleet.workers.values()
        await pool.fleet.update(0, load)
        pool.fleet.join(proxy.url)
        with Bank(folder / "bank") as bank:
            floor = Floor(pool, Grader(), Sampling(NEW, ignore_end=True), Limits(NEW, 200))
            kept = Kept(bank, saved_tokenizer(), texts=False)
            sampler = Collector(Prompts(), Grouped(SIZE), floor, kept, Plan(GROUPS))
            for step, how in enumerate(STRIKES):
                sampler.updated(step)
                collecting = asyncio.create_task(sampler.collect(step))
                moment = dice.randrange(GROUPS // 2)
                await until(lambda step=step, moment=moment: len(bank.waiting(step)) >= moment)  # type: ignore[misc]
                await strike(how, pool, proxy, own)
                assert len((await collecting).keys) == GROUPS
            assert bank.waiting() == bank.carried() == []
        # Started again it says that it has version 0, and has lost what it was brought as such.
        assert loaded[own.url] >= 2
        assert all(worker.desk.requests == 0 and not worker.attempts for worker in pool.fleet.workers.values())
        restarts = own.restarts
        await nights(pool, proxy, own)
        return restarts


def test_every_group_is_finished_exactly_once(tiny_server: TinyServer, tmp_path: Path) -> None:
    assert asyncio.run(sample_all(tiny_server, tmp_path)) >= 1  # it was killed, and did all the work of the last step
    reader = BankReader(tmp_path / "bank")
    groups = [group for step in reader.steps() for group in reader.step(step).groups()]
    assert sorted(group.key for group in groups) == sorted(f"p{draw}@{draw}" for draw in range(GROUPS * len(STRIKES)))
    model = AutoModelForCausalLM.from_pretrained(tiny_server.model, dtype=torch.float32).eval()
    for group in groups:
        start = len(group.prompt.tokens)
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in group.samples]))
        assert tokens.shape == (SIZE, start + NEW) and (tokens[:, :start].numpy() == group.prompt.tokens).all()
        with torch.no_grad():
            log_probs = model(tokens).logits[:, :-1].log_softmax(-1)  # [samples, tokens - 1, vocab]
        expected = log_probs.gather(2, tokens[:, 1:, None])[:, start - 1 :, 0].numpy()
        np.testing.assert_allclose([sample.log_probs[start:] for sample in group.samples], expected, atol=CLOSE)
        for sample in group.samples:
            assert sample.segments == (Segment(0, start, "prompt"), Segment(start, start + NEW, "policy", 0))
            assert sample.routing is not None and sample.routing.shape == (start + NEW - 1, SHAPE.layers, SHAPE.chosen)
