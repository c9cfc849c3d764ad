"""Our sampling against a bare client that floods the same server with the same requests, in one run.

    python tools/bench_rollout.py [--samples 64] [--rounds 20]     needs no GPU: starts a tiny model on the CPU
    python tools/bench_rollout.py --url http://node7:30000 --vocabulary 151936

Printed: tokens per second of ours as a share of the bare client's, over all rounds and as the spread of single rounds. A round
is one of each, in turns first and second, and short, so that what else happens on the machine strikes both; a round before the
first warms the server up. Then seconds of CPU of the process per 1,000 samples of either, and the peak memory of waves of
thousands of samples that the server has all at once (it should not grow from wave to wave).
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.server import ServerOptions, start_servers
from megatron_rl.rollout.suitability import Demands
from tests.reference.tiny_checkpoint import SERVED, write_served_model

WAVES, SHORT = 3, 8  # of the memory test: how many, and tokens of its prompts and of its responses
MANY = 1e9  # no bound by tokens: samples wait in the server, not in our queue


@dataclass(frozen=True)
class Round:
    """What one client did in a round."""

    tokens: int
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def prompts(count: int, vocabulary: int, length: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, vocabulary, size=length).tolist() for _ in range(count)]


async def bare(url: str, asked: list[list[int]], tokens: int) -> int:
    """Every request at once, no check of anything; returns the tokens that came."""

    async def one(client: aiohttp.ClientSession, prompt: list[int]) -> int:
        body: dict[str, Any] = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True},
            "return_logprob": True,
        }
        async with client.post("/generate", json=body) as reply:
            return len(json.loads(await reply.read())["output_ids"])

    unhurried = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, timeout=unhurried, connector=aiohttp.TCPConnector(limit=0)) as client:
        return sum(await asyncio.gather(*(one(client, prompt) for prompt in asked)))


async def ours(pool: Pool, asked: list[list[int]], tokens: int) -> int:
    """The same through the pool: streamed, checked, in groups of eight."""
    sampling = Sampling(tokens, ignore_end=True)
    wanted = (pool.generate(prompt, sampling, group=str(i // 8)) for i, prompt in enumerate(asked))
    return sum(len(response.tokens) for response in await asyncio.gather(*wanted))


async def timed(url: str, work: Awaitable[int]) -> Round:
    """On a server with an empty prefix cache."""
    async with aiohttp.ClientSession(url) as client, client.post("/flush_cache"):
        pass
    began, cpu = time.perf_counter(), time.process_time()
    tokens = await work
    return Round(tokens, time.perf_counter() - began, time.process_time() - cpu)


async def compare(arguments: argparse.Namespace, url: str) -> None:
    asked = prompts(arguments.samples, arguments.vocabulary, arguments.prompt)
    settings = ServerSettings(urls=(url,), max_in_flight=arguments.in_flight)
    rounds: dict[str, list[Round]] = {"bare": [], "ours": []}
    async with Pool(settings, Demands(arguments.family, arguments.vocabulary)) as pool:
        await pool.begin()
        for number in range(arguments.rounds + 1):
            for name in ("bare", "ours") if number % 2 else ("ours", "bare"):
                work = bare(url, asked, arguments.tokens) if name == "bare" else ours(pool, asked, arguments.tokens)
                done = await timed(url, work)
                if number > 0:
                    rounds[name].append(done)
    for name, each in rounds.items():
        cpu = 1000 * sum(done.cpu for done in each) / (len(each) * arguments.samples)
        rates = np.array([done.rate for done in each])
        whole = sum(done.tokens for done in each) / sum(done.seconds for done in each)
        spread = f"rounds {rates.min():.0f} to {rates.max():.0f}"
        print(f"{name}: {whole:.0f} tokens/s, {spread}; {cpu:.2f} s of CPU per 1,000 samples")
    pairs = list(zip(rounds["ours"], rounds["bare"], strict=True))
    whole = sum(bare.seconds for _, bare in pairs) / sum(mine.seconds for mine, _ in pairs)
    low, middle, high = np.quantile([mine.rate / bare.rate for mine, bare in pairs], (0.25, 0.5, 0.75))
    print(f"ours / bare: {whole:.3f} over all rounds; by round {middle:.3f}, half of them between {low:.3f} and {high:.3f}")


async def waves(arguments: argparse.Namespace, url: str) -> None:
    """Thousands of streams open at once, again and again."""
    settings = ServerSettings(urls=(url,), max_in_flight=arguments.many, over_commit=MANY)
    asked = prompts(arguments.many, arguments.vocabulary, SHORT)
    async with Pool(settings, Demands(arguments.family, arguments.vocabulary)) as pool:
        await pool.begin()
        (worker,) = pool.fleet.workers.values()
        for wave in range(WAVES):
            work = asyncio.create_task(ours(pool, asked, SHORT))
            memory = streams = 0
            while not work.done():
                memory, streams = max(memory, resident()), max(streams, len(worker.attempts))
                with suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(work), 0.05)
            print(f"wave {wave + 1}: {streams:,} samples in flight at once, at most {memory / 2**20:.0f} MiB of memory")


def resident() -> int:
    """Bytes of memory that this process has now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


async def measure(arguments: argparse.Namespace, url: str) -> None:
    await compare(arguments, url)
    await waves(arguments, url)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; default: one is started")
    parser.add_argument("--family", default="qwen3_moe", help="model_type of the server's model")
    parser.add_argument("--vocabulary", type=int, default=SERVED["vocab_size"], help="tokens of its model")
    parser.add_argument("--samples", type=int, default=64, help="of a round")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--in-flight", type=int, default=None, help="servers.max_in_flight")
    parser.add_argument("--many", type=int, default=2000, help="samples at once in the memory test")
    arguments = parser.parse_args()
    if arguments.url:
        asyncio.run(measure(arguments, arguments.url))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = write_served_model(Path(folder) / "model")
        roomy = {"max_running_requests": 2048, "max_total_tokens": 65536}
        threads = max(1, len(os.sched_getaffinity(0)) - 1)  # a core is left to the client
        options = ServerOptions(model, Path(folder) / "server.log", roomy, device="cpu", threads=threads)
        (server,) = asyncio.run(start_servers([options]))
        with server:
            asyncio.run(measure(arguments, server.url))


if __name__ == "__main__":
    main()
