"""Where a step's time goes, and what the trainer adds to its parts: sampling, updating and publishing, each done bare.

A toy model trains on this machine, one rank and one real server, both on the CPU. After every step its parts are done again
without the trainer, in the same process and on the same server, so that what else the machine does meets both alike:

    bare rollout     the same prompts, all requests at once by a plain HTTP client, no check of anything
    bare update      the same sequences packed, scored and learned from by a second policy
    bare publish     that policy's weights to the same server, with the probe, and no pool around it

    python tools/bench_step.py [--steps 32] [--groups 16] [--tokens 48]

A step is compared with its own parts; the result is the median of these ratios. Beside it stand the medians of nine tenths of
draws with replacement, which is what noise alone makes of it, and the same for seconds of CPU, of this process and the server's
together, which other work on the machine touches less. Ends with an error when a step takes more than 5% longer than its parts.
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
from unittest import mock

import aiohttp
import numpy as np
import psutil

from megatron_rl.train.upstream import quiet_upstream

quiet_upstream()

from megatron_rl.config.settings import Settings  # noqa: E402
from megatron_rl.observe import observers_of  # noqa: E402
from megatron_rl.observe.observer import Observer  # noqa: E402
from megatron_rl.observe.records import EvaluationRecord, RunRecord, StepRecord  # noqa: E402
from megatron_rl.policy.layout import Launch  # noqa: E402
from megatron_rl.policy.policy import Policy  # noqa: E402
from megatron_rl.rollout.bank.reader import BankReader  # noqa: E402
from megatron_rl.rollout.bank.sealed import SealedStep  # noqa: E402
from megatron_rl.rollout.client import Client  # noqa: E402
from megatron_rl.rollout.server import ServerOptions, start_servers  # noqa: E402
from megatron_rl.train import objective, run  # noqa: E402
from megatron_rl.train.experience import Experience, advantages_of  # noqa: E402
from megatron_rl.train.publishing import open_publisher  # noqa: E402
from megatron_rl.train.steps import Rollouts  # noqa: E402
from megatron_rl.train.toy_model import write_toy_model  # noqa: E402
from megatron_rl.weights.publish.ports import Target  # noqa: E402
from megatron_rl.weights.toy_model import ToyShape  # noqa: E402

LARGEST = 0.05
SIZE = 8  # responses of a group
WARM_UP = 3  # steps that are not counted


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


def bench_settings(arguments: argparse.Namespace, folder: Path, url: str) -> Settings:
    return Settings.model_validate(
        {
            "policy": {"init": folder / "toy"},
            "precision": {"dtype": "float32"},
            "optimizer": {"lr": 1e-8},  # a policy that learns writes other lengths
            "batch": {"max_tokens": 2048},
            "data": {"sources": [{"path": "task:arithmetic"}]},
            "rewards": [{"name": "length", "options": {"high": arguments.tokens * 3 // 4}}],
            "sampling": {
                "groups": arguments.groups,
                "group_size": SIZE,
                "max_new_tokens": arguments.tokens,
                "max_tokens": 512,
            },
            "servers": {"urls": [url]},
            "observe": {"look_every": 0},
            "run": {"directory": folder / "run", "steps": WARM_UP + arguments.steps + 1},  # the last publishes nothing
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


@dataclass(frozen=True)
class Pair:
    """A step, and its parts done bare."""

    whole: Spent
    parts: Mapping[str, Spent]

    @property
    def bare(self) -> Spent:
        return sum(self.parts.values(), Spent(0.0, 0.0))


class Bench:
    """Measures steps as they go, and does the parts of each again before the next begins."""

    def __init__(self, settings: Settings, url: str, meter: Meter) -> None:
        self.pairs: list[Pair] = []
        self._settings, self._url, self._meter = settings, url, meter
        self._start: Spent | None = None
        self._policy: Policy | None = None

    def pause(self, version: int) -> None:
        """The weights after this many steps are published, and nothing more has begun."""
        whole = self._meter.since(self._start) if self._start is not None else None
        if self._policy is None:
            self._policy = Policy.open(self._settings, Launch())
            vocabulary = self._policy.architecture.vocab
            self._publisher = open_publisher(self._policy, lambda server: Client(server, vocabulary))
        if version > 0:
            parts = self._parts(self._policy, version)
            if whole is not None and version > WARM_UP:
                self.pairs.append(Pair(whole, parts))
        self._start = self._meter.now()

    def _parts(self, policy: Policy, version: int) -> dict[str, Spent]:
        """Of the step that these weights come from."""
        now, since = self._meter.now, self._meter.since
        with BankReader(self._settings.bank_directory) as bank, bank.step(version - 1) as step:
            start = now()
            asyncio.run(bare_rollout(self._url, step))
            rollout, update, start = since(start), bare_update(policy, step, self._meter), now()
            asyncio.run(self._publisher.publish(version, [Target(self._url, anew=True)]))
            return {"rollout": rollout, "update": update, "publish": since(start)}

    def source(self) -> type[Rollouts]:
        """Where a run's steps come from when it is paused for us behind each publish."""
        bench = self

        class Paused(Rollouts):
            def go_on(self, version: int) -> None:
                bench.pause(version)
                super().go_on(version)

        return Paused


class Phases(Observer):
    """What the trainer says of the phases of its steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def started(self, run: RunRecord, step: int) -> None:
        return

    def step(self, record: StepRecord) -> None:
        for span in record.spans if record.step >= WARM_UP else ():
            self.seconds.setdefault(span.name, []).append(span.seconds)

    def evaluated(self, record: EvaluationRecord) -> None:
        return

    def finished(self) -> None:
        return


def median_and_draws(ratios: Sequence[float]) -> tuple[float, float, float]:
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
    clock = median_and_draws([pair.whole.seconds / pair.bare.seconds - 1 for pair in pairs])
    cpu = median_and_draws([pair.whole.cpu / pair.bare.cpu - 1 for pair in pairs])
    print("the trainer adds {:+.1%} of CPU time, by the draws {:+.1%} to {:+.1%}".format(*cpu))
    print("the trainer adds {:+.1%} of time, by the draws {:+.1%} to {:+.1%}".format(*clock), f"({LARGEST:.0%} allowed)")
    return clock[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=32, help=f"that count; {WARM_UP} go before them")
    parser.add_argument("--groups", type=int, default=16, help=f"of {SIZE} responses")
    parser.add_argument("--tokens", type=int, default=48, help="of each response")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_toy_model(folder / "toy", ToyShape(layers=4, hidden=128))
        options = ServerOptions(
            str(folder / "toy"), folder / "server.log", {"max_total_tokens": 16384}, device="cpu", threads=1
        )
        (server,) = asyncio.run(start_servers([options]))
        with server:
            settings, phases = bench_settings(arguments, folder, server.url), Phases()
            bench = Bench(settings, server.url, Meter(server.pid))
            with mock.patch.object(run, "Rollouts", bench.source()):
                run.train(settings, observers=[*observers_of(settings), phases])
    sys.exit(report(bench.pairs, phases.seconds) > LARGEST)


if __name__ == "__main__":
    main()
