"""One rank of those that meet: `ranks.check_ranks` and `ranks.meet` start it. The main rank writes what all have found."""

import json
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import PolicySettings, Settings
from megatron_rl.doctor.apart import Lines
from megatron_rl.doctor.clock import judge
from megatron_rl.doctor.finding import Finding, error, warning, well
from megatron_rl.doctor.shared_folder import look_at_shared_folder
from megatron_rl.policy.layout import Layout
from megatron_rl.train.upstream import quiet_upstream

NUMBERS_ON_GPU, NUMBERS_ON_CPU = 1 << 25, 1 << 20  # of float32 that one rank gives to a collective: 128 and 4 MiB
ROUNDS = 5
STRAGGLES = 0.5  # of the median of its kind: what a group below it is named for
# GB/s of bus bandwidth on GPUs below which something is not used that is there: NVLink inside a machine, InfiniBand between.
EXPECTED = {"tensor": 50.0, "context": 10.0, "expert": 10.0, "expert_tensor": 50.0, "data": 5.0, "world": 5.0}
SLOW = (
    "NCCL_DEBUG=INFO tells which way data takes: NVLink and InfiniBand are wanted, not TCP. Look at nvidia-smi topo -m, at "
    "NCCL_IB_HCA and NCCL_SOCKET_IFNAME, and keep tensor and expert groups inside a machine."
)


def groups_of(layout: Layout) -> dict[str, Any]:
    """The groups that a training step speaks in, by the name of their axis; those of one rank do not speak."""
    groups = layout.groups
    named = {
        "tensor": groups.tp, "context": groups.cp, "data": groups.dp_cp,
        "expert": groups.ep, "expert_tensor": groups.expt_tp, "expert_data": groups.expt_dp, "world": dist.group.WORLD,
    }  # fmt: skip
    return {name: group for name, group in named.items() if group.size() > 1}


def all_reduce(numbers: int, group: Any, device: torch.device) -> tuple[float, bool]:
    """Seconds, and whether the sums are right."""
    values = torch.full((numbers,), float(dist.get_rank(group) + 1), device=device)
    seconds = _timed(lambda: dist.all_reduce(values.clone(), group=group), group, device)
    dist.all_reduce(values, group=group)
    size = group.size()
    return seconds, bool((values == size * (size + 1) / 2).all())


def all_to_all(numbers: int, group: Any, device: torch.device) -> tuple[float, bool]:
    """Seconds, and whether every rank has got its part of every other."""
    size, rank = group.size(), dist.get_rank(group)
    part = numbers // size
    given = torch.arange(size, device=device, dtype=torch.float32).repeat_interleave(part) + 1000 * rank  # [size x part]
    taken = torch.empty_like(given)
    seconds = _timed(lambda: dist.all_to_all_single(taken, given, group=group), group, device)
    wanted = 1000.0 * torch.arange(size, device=device).repeat_interleave(part) + rank
    return seconds, bool((taken == wanted).all())


def _timed(work: Any, group: Any, device: torch.device) -> float:
    """The best of some rounds; the first, which connects the ranks, does not count."""
    best = float("inf")
    for number in range(ROUNDS + 1):
        dist.barrier(group=group)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - started)
    return best


def measure(layout: Layout) -> dict[str, dict[str, Any]]:
    """Of each of this rank's groups: bus bandwidth in GB/s (what a link carries), whether the result is right, who is in it."""
    device = layout.device.torch_device
    numbers = NUMBERS_ON_GPU if layout.device.cuda else NUMBERS_ON_CPU
    found: dict[str, dict[str, Any]] = {}
    for name, group in groups_of(layout).items():
        size = group.size()
        tried = {"all-reduce": (all_reduce, 2 * (size - 1) / size)}
        if name == "expert":
            tried["all-to-all"] = (all_to_all, (size - 1) / size)
        for kind, (work, share) in tried.items():
            seconds, right = work(numbers, group, device)
            rate = share * numbers * 4 / 1e9 / seconds
            found[f"{name} {kind}"] = {"rate": rate, "right": right, "ranks": dist.get_process_group_ranks(group)}
    return found


def judged(everybody: list[dict[str, dict[str, Any]]], cuda: bool) -> Iterator[Finding]:
    """Of each kind of group the slowest is told, and blamed where it lags behind its like."""
    for name in dict.fromkeys(name for each in everybody for name in each):
        of_kind = [each[name] for each in everybody if name in each]
        wrong = next((each for each in of_kind if not each["right"]), None)
        if wrong is not None:
            yield error(
                f"{name}: the result is wrong", f"ranks {_shown(wrong['ranks'])}", "Do not train on these machines. " + SLOW
            )
            continue
        slowest, middle = min(of_kind, key=lambda each: each["rate"]), median(each["rate"] for each in of_kind)
        size = len(slowest["ranks"])
        told = f"{name}: {slowest['rate']:.2f} GB/s in the slowest group of {size} ranks, {middle:.2f} in the median"
        where = f"ranks {_shown(slowest['ranks'])}"
        numbers = {"slowest": slowest["rate"], "median": middle}
        if slowest["rate"] < STRAGGLES * middle or (cuda and slowest["rate"] < EXPECTED.get(name.split()[0], 0.0)):
            yield warning(told, where, SLOW, **numbers)
        else:
            yield well(told, where, **numbers)


def _shown(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + (f" … {ranks[-1]}" if len(ranks) > 4 else "")


def clocks(layout: Layout) -> Iterator[Finding]:
    """Read at one moment, as nearly as a barrier makes one."""
    layout.barrier()
    layout.barrier()  # the first one's end is as ragged as its beginning
    times = layout.main_has((time.time(), socket.gethostname()))
    if times:
        first, host = times[0]
        away, other = max(((first - moment, name) for moment, name in times), key=lambda pair: abs(pair[0]))
        yield judge(away, f"the clock of {other}, the farthest of {len(times)} ranks',", host)


def main() -> None:
    lines, own, folder, *path = sys.argv[1:]
    quiet_upstream()
    settings = load_settings(Path(path[0])) if path else Settings(policy=PolicySettings(config=Path("none")))
    layout = Layout.open(settings)
    local = [Finding(**line) for line in json.loads(Path(own).read_text(encoding="utf-8"))]
    gathered = layout.main_has(local)
    rates = layout.main_has(measure(layout))
    together = [*clocks(layout), *look_at_shared_folder(layout, Path(folder))]
    if layout.is_main:
        host = socket.gethostname()
        together = [*judged(rates, layout.device.cuda), *together]
        told = [
            *(each for every in gathered for each in every),
            *(replace(each, check="ranks", host=host) for each in together),
        ]
        for finding in told:
            Lines(Path(lines)).write(finding.to_json())
    layout.close()


if __name__ == "__main__":
    main()
