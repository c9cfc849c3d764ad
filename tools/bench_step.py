"""Where a step's time goes, and what the trainer adds to its parts: sampling, updating and publishing, each done bare.

A toy model trains on this machine, one rank and one real server, both on the CPU; every response has the same length. After
every few steps their parts are done again without the trainer, in the same process and on the same server, so that what else
the machine does meets both alike:

    bare rollout     the same prompts, all requests at once by a plain HTTP client, no check of anything
    bare update      the same sequences packed, scored and learned from by the policy alone
    bare publish     the same weights to the same server, with the probe, and no pool around it

    python tools/bench_step.py [--rounds 5] [--steps 4] [--groups 8] [--tokens 48] [--piece 32]

Ends with an error when a step takes more than 5% longer than its bare parts together (medians of all steps but each round's
first, which warms up, and last, which publishes nothing).
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp
from rich.progress import track

from megatron_rl.train.upstream import quiet_upstream

quiet_upstream()

from megatron_rl.config.settings import Settings  # noqa: E402
from megatron_rl.observe.observer import Observer  # noqa: E402
from megatron_rl.observe.records import EvaluationRecord, RunRecord, StepRecord  # noqa: E402
from megatron_rl.policy.layout import Launch  # noqa: E402
from megatron_rl.policy.policy import Policy  # noqa: E402
from megatron_rl.rollout.bank.reader import BankReader  # noqa: E402
from megatron_rl.rollout.bank.sealed import SealedStep  # noqa: E402
from megatron_rl.rollout.client import Client  # noqa: E402
from megatron_rl.rollout.server import ServerOptions, start_servers  # noqa: E402
from megatron_rl.train import objective  # noqa: E402
from megatron_rl.train.experience import Experience, advantages_of  # noqa: E402
from megatron_rl.train.publishing import open_publisher  # noqa: E402
from megatron_rl.train.run import train  # noqa: E402
from megatron_rl.train.toy_model import write_toy_model  # noqa: E402
from megatron_rl.weights.publish.ports import Target  # noqa: E402
from megatron_rl.weights.toy_model import ToyShape  # noqa: E402

LARGEST = 0.05
SIZE = 8  # responses of a group


class Stopwatch(Observer):
    """How long steps take, and their phases."""

    def __init__(self) -> None:
        self.wholes: list[float] = []
        self.phases: dict[str, list[float]] = {}
        self._end: float | None = None

    def started(self, run: RunRecord, step: int) -> None:
        self._end = None

    def step(self, record: StepRecord) -> None:
        now = time.perf_counter()
        if self._end is not None and any(span.name == "publish" for span in record.spans):
            self.wholes.append(now - self._end)
            for span in record.spans:
                self.phases.setdefault(span.name, []).append(span.seconds)
        self._end = now

    def evaluated(self, record: EvaluationRecord) -> None:
        return

    def finished(self) -> None:
        return


def bench_settings(arguments: argparse.Namespace, folder: Path, url: str, number: int) -> Settings:
    return Settings.model_validate(
        {
            "policy": {"init": folder / "toy"},
            "precision": {"dtype": "float32"},
            "optimizer": {"lr": 1e-4},
            "batch": {"max_tokens": 2048},
            "data": {"sources": [{"path": "task:arithmetic"}]},
            "rewards": [{"name": "length", "options": {"high": arguments.tokens}}],
            "sampling": {"groups": arguments.groups, "group_size": SIZE, "max_new_tokens": arguments.tokens, "max_tokens": 512},
            "servers": {"urls": [url], "piece": arguments.piece},
            "observe": {"look_every": 0},
            "run": {"directory": folder / f"run{number}", "steps": arguments.steps, "seed": number},
            "device": {"kind": "cpu", "threads": 1},
        }
    )


async def bare_rollout(url: str, step: SealedStep) -> None:
    samples = step.samples(range(step.rows), routing=False)

    async def one(client: aiohttp.ClientSession, prompt: list[int], tokens: int) -> None:
        sampling = {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        async with client.post("/generate", json=body) as reply:
            json.loads(await reply.read())

    unhurried = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, timeout=unhurried, connector=aiohttp.TCPConnector(limit=0)) as client:
        async with client.post("/flush_cache"):
            pass
        asked = ((s.tokens[: s.prompt_length].tolist(), s.length - s.prompt_length) for s in samples)
        await asyncio.gather(*(one(client, prompt, tokens) for prompt, tokens in asked))


def bare_update(policy: Policy, step: SealedStep) -> float:
    """Seconds; reading and advantages are not counted."""
    goal, advantage = objective.build(policy.settings.objective)
    assert advantage is not None
    experience = Experience.read(step)
    advantages = advantages_of(advantage, experience, experience.rewards)
    sequences = [advantages.inform(sequence) for sequence in experience.sequences(range(step.rows))]
    began = time.perf_counter()
    packs = policy.pack(sequences)
    old = [values.log_probs for values in policy.log_probs(packs)]
    policy.update(packs, goal, {"old": old})
    return time.perf_counter() - began


def bare_parts(settings: Settings, url: str) -> dict[str, list[float]]:
    """Of every step but the first, which warms up."""
    found: dict[str, list[float]] = {"rollout": [], "update": [], "publish": []}
    policy = Policy.open(settings, Launch())
    publisher = open_publisher(policy, lambda server: Client(server, policy.architecture.vocab))
    with BankReader(settings.bank_directory) as bank:
        for number in bank.steps():
            with bank.step(number) as step:
                began = time.perf_counter()
                asyncio.run(bare_rollout(url, step))
                found["rollout"].append(time.perf_counter() - began)
                found["update"].append(bare_update(policy, step))
                began = time.perf_counter()
                asyncio.run(publisher.publish(settings.run.steps + number, [Target(url)]))
                found["publish"].append(time.perf_counter() - began)
    policy.close()
    return {name: seconds[1:] for name, seconds in found.items()}


def table(title: str, parts: Mapping[str, Sequence[float]]) -> str:
    return "\n".join([title, *(f"  {name:12s} {statistics.median(seconds):.3f} s" for name, seconds in parts.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument(
        "--piece", type=int, default=32, help="servers.piece; with --tokens or more nothing is streamed, as bare"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_toy_model(folder / "toy", ToyShape(layers=4, hidden=128))
        options = ServerOptions(
            str(folder / "toy"), folder / "server.log", {"max_total_tokens": 16384}, device="cpu", threads=1
        )
        (server,) = asyncio.run(start_servers([options]))
        with server:
            watch, bare = Stopwatch(), dict[str, list[float]]()
            for number in track(range(arguments.rounds), "rounds"):
                settings = bench_settings(arguments, folder, server.url, number)
                train(settings, observers=[watch])
                for part, seconds in bare_parts(settings, server.url).items():
                    bare.setdefault(part, []).extend(seconds)
    whole = statistics.median(watch.wholes)
    together = sum(statistics.median(seconds) for seconds in bare.values())
    print(table(f"a step of the trainer: {whole:.3f} s, median of {len(watch.wholes)} steps", watch.phases))
    print(table(f"its parts, bare: {together:.3f} s", bare))
    added = whole / together - 1
    print(f"the trainer adds {added:+.1%} ({LARGEST:.0%} allowed)")
    sys.exit(added > LARGEST)


if __name__ == "__main__":
    main()
