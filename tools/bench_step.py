"""Where a step's time goes, and what the trainer adds to its parts: sampling, updating and publishing, each done bare.

A toy model trains on this machine, one rank and one real server, both on the CPU; every response has the same length. Then the
parts of its steps are done again without the trainer, in the same process and on the same server:

    bare rollout     the same prompts, all requests at once by a plain HTTP client, no check of anything
    bare update      the same sequences packed, scored and learned from by the policy alone
    bare publish     the same weights to the same server, with the probe, and no pool around it

    python tools/bench_step.py [--steps 8] [--groups 8] [--tokens 48]

Ends with an error when a step takes more than 5% longer than its bare parts together (medians).
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

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
    """When steps end, and what their phases took."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.phases: dict[str, list[float]] = {}

    def started(self, run: RunRecord, step: int) -> None:
        return

    def step(self, record: StepRecord) -> None:
        self.ends.append(time.perf_counter())
        for span in record.spans:
            self.phases.setdefault(span.name, []).append(span.seconds)

    def evaluated(self, record: EvaluationRecord) -> None:
        return

    def finished(self) -> None:
        return


def bench_settings(arguments: argparse.Namespace, folder: Path, url: str) -> Settings:
    return Settings.model_validate(
        {
            "policy": {"init": folder / "toy"},
            "precision": {"dtype": "float32"},
            "optimizer": {"lr": 1e-4},
            "batch": {"max_tokens": 2048},
            "data": {"sources": [{"path": "task:arithmetic"}]},
            "rewards": [{"name": "length", "options": {"high": arguments.tokens}}],
            "sampling": {"groups": arguments.groups, "group_size": SIZE, "max_new_tokens": arguments.tokens, "max_tokens": 512},
            "servers": {"urls": [url]},
            "observe": {"look_every": 0},
            "run": {"directory": folder / "run", "steps": arguments.steps},
            "device": {"kind": "cpu", "threads": 1},
        }
    )


async def bare_rollout(url: str, step: SealedStep) -> None:
    samples = step.samples(range(step.rows), routing=False)

    async def one(client: httpx.AsyncClient, prompt: list[int], tokens: int) -> None:
        sampling = {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
        reply = await client.post("/generate", json={"input_ids": prompt, "sampling_params": sampling, "return_logprob": True})
        json.loads(reply.content)

    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        await client.post("/flush_cache")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_toy_model(folder / "toy", ToyShape(layers=4, hidden=128))
        options = ServerOptions(
            str(folder / "toy"), folder / "server.log", {"max_total_tokens": 16384}, device="cpu", threads=1
        )
        (server,) = asyncio.run(start_servers([options]))
        with server:
            settings = bench_settings(arguments, folder, server.url)
            watch = Stopwatch()
            train(settings, observers=[watch])
            bare = bare_parts(settings, server.url)
    whole = statistics.median(later - earlier for earlier, later in zip(watch.ends, watch.ends[1:-1], strict=False))
    parts = {part: statistics.median(seconds) for part, seconds in bare.items()}
    print(f"a step of the trainer: {whole:.3f} s, medians of {len(watch.ends) - 2} steps")
    for phase, seconds in watch.phases.items():
        print(f"  {phase:12s} {statistics.median(seconds):.3f} s")
    print(f"its parts, bare: {sum(parts.values()):.3f} s")
    for part, each in parts.items():
        print(f"  {part:12s} {each:.3f} s")
    added = whole / sum(parts.values()) - 1
    print(f"the trainer adds {added:+.1%} ({LARGEST:.0%} allowed)")
    sys.exit(added > LARGEST)


if __name__ == "__main__":
    main()
