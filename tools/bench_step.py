"""Where a step's time goes, and what the trainer adds to its parts: sampling, updating and publishing, each done bare.

A toy model trains on this machine, one rank and one real server, both on the CPU; every response has the same length. After
every few steps their parts are done again without the trainer, in the same process and on the same server, so that what else
the machine does meets both alike:

    bare rollout     the same prompts, all requests at once by a plain HTTP client, no check of anything
    bare update      the same sequences packed, scored and learned from by the policy alone
    bare publish     the same weights to the same server, with the probe, and no pool around it

    python tools/bench_step.py [--rounds 10] [--steps 5] [--groups 16] [--tokens 48]

A step is compared with its own bare parts, done some seconds later; the result is the median of these ratios, over all steps
but each round's first, which warms up, and last, which publishes nothing. Beside it stand the medians of nine tenths of draws
with replacement, which is what noise alone makes of it, and the same for seconds of CPU, of this process and the server's
together, which other work on the machine hardly touches. Ends with an error when a step takes more than 5% longer than its
bare parts.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import psutil
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


@dataclass(frozen=True)
class Spent:
    """Time of something: by the clock, and of processors."""

    seconds: float
    cpu: float

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.seconds + other.seconds, self.cpu + other.cpu)


class Meter:
    """Measures this process and the server's together."""

    def __init__(self, server: int) -> None:
        """`server`: its process id."""
        self._servers = [psutil.Process(server), *psutil.Process(server).children(recursive=True)]

    def now(self) -> Spent:
        times = [process.cpu_times() for process in self._servers]
        return Spent(time.perf_counter(), time.process_time() + sum(each.user + each.system for each in times))

    def since(self, start: Spent) -> Spent:
        now = self.now()
        return Spent(now.seconds - start.seconds, now.cpu - start.cpu)


class Stopwatch(Observer):
    """What each step of a run takes, but for its first and its last, and their phases."""

    def __init__(self, meter: Meter) -> None:
        self.steps: dict[int, Spent] = {}
        self.phases: dict[str, list[float]] = {}
        self._meter = meter
        self._start: Spent | None = None

    def started(self, run: RunRecord, step: int) -> None:
        self._start = None

    def step(self, record: StepRecord) -> None:
        if self._start is not None and any(span.name == "publish" for span in record.spans):
            self.steps[record.step] = self._meter.since(self._start)
            for span in record.spans:
                self.phases.setdefault(span.name, []).append(span.seconds)
        self._start = self._meter.now()

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
            "servers": {"urls": [url]},
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


def bare_update(policy: Policy, step: SealedStep, meter: Meter) -> Spent:
    """Reading and advantages are not counted."""
    goal, advantage = objective.build(policy.settings.objective)
    assert advantage is not None
    experience = Experience.read(step)
    advantages = advantages_of(advantage, experience, experience.rewards)
    sequences = [advantages.inform(sequence) for sequence in experience.sequences(range(step.rows))]
    start = meter.now()
    packs = policy.pack(sequences)
    old = [values.log_probs for values in policy.log_probs(packs)]
    policy.update(packs, goal, {"old": old})
    return meter.since(start)


def bare_parts(settings: Settings, url: str, meter: Meter) -> dict[int, dict[str, Spent]]:
    """What each part of each step takes; the first step is done too, and warms up."""
    found: dict[int, dict[str, Spent]] = {}
    policy = Policy.open(settings, Launch())
    publisher = open_publisher(policy, lambda server: Client(server, policy.architecture.vocab))
    with BankReader(settings.bank_directory) as bank:
        for number in bank.steps():
            with bank.step(number) as step:
                start = meter.now()
                asyncio.run(bare_rollout(url, step))
                rollout, update, start = meter.since(start), bare_update(policy, step, meter), meter.now()
                asyncio.run(publisher.publish(settings.run.steps + number, [Target(url)]))
                found[number] = {"rollout": rollout, "update": update, "publish": meter.since(start)}
    policy.close()
    return found


@dataclass(frozen=True)
class Pair:
    """A step, and its parts done bare."""

    whole: Spent
    parts: Mapping[str, Spent]

    @property
    def bare(self) -> Spent:
        return sum(self.parts.values(), Spent(0.0, 0.0))


def median_and_noise(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the range of nine tenths of the medians of draws with replacement."""
    draws = np.random.default_rng(0).choice(np.array(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.05, 0.95])
    return statistics.median(ratios), float(low), float(high)


def report(pairs: Sequence[Pair], phases: Mapping[str, Sequence[float]]) -> float:
    """Say all of it; what the trainer adds."""
    median = statistics.median
    print(f"a step of the trainer: {median(pair.whole.seconds for pair in pairs):.3f} s, median of {len(pairs)} steps")
    for name, seconds in phases.items():
        print(f"  {name:12s} {median(seconds):.3f} s")
    print(f"its parts, bare: {median(pair.bare.seconds for pair in pairs):.3f} s")
    for name in pairs[0].parts:
        print(f"  {name:12s} {median(pair.parts[name].seconds for pair in pairs):.3f} s")
    clock = median_and_noise([pair.whole.seconds / pair.bare.seconds - 1 for pair in pairs])
    cpu = median_and_noise([pair.whole.cpu / pair.bare.cpu - 1 for pair in pairs])
    print("the trainer adds {:+.1%} of CPU time, by the draws {:+.1%} to {:+.1%}".format(*cpu))
    print("the trainer adds {:+.1%} of time, by the draws {:+.1%} to {:+.1%}".format(*clock), f"({LARGEST:.0%} allowed)")
    return clock[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="of a round, three at least")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="of each response")
    arguments = parser.parse_args()
    if arguments.steps < 3:
        parser.error("--steps: the first and the last of a round are not counted, so a round has three at least")
    pairs, phases = list[Pair](), dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_toy_model(folder / "toy", ToyShape(layers=4, hidden=128))
        options = ServerOptions(
            str(folder / "toy"), folder / "server.log", {"max_total_tokens": 16384}, device="cpu", threads=1
        )
        (server,) = asyncio.run(start_servers([options]))
        with server:
            meter = Meter(server.pid)
            for number in track(range(arguments.rounds), "rounds"):
                settings, watch = bench_settings(arguments, folder, server.url, number), Stopwatch(meter)
                train(settings, observers=[watch])
                bare = bare_parts(settings, server.url, meter)
                pairs += [Pair(whole, bare[step]) for step, whole in watch.steps.items()]
                for phase, seconds in watch.phases.items():
                    phases.setdefault(phase, []).extend(seconds)
    sys.exit(report(pairs, phases) > LARGEST)


if __name__ == "__main__":
    main()
