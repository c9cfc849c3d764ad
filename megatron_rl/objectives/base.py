"""What an objective sees and what it gives back.

An objective knows no parallelism. It sees the tokens of one micro-batch that this rank holds, flat, and one primitive:
`sum_sequences`, which adds per-token numbers up to one number a sequence, over all the ranks that share the sequence,
differentiably. Divisors are of the whole optimizer step, over all ranks, and known beforehand; so the loss is a plain sum of
contributions and does not depend on how sequences were packed or spread.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Divisors:
    """Totals over the optimizer step: all data-parallel ranks, all micro-batches."""

    sequences: int  # sequences with at least one token that counts
    tokens: int  # tokens that count


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch, as this rank holds it. Everything is float32; entries outside `mask` may hold anything."""

    log_probs: Tensor  # [tokens] of the policy being trained, with gradient
    mask: Tensor  # [tokens] bool: the tokens that count
    segments: Tensor  # [tokens] int64: the sequence of each token, 0 … count−1 wherever mask is set
    lengths: Tensor  # [count] L_i: tokens of the whole sequence that count
    columns: Mapping[str, Tensor]  # [tokens] each: old, rollout, reference log-probs …
    scalars: Mapping[str, Tensor]  # [count] each: advantage …
    divisors: Divisors
    sum_sequences: Callable[[Tensor], Tensor]  # [tokens] -> [count], masked, over all ranks that share the sequences
    entropy: Tensor | None = None  # [tokens], when the objective asked for it

    @property
    def count(self) -> int:
        return self.lengths.size(0)


@dataclass(frozen=True)
class Mean:
    """A metric with its divisor: totals and counts are summed over micro-batches and ranks, then divided."""

    total: Tensor  # scalar
    count: Tensor  # scalar


@dataclass(frozen=True)
class ObjectiveResult:
    """The micro-batch's contribution to the loss (already divided by a global divisor) and its metrics (detached)."""

    loss: Tensor  # scalar
    metrics: Mapping[str, Mean]


class Objective(Protocol):
    """A loss over a micro-batch."""

    @property
    def needs_entropy(self) -> bool:
        """Does it read `TokenBatch.entropy`? Computing that costs a little more."""
        ...

    def __call__(self, batch: TokenBatch) -> ObjectiveResult: ...
