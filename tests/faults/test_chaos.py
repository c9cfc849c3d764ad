"""Two real servers, and everything that can happen to a server while they sample: each response is finished exactly once.

One server is the shared one behind a proxy that refuses, garbles, truncates, trickles, hangs and cuts, and that leaves the pool
and joins again. The other is a process of the pool's own that is frozen (SIGSTOP), and killed (-9) and started again. The
tokens are judged by transformers: one that was lost, doubled or invented would not have its log-prob.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.health import Dead, Starting
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.replies import Generation
from megatron_rl.rollout.server import Server
from megatron_rl.rollout.suitability import Demands
from megatron_rl.rollout.worker import Worker
from tests.faults.proxy import Fault, Proxy
from tests.servers import SHAPE, VOCABULARY, TinyServer, server_options

PROMPTS, SIZE, NEW = 200, 4, 24
CLOSE = 1e-4  # log-probs in float32, by different kernels
FAULTS: tuple[Fault, ...] = get_args(Fault.__value__)
SECONDS = 420.0


def prompt(number: int) -> list[int]:
    return np.random.default_rng(number).integers(3, VOCABULARY, 6 + number % 7).tolist()


def server_session(server: Server) -> int:
    """The process group of a server with its children: that of the keeper's one child."""
    (child,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return int(child)


async def torment(pool: Pool, proxy: Proxy, own: Worker, done: Counter[str]) -> None:
    """One thing after the other, each once a good share of responses has come and both servers are at work again."""
    dice = random.Random(5)
    steps = [*FAULTS[1:], "cut", "freeze", "leave", "kill", "garbage", "truncate", "cut"]
    share = PROMPTS * SIZE // (len(steps) + 2)
    for number, step in enumerate(steps):
        while done.total() < share * (number + 1) or not all(
            worker.works or isinstance(worker.health, Starting | Dead) for worker in pool.fleet.workers.values()
        ):
            await asyncio.sleep(0.01)
        match step:
            case "cut":
                proxy.cut()
            case "leave":
                pool.fleet.leave(proxy.url)
                await asyncio.sleep(0.5)
                pool.fleet.join(proxy.url)
            case "freeze" if own.server is not None and not isinstance(own.health, Starting | Dead):
                session = server_session(own.server)
                os.killpg(session, signal.SIGSTOP)
                await asyncio.sleep(dice.uniform(0.5, 3.0))
                os.killpg(session, signal.SIGCONT)
            case "kill" if own.server is not None:
                os.killpg(server_session(own.server), signal.SIGKILL)
            case "refuse" | "garbage" | "truncate" | "trickle" | "hang":
                proxy.fault = step
                if step == "refuse":
                    proxy.cut()
                await asyncio.sleep(dice.uniform(0.3, 1.5))
                proxy.fault = "none"
                if step == "hang":
                    proxy.cut()


async def sample_all(shared: TinyServer, log: Path) -> tuple[dict[tuple[int, int], list[Generation]], Worker]:
    settings = ServerSettings(
        probe_seconds=0.2, answer_seconds=3.0, silence_seconds=5.0, probes=1, piece=4, tries=40, max_in_flight=24, restarts=2
    )
    found: dict[tuple[int, int], list[Generation]] = {}
    done: Counter[str] = Counter()

    async def one(pool: Pool, number: int, index: int) -> None:
        generation = await pool.generate(prompt(number), Sampling(NEW, ignore_end=True), group=str(number))
        found.setdefault((number, index), []).append(generation)
        done[str(number)] += 1

    async with (
        asyncio.timeout(SECONDS),
        Proxy(shared.server.port, seed=3) as proxy,
        Pool(settings, Demands("qwen3_moe", VOCABULARY, SHAPE)) as pool,
    ):
        await pool.begin([server_options(shared.model, log)])
        (own,) = pool.fleet.workers.values()
        pool.fleet.join(proxy.url)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(torment(pool, proxy, own, done))
            for number in range(PROMPTS):
                for index in range(SIZE):
                    tasks.create_task(one(pool, number, index))
        assert all(worker.desk.requests == 0 for worker in pool.fleet.workers.values())
    return found, own


def test_every_response_is_finished_exactly_once(tiny_server: TinyServer, tmp_path: Path) -> None:
    found, own = asyncio.run(sample_all(tiny_server, tmp_path / "own.log"))
    assert own.restarts + own.rests + own.strikes >= 1  # it was killed, and noticed, whoever finished its work
    assert found.keys() == {(number, index) for number in range(PROMPTS) for index in range(SIZE)}
    assert all(len(generations) == 1 for generations in found.values())
    model = AutoModelForCausalLM.from_pretrained(tiny_server.model, dtype=torch.float32).eval()
    for number in range(PROMPTS):
        start = len(prompt(number))
        group = [found[number, index][0] for index in range(SIZE)]
        tokens = torch.tensor([[*prompt(number), *generation.tokens.tolist()] for generation in group])
        assert tokens.shape == (SIZE, start + NEW)
        with torch.no_grad():
            log_probs = model(tokens).logits[:, :-1].log_softmax(-1)  # [samples, tokens - 1, vocab]
        expected = log_probs.gather(2, tokens[:, 1:, None])[:, start - 1 :, 0].numpy()
        np.testing.assert_allclose(np.stack([generation.log_probs for generation in group]), expected, atol=CLOSE)
        for generation in group:
            assert [span.length for span in generation.spans] == [NEW] and generation.finish == "length"
            assert generation.routing is not None and generation.routing.shape == (start + NEW - 1, SHAPE.layers, SHAPE.chosen)
