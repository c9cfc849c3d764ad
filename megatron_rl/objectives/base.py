"""What an objective sees and what it gives back.

An objective knows no parallelism. It sees the tokens of one micro-batch that this rank holds, flat, and one primitive:
`sum_sequences`, which adds per-token numbers up to one number a sequence, over all the ranks that share the sequence,
differentiably. Divisors are of the whole optimizer step, over all ranks, and known beforehand; so the loss is a plain sum of
contributions and does not depend on how sequences were packed or spread.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor


def precise(values: Tensor) -> Tensor:
    """In float32 at least: the clip bands of sequence ratios are thinner than one step of bfloat16."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def select(condition: Tensor, first: float, second: float, like: Tensor) -> Tensor:
    """One of two numbers by a condition, in the number format of `like`; torch.where alone would round them to float32."""
    return torch.where(condition, like.new_full((), first), like.new_full((), second))


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

    @property
    def counts(self) -> Tensor:
        """[count] bool: the sequences with at least one token that counts."""
        return self.lengths > 0

    def cleaned(self) -> Self:
        """The same batch in float32 or better, with zeros wherever the mask is off, so that nothing there can do harm."""

        def clean(values: Tensor) -> Tensor:
            return torch.where(self.mask, precise(values), 0.0)

        return replace(
            self,
            log_probs=clean(self.log_probs),
            lengths=precise(self.lengths),
            columns={name: clean(values) for name, values in self.columns.items()},
            scalars={name: precise(values) for name, values in self.scalars.items()},
            entropy=None if self.entropy is None else clean(self.entropy),
        )

    def mean_tokens(self, values: Tensor) -> Tensor:
        """[tokens] -> [count]: the mean over the sequence's tokens that count, zero where there are none. Differentiable."""
        return self.sum_sequences(values) / self.lengths.clamp(min=1)

    def own_sum(self, values: Tensor) -> Tensor:
        """[tokens] -> scalar: over the tokens that count and that this rank holds. For metrics that are `partial`."""
        return torch.where(self.mask, values.detach().to(self.lengths.dtype), 0.0).sum()

    @property
    def own_tokens(self) -> Tensor:
        """Scalar: how many tokens that count this rank holds."""
        return self.mask.sum().to(self.lengths.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """[count] -> [tokens]: each token gets its sequence's number, zero where the mask is off. For detached numbers."""
        if values.requires_grad:
            raise ValueError(
                "TokenBatch.spread was given numbers with a gradient, which would miss the tokens that other context-parallel "
                "ranks hold. Detach them, or write the value with sum_sequences alone."
            )
        if not self.count:
            return torch.zeros_like(self.mask, dtype=values.dtype)
        return torch.where(self.mask, values[torch.where(self.mask, self.segments, 0)], 0.0)

    def advantage_tokens(self) -> Tensor:
        """[tokens] The advantage of each token: the column `token_advantage` where there is one, else its sequence's."""
        given = self.columns.get("token_advantage")
        return self.spread(self.scalars["advantage"]) if given is None else given


# -- metrics ---------------------------------------------------------------------------------------------------------------
# Numbers made of `sum_sequences` are of whole sequences: all ranks that share them hold the same, and one of them is counted.
# Numbers of the tokens that a rank happens to hold are `partial`: those of all ranks are added up, once a step, and nothing
# has to cross ranks for them before.


@dataclass(frozen=True)
class Mean:
    """A metric with its divisor: totals and counts are summed over micro-batches and ranks, then divided."""

    total: Tensor  # scalar
    count: Tensor  # scalar
    partial: bool = False  # of this rank's tokens

    def sums(self) -> tuple[Tensor, ...]:
        return self.total, self.count

    @staticmethod
    def finish(total: float, count: float) -> float:
        return total / count if count else 0.0


@dataclass(frozen=True)
class Deviation:
    """The standard deviation of numbers whose sum, sum of squares and count are summed over micro-batches and ranks."""

    total: Tensor  # scalar; of the numbers less a constant near their mean, so that nothing cancels
    squares: Tensor  # scalar
    count: Tensor  # scalar
    partial: bool = False  # of this rank's tokens

    def sums(self) -> tuple[Tensor, ...]:
        return self.total, self.squares, self.count

    @staticmethod
    def finish(total: float, squares: float, count: float) -> float:
        return max(squares / count - (total / count) ** 2, 0.0) ** 0.5 if count else 0.0


@dataclass(frozen=True)
class EffectiveShare:
    """The effective sample size of weights as a share of their count: (Σρ)² / (n Σρ²)."""

    total: Tensor  # scalar
    squares: Tensor  # scalar
    count: Tensor  # scalar
    partial: bool = False  # of this rank's tokens

    def sums(self) -> tuple[Tensor, ...]:
        return self.total, self.squares, self.count

    @staticmethod
    def finish(total: float, squares: float, count: float) -> float:
        return total**2 / (count * squares) if count and squares else 0.0


@dataclass(frozen=True)
class Largest:
    """The largest of all micro-batches and ranks; −∞ for none (reported as zero). May differ between context ranks."""

    value: Tensor  # scalar


@dataclass(frozen=True)
class Smallest:
    """The smallest of all micro-batches and ranks; +∞ for none (reported as zero). May differ between context ranks."""

    value: Tensor  # scalar


Summed = Mean | Deviation | EffectiveShare
Metric = Summed | Largest | Smallest


# -- objectives ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectiveResult:
    """The micro-batch's contribution to the loss (already divided by a global divisor) and its metrics (detached)."""

    loss: Tensor  # scalar
    metrics: Mapping[str, Metric]


class Objective(Protocol):
    """A loss over a micro-batch."""

    @property
    def needs_entropy(self) -> bool:
        """Does it read `TokenBatch.entropy`? Computing that costs a little more."""
        ...

    def __call__(self, batch: TokenBatch) -> ObjectiveResult: ...


@dataclass(frozen=True)
class GroupTable:
    """All sequences of an optimizer step side by side, one row each, gathered over ranks in the order of their index."""

    groups: Tensor  # [N] int64: samples of one prompt share a number
    rewards: Tensor  # [N]
    lengths: Tensor  # [N] tokens that count
    statistics: Mapping[str, Tensor]  # [N] each: what `statistics` of the objective gave for every sequence
    advantages: Tensor | None = None  # [N], where the objective reads advantages


class GroupObjective(Objective, Protocol):
    """An objective that looks at a whole group, whose samples may lie in different packs and on different ranks.

    Before each optimizer step: `statistics` on every micro-batch of a forward pass with the current weights, the [count]
    vectors gathered to a `GroupTable`, `prepare` on the table, its [N] vectors dealt out again as scalars. The objective F of
    the group is a function of the statistics, so Σ_i (∂F/∂statistic_i) · statistic_i, coefficients held, has F's gradient.
    """

    def statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """[count] each, detached."""
        ...

    def prepare(self, table: GroupTable) -> dict[str, Tensor]:
        """[N] each: scalars that `__call__` reads."""
        ...
