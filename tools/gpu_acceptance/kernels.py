"""The log-probability kernel (`policy/logprobs.py`) against the least that its work can take on this device.

Two floors: bytes over what a copy reaches, and products over what a large product of matrices reaches, both measured just
before. The bytes are those of the inputs, read once a pass, and of gradients, written once; those with logits count also that a
chunk's logits, in float32 and larger than any cache, are written and read once. Products are those of the kernel's own
plan: one of [tokens, hidden] x [hidden, vocabulary] forward, and three backward, of which one computes the logits again.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tools.bench_logprobs import fused, make_inputs
from tools.gpu_acceptance.child import Task
from tools.gpu_acceptance.machine import copy_rate, device, product_rate, seconds_of
from tools.gpu_acceptance.results import Finding

CHUNKS = (512, 2048)  # policy.log_prob_chunk: the default, and one that fills a large chip better
# Of a log-probability: GSPO clips ratios 3e-4 from 1.
EXACT = 1e-4


@dataclass(frozen=True)
class Size:
    tokens: int
    vocabulary: int
    hidden: int
    checked: int  # tokens that are compared with float64


FULL, SMALLEST = Size(8192, 151_936, 4096, 256), Size(64, 512, 64, 16)


def logprobs(task: Task) -> Iterator[Finding]:
    size = SMALLEST if task.smoke else FULL
    moved, multiplied = copy_rate(task.smoke), product_rate(task.smoke)
    yield Finding("tokens x vocabulary x hidden", f"{size.tokens:,} x {size.vocabulary:,} x {size.hidden:,}, bfloat16")
    yield Finding("beside float64", error(size), "nats, largest |Δ log-prob|", EXACT)
    for chunk in (16,) if task.smoke else CHUNKS:
        for backward in (False, True):
            taken = seconds(size, chunk, backward)
            least, with_logits, products = work(size, backward)
            name = f"{'forward and backward' if backward else 'forward'}, chunk {chunk}"
            floor = max(with_logits / moved, products / multiplied)
            yield Finding(name, 1e3 * taken, "ms")
            yield Finding(f"{name}: floor of bytes", 1e3 * least / moved, "ms", note=f"{least / 1e9:.3g} GB")
            yield Finding(f"{name}: the same with logits", 1e3 * with_logits / moved, "ms", note=f"{with_logits / 1e9:.3g} GB")
            yield Finding(f"{name}: floor of products", 1e3 * products / multiplied, "ms")
            yield Finding(f"{name}: beside the larger floor", taken / floor, "times")


def options(size: Size, chunk: int, forward_only: bool) -> Namespace:
    """As tools/bench_logprobs.py takes them."""
    return Namespace(
        tokens=size.tokens, vocab=size.vocabulary, hidden=size.hidden, chunk=chunk, dtype="bfloat16", device=device().type,
        temperature=1.0, needed=1.0, entropy=False, forward_only=forward_only,
    )  # fmt: skip


def work(size: Size, backward: bool) -> tuple[float, float, float]:
    """Bytes at the least, bytes with logits, operations."""
    inputs = 2.0 * (size.tokens + size.vocabulary) * size.hidden
    passes = 2 if backward else 1
    least = inputs * (passes + (1 if backward else 0)) + 12.0 * size.tokens * passes  # labels, log-probs
    logits = 4.0 * size.tokens * size.vocabulary
    products = 2.0 * size.tokens * size.vocabulary * size.hidden
    return least, least + 2 * logits * passes, products * (4 if backward else 1)


def seconds(size: Size, chunk: int, backward: bool) -> float:
    given = options(size, chunk, not backward)
    inputs = make_inputs(given)

    def once() -> None:
        log_probs, _ = fused(inputs, given)
        if backward:
            inputs.hidden.grad = inputs.weight.grad = None
            log_probs.sum().backward()

    return seconds_of(once)


def error(size: Size) -> float:
    """The largest difference from logits, softmax and lookup in float64."""
    part = Size(size.checked, size.vocabulary, size.hidden, size.checked)
    given = options(part, min(CHUNKS), True)
    inputs = make_inputs(given)
    log_probs, _ = fused(inputs, given)
    wide = (inputs.hidden.double(), inputs.weight.double())
    exact = torch.log_softmax(wide[0] @ wide[1].t(), -1).gather(1, inputs.labels[:, None]).squeeze(1)
    return float((log_probs.double() - exact).abs().max())
