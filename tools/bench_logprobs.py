"""What the fused output layer saves: peak memory and time, forward and backward, against materialising the logits.

Each measurement runs in a fresh process, the ways take turns, and the table shows medians and the ratio of the two. Peak
memory is counted above the inputs (hidden states, weight, labels) and holds the gradients, which both ways return. On a
machine that others use, trust CPU seconds (of all threads) over the clock.
"""

import argparse
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from megatron_rl.policy.logprobs import fused_log_probs

MEGABYTE = 2**20
EXAMPLES = """examples:
  python tools/bench_logprobs.py                                  the whole comparison (8 GB of memory, some minutes)
  python tools/bench_logprobs.py --no-naive                       the fused way alone (2 GB)
  python tools/bench_logprobs.py --vocab 32000 --hidden 256       a small model
  python tools/bench_logprobs.py --needed 0.25                    three quarters of the tokens are prompt or padding
  python tools/bench_logprobs.py --device cuda --dtype bfloat16 --hidden 4096 --rounds 10
"""


@dataclass(frozen=True)
class Measurement:
    """One forward and backward pass in a fresh process."""

    peak: int  # bytes above the inputs
    seconds: float
    cpu_seconds: float
    log_prob: float  # mean over the needed positions
    gradient_norm: float  # of the weight


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [tokens, hidden]
    weight: Tensor  # [vocab, hidden]
    labels: Tensor  # [tokens]
    needed: Tensor  # [tokens]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=120)
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the pack (default %(default)s)")
    parser.add_argument("--vocab", type=int, default=151_936, help="rows of the output layer (default %(default)s, Qwen's)")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=512, help="policy.log_prob_chunk: tokens at a time (default %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default %(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=1.0, help="default %(default)s")
    parser.add_argument("--needed", type=float, default=1.0, help="share of positions that need a log-probability (default 1)")
    parser.add_argument("--entropy", action="store_true", help="also the entropy")
    parser.add_argument("--forward-only", action="store_true", help="without gradients, as old log-probabilities are taken")
    parser.add_argument("--no-naive", action="store_true", help="the fused way alone: no ratios, a third of the memory")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per way (default %(default)s)")
    return parser.parse_args()


def make_inputs(options: argparse.Namespace) -> Inputs:
    generator = torch.Generator(options.device).manual_seed(0)
    place = {"device": options.device, "generator": generator}
    dtype = getattr(torch, options.dtype)
    return Inputs(
        hidden=torch.randn(options.tokens, options.hidden, dtype=dtype, **place).requires_grad_(not options.forward_only),
        weight=torch.randn(options.vocab, options.hidden, dtype=dtype, **place)
        .mul_(options.hidden**-0.5)
        .requires_grad_(not options.forward_only),
        labels=torch.randint(options.vocab, (options.tokens,), **place),
        needed=torch.rand(options.tokens, **place) <= options.needed,
    )


def fused(inputs: Inputs, options: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    return fused_log_probs(
        inputs.hidden,
        inputs.weight,
        inputs.labels,
        temperature=options.temperature,
        chunk=options.chunk,
        vocab_start=0,
        vocab_valid=options.vocab,
        group=None,
        with_entropy=options.entropy,
        needed=inputs.needed,
    )


def naive(inputs: Inputs, options: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    """As a plain loop does it: logits of every position, log-softmax in float32, then the labels and the positions."""
    logits = (inputs.hidden @ inputs.weight.t()).float()  # [tokens, vocab]
    if options.temperature != 1:
        logits = logits / options.temperature
    log_softmax = torch.log_softmax(logits, -1)  # [tokens, vocab]
    del logits
    log_probs = log_softmax.gather(1, inputs.labels[:, None]).squeeze(1).where(inputs.needed, 0.0)
    if not options.entropy:
        return log_probs, None
    return log_probs, -(log_softmax.exp() * log_softmax).sum(1).where(inputs.needed, 0.0)


WAYS = {"naive": naive, "fused": fused}


def measure(way: str, options: argparse.Namespace) -> Measurement:
    """Runs in a process of its own, so that the peak is this way's alone."""
    small = argparse.Namespace(**vars(options) | {"tokens": 16, "vocab": 128, "chunk": 8})
    run(way, make_inputs(small), small)  # libraries make their own buffers now
    inputs = make_inputs(options)
    synchronize(options.device)
    before, start, cpu_start = peak_memory(options.device), time.perf_counter(), time.process_time()
    log_probs = run(way, inputs, options)
    synchronize(options.device)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = peak_memory(options.device) - before
    gradient = inputs.weight.grad
    return Measurement(
        peak=peak,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        log_prob=log_probs.sum().item() / max(1, int(inputs.needed.sum())),
        gradient_norm=0.0 if gradient is None else torch.linalg.vector_norm(gradient, dtype=torch.float32).item(),
    )


def run(way: str, inputs: Inputs, options: argparse.Namespace) -> Tensor:
    with torch.set_grad_enabled(not options.forward_only):
        log_probs, entropy = WAYS[way](inputs, options)
        if not options.forward_only:
            (log_probs.sum() + (0.0 if entropy is None else 0.01 * entropy.sum())).backward()
    return log_probs.detach()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> int:
    """Bytes: of the allocator on a GPU, else of the whole process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def costs(measurement: Measurement) -> tuple[float, float, float]:
    return measurement.peak, measurement.seconds, measurement.cpu_seconds


def main() -> None:
    options = parse()
    ways = ["fused"] if options.no_naive else ["naive", "fused"]
    results: dict[str, list[Measurement]] = {way: [] for way in ways}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for _ in range(options.rounds):
            for way in ways:
                results[way].append(pool.submit(measure, way, options).result())

    passes = "forward" if options.forward_only else "forward and backward"
    print(
        f"{options.tokens:,} tokens ({options.needed:.0%} needed) x {options.vocab:,} vocabulary, hidden {options.hidden:,}, "
        f"{options.dtype}, chunk {options.chunk}, {options.device}, {passes}, medians of {options.rounds} fresh processes"
    )
    print(f"{'':14}{'peak above inputs':>20}{'seconds':>12}{'CPU seconds':>14}{'mean log-prob':>16}{'gradient norm':>16}")
    medians = {way: [statistics.median(one) for one in zip(*map(costs, found), strict=True)] for way, found in results.items()}
    for way, (peak, seconds, cpu_seconds) in medians.items():
        outcome = results[way][0]
        print(
            f"{way:14}{peak / MEGABYTE:17,.0f} MB{seconds:12.3f}{cpu_seconds:14.3f}"
            f"{outcome.log_prob:16.6f}{outcome.gradient_norm:16.6f}"
        )
    if not options.no_naive:
        peak, seconds, cpu_seconds = (ours / theirs for ours, theirs in zip(medians["fused"], medians["naive"], strict=True))
        print(f"{'fused / naive':14}{peak:20.3f}{seconds:12.3f}{cpu_seconds:14.3f}")
    if not options.forward_only:
        inputs = (options.tokens + options.vocab) * options.hidden * getattr(torch, options.dtype).itemsize
        print(f"Of each peak, {inputs / MEGABYTE:,.0f} MB are the gradients of hidden and weight.")


if __name__ == "__main__":
    main()
