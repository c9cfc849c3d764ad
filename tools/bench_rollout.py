"""Our sampling against a bare client that floods the same server with the same requests, in one run.

    python tools/bench_rollout.py [--samples 64] [--rounds 3]      needs no GPU: starts a tiny model on the CPU
    python tools/bench_rollout.py --url http://node7:30000 --vocabulary 151936

Printed: tokens per second of ours as a share of the bare client's (rounds alternate; the best of each counts), seconds of
CPU of our process per 1,000 samples, and its peak memory after each thousand samples in flight at once (it should not grow).
"""

import argparse
import asyncio
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.server import ServerOptions, start_servers
from megatron_rl.rollout.suitability import Demands
from tests.reference.tiny_checkpoint import SERVED, write_served_model

PROMPT_TOKENS = 64


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, vocabulary, size=PROMPT_TOKENS).tolist() for _ in range(count)]


async def bare(url: str, asked: list[list[int]], tokens: int) -> int:
    """Every request at once, no check of anything; returns the tokens that came."""

    async def one(client: httpx.AsyncClient, prompt: list[int]) -> int:
        body: dict[str, Any] = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True},
            "return_logprob": True,
        }
        reply = await client.post("/generate", json=body)
        return len(json.loads(reply.content)["output_ids"])

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        return sum(await asyncio.gather(*(one(client, prompt) for prompt in asked)))


async def ours(pool: Pool, asked: list[list[int]], tokens: int) -> int:
    """The same through the pool: streamed, checked, in groups of eight."""
    sampling = Sampling(tokens, ignore_end=True)
    wanted = (pool.generate(prompt, sampling, group=str(i // 8)) for i, prompt in enumerate(asked))
    return sum(len(response.tokens) for response in await asyncio.gather(*wanted))


async def flush(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        await client.post("/flush_cache")


async def measure(arguments: argparse.Namespace, url: str) -> None:
    asked = prompts(arguments.samples, arguments.vocabulary)
    settings = ServerSettings(urls=(url,), max_in_flight=arguments.in_flight)
    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    async with Pool(settings, Demands(arguments.family, arguments.vocabulary)) as pool:
        await pool.begin()
        await ours(pool, asked[:8], 8)
        spent = 0.0
        for _ in range(arguments.rounds):
            for name in rates:
                await flush(url)
                began, cpu = time.perf_counter(), time.process_time()
                count = await (bare(url, asked, arguments.tokens) if name == "bare" else ours(pool, asked, arguments.tokens))
                rates[name].append(count / (time.perf_counter() - began))
                spent += (time.process_time() - cpu) if name == "ours" else 0.0
        share = max(rates["ours"]) / max(rates["bare"])
        print(
            "tokens/s by round: " + "; ".join(f"{name} {', '.join(f'{r:.0f}' for r in each)}" for name, each in rates.items())
        )
        print(f"ours / bare: {share:.3f} (best of {arguments.rounds} alternating rounds)")
        print(f"CPU of our process: {1000 * spent / (arguments.rounds * arguments.samples):.2f} s per 1,000 samples")
        for thousand in range(arguments.many // 1000):
            await ours(pool, prompts(1000, arguments.vocabulary), 2)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"after {thousand + 1},000 samples in flight at once: peak memory {peak:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; default: one is started")
    parser.add_argument("--family", default="qwen3_moe", help="model_type of the server's model")
    parser.add_argument("--vocabulary", type=int, default=SERVED["vocab_size"], help="tokens of its model")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-flight", type=int, default=None, help="servers.max_in_flight")
    parser.add_argument("--many", type=int, default=2000, help="samples of the memory test")
    arguments = parser.parse_args()
    if arguments.url:
        asyncio.run(measure(arguments, arguments.url))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = write_served_model(Path(folder) / "model")
        options = ServerOptions(model, Path(folder) / "server.log", {"weight_version": "0"}, device="cpu")
        (server,) = asyncio.run(start_servers([options]))
        with server:
            asyncio.run(measure(arguments, server.url))


if __name__ == "__main__":
    main()
