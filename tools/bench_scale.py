"""What coordination costs as runs grow: the real planners, pool, packing and bank, for up to 1,024 ranks that are not there.

    python tools/bench_scale.py                        64, 128, 256, 512 and 1,024 ranks: a few minutes, 8 GiB, no GPU
    python tools/bench_scale.py --ranks 64 256 --only packing

With n ranks there are n/8 servers and 64 n samples a step, in groups of 8: 128 servers and 65,536 samples for 1,024 ranks. The
model is Qwen3-235B-A22B. Printed: for each part the seconds of CPU of one process, at each size, the most memory it took beyond
what it began with, and the exponent of n that fits best. Where work is shared out, what one rank does is measured, on a few
ranks. An exponent of 1 is a cost that is flat for a sample; one above 1.2 is told of.

A result is written to a file with --json. docs/scale.md shows one, and says what each part is.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from megatron_rl.config.families import read_architecture
from megatron_rl.config.layout_map import Alignment, data_size, rank_coordinates, stage_layers
from megatron_rl.config.settings import LayoutSettings
from megatron_rl.data.packing import CostModel, plan_packs
from megatron_rl.rollout.bank.sealed import SealedStep
from megatron_rl.rollout.bank.writer import Bank
from megatron_rl.train.experience import Experience
from megatron_rl.types import Group, Prompt, Sample, Segment
from megatron_rl.weights.gather import plan_gather
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.publish.live import LiveWeights
from megatron_rl.weights.publish.plan import plan_files, plan_stream, senders, units
from tools.scale_sampling import sample_a_step

MODEL = Path(__file__).parent.parent / "configs/models/qwen3-235b-a22b"
SIZES = (64, 128, 256, 512, 1024)
GROUP = 8
NODE = 8  # ranks of a machine
LOOKED_AT = 4  # ranks whose share is measured
LONGEST = 8192  # tokens of a sample, where only lengths count
BUCKET = 1 << 30  # bytes, as settings.publish.bucket_bytes
GROWS = 1.2  # the exponent above which a cost is told of


@dataclass(frozen=True)
class Size:
    """A run of so many ranks."""

    ranks: int
    folder: Path

    @property
    def servers(self) -> int:
        return max(1, self.ranks // 8)

    @property
    def samples(self) -> int:
        return 64 * self.ranks

    @property
    def layout(self) -> LayoutSettings:
        """Of Qwen3-235B-A22B: pipeline 8 x tensor 4, 8 ways for experts; the rest is data."""
        return LayoutSettings(
            tensor=4, pipeline=8, expert=8, pipeline_layers=(11, 12, 12, 12, 12, 12, 12, 11), world_size=self.ranks
        )


@dataclass
class Watch:
    """Seconds of CPU by what was done: what else the machine does is not our cost."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def on(self, name: str, times: int = 1) -> Iterator[None]:
        """`times`: of how many like this one takes the mean."""
        started = time.process_time()
        yield
        self.seconds[name] = (time.process_time() - started) / times


def lengths_of(size: Size) -> list[int]:
    """Most are short, few are long."""
    drawn = np.random.default_rng(0).lognormal(6.5, 0.8, size.samples)
    return np.clip(drawn, 16, LONGEST).astype(int).tolist()


# -- the parts -------------------------------------------------------------------------------------------------------------


def layout(size: Size, watch: Watch) -> None:
    """Who holds what, as each rank works it out when it starts."""
    with watch.on("layout: place of every rank"):
        places = rank_coordinates(size.layout, size.ranks)
        stage_layers(size.layout, read_architecture(MODEL))
    assert len(places) == size.ranks


def packing(size: Size, watch: Watch) -> None:
    """A step's samples into packs, as each rank does: for the replicas of this model, and of one that fits on four ranks."""
    lengths, cost = lengths_of(size), CostModel.of(read_architecture(MODEL))
    for name, replicas in (
        ("replicas of this model", data_size(size.layout, size.ranks)),
        ("of a quarter of the ranks", size.ranks // 4),
    ):
        with watch.on(f"packing: {name}"):
            plan = plan_packs(lengths, data_parallel=replicas, max_tokens=32768, alignment=Alignment(4, 4), cost=cost)
        assert sorted(place for rank in plan for pack in rank for place in pack) == list(range(size.samples))


def pool(size: Size, watch: Watch) -> None:
    """Draws, queue, dispatch, groups: all that the main rank does for a step of responses but HTTP."""
    with watch.on("pool: a step of responses"):
        collected, bank = asyncio.run(sample_a_step(size.servers, size.samples, GROUP))
    assert len(collected.keys) == len(set(collected.keys)) == size.samples // GROUP and bank.steps[0] == collected.keys


def made_group(number: int, generator: np.random.Generator) -> Group:
    tokens = generator.integers(0, 150_000, (GROUP, 96))
    log_probs = -generator.random((GROUP, 96)).astype(np.float32)
    segments = (Segment(0, 32, "prompt"), Segment(32, 96, "policy", 0))
    samples = tuple(
        Sample(tokens[i], log_probs[i], segments, "stop", {"exact": float(i % 2)}, float(i % 2)) for i in range(GROUP)
    )
    return Group(f"p{number}@{number}", Prompt(f"p{number}", tokens[0, :32]), samples, 0)


def bank(size: Size, watch: Watch) -> None:
    """A step is kept group by group, sealed, and read: the small columns by every rank, rows by those they belong to."""
    generator, path = np.random.default_rng(0), size.folder / f"bank{size.ranks}"
    groups = [made_group(number, generator) for number in range(size.samples // GROUP)]
    with Bank(path) as opened:
        with watch.on("bank: groups kept"):
            for future in [opened.submit(group) for group in groups]:
                future.result()
        with watch.on("bank: step sealed"):
            opened.seal(0)
    del groups
    read_step(size, next(path.glob("steps/*.parquet")), watch)


def read_step(size: Size, path: Path, watch: Watch) -> None:
    """Opened, planned and read as one rank does, and whole as GTPO reads it."""
    with watch.on("bank: small columns, a rank"), SealedStep(path) as rows:
        experience = Experience.read(rows)
        experience.minibatches(4, (0, 0))
    replicas = data_size(size.layout, size.ranks)
    order = np.random.default_rng(1).permutation(size.samples)
    with watch.on("bank: a rank's own rows", LOOKED_AT):
        for replica in range(LOOKED_AT):
            with SealedStep(path) as rows:
                found = rows.samples(np.sort(order[replica % replicas :: replicas]).tolist())
                assert len(found) == -(-(size.samples - replica % replicas) // replicas)
    with watch.on("bank: all rows"), SealedStep(path) as rows:
        assert len(rows.samples(range(size.samples), routing=False)) == size.samples


@cache
def weight_map() -> WeightMap:
    return WeightMap(read_architecture(MODEL))


def publish(size: Size, watch: Watch) -> None:
    """What travels to whom when weights are published: planned by each rank at the first publish, and kept."""
    weights, whole = weight_map(), units(weight_map(), torch.bfloat16)
    machines = max(1, size.ranks // NODE)
    with watch.on("publish: stream of buckets"):
        stream = plan_stream(whole, BUCKET, senders(size.servers, size.ranks, machines))
    with watch.on("publish: what a rank sends of it"):
        moves = plan_gather(weights, size.layout, size.ranks, stream.rounds)
    assert len(moves) == len(stream.rounds)
    del moves
    live = LiveWeights(weights, size.layout, size.ranks, list, torch.bfloat16, torch.device("cpu"))
    with watch.on("publish: who has what at hand"):
        shares = live.shares()
    with watch.on("publish: files to ranks"):
        files = plan_files(whole, BUCKET, shares, size.ranks)
    assert sum(len(names) for each in files.rounds for names in each.values()) == len(weights.hf)


PARTS: Mapping[str, Callable[[Size, Watch], None]] = {
    "layout": layout, "packing": packing, "pool": pool, "bank": bank, "publish": publish,
}  # fmt: skip


# -- measuring -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One part at one size."""

    seconds: Mapping[str, float]
    mebibytes: float  # beyond what the process began with


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _alone(part: str, size: Size, pipe: Connection) -> None:
    before, watch = peak(), Watch()
    PARTS[part](size, watch)
    pipe.send(Measured(watch.seconds, peak() - before))


def measure(part: str, size: Size) -> Measured:
    """In a process of its own, forked from one that has loaded everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.bench_scale"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_alone, args=(part, size, theirs))
    process.start()
    theirs.close()
    try:
        found: Measured = ours.recv()
    except EOFError:
        raise SystemExit(f"{part} with {size.ranks} ranks ended with code {process.exitcode}") from None
    finally:
        process.join()
    return found


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Of the power of n that fits best: the slope of log seconds over log n."""
    slope, _ = np.polyfit([math.log(size) for size in sizes], [math.log(max(second, 1e-9)) for second in seconds], 1)
    return float(slope)


def table(sizes: Sequence[int], found: Mapping[str, Sequence[Measured]]) -> Iterator[str]:
    """Markdown, and what grows too fast below it."""
    yield "| seconds of CPU, for ranks: | " + " | ".join(f"{size:,}" for size in sizes) + " | exponent |"
    yield "| --- |" + " ---: |" * (len(sizes) + 1)
    grows = []
    for part, measured in found.items():
        for name in measured[0].seconds:
            seconds = [each.seconds[name] for each in measured]
            power = exponent(sizes, seconds) if len(sizes) > 1 else math.nan
            yield f"| {name} | " + " | ".join(f"{second:.3f}" for second in seconds) + f" | {power:.2f} |"
            if power > GROWS:
                grows.append(f"{name}: grows as n^{power:.2f}")
        yield f"| {part}: MiB | " + " | ".join(f"{each.mebibytes:,.0f}" for each in measured) + " | |"
    yield ""
    yield from grows or [f"nothing grows faster than n^{GROWS}"]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(SIZES), metavar="N", help="multiples of 64")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="these parts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers too")
    arguments = parser.parse_args(words)
    wrong = [ranks for ranks in arguments.ranks if ranks % 64]
    if wrong:
        parser.error(f"--ranks {wrong[0]}: the layout takes a multiple of 64 ranks")
    sizes = sorted(set(arguments.ranks))
    found: dict[str, list[Measured]] = {part: [] for part in arguments.only}
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.only:
            for ranks in sizes:
                found[part].append(measure(part, Size(ranks, Path(folder))))
                print(f"{part}, {ranks} ranks: {sum(found[part][-1].seconds.values()):.1f} s", file=sys.stderr, flush=True)
    print("\n".join(table(sizes, found)))
    if arguments.json is not None:
        numbers = {
            part: [{"seconds": dict(each.seconds), "mebibytes": each.mebibytes} for each in found[part]] for part in found
        }
        arguments.json.write_text(json.dumps({"ranks": sizes, "parts": numbers}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
