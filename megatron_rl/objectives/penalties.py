"""Penalties: what is added to the loss, or taken from rewards before there are advantages.

    kl_loss         loss += β · mean_t k(x_t), x = new − reference
                    k1 = x, k2 = x²/2, k3 = e^(−x) − 1 + x      (estimators: a note by J. Schulman 2020; no arXiv number known)
    kl_reward       r_i −= β Σ_t k(x_t), x = old − reference
                    k1, k2, k3 as in kl_loss                    (estimators: a note by J. Schulman 2020; no arXiv number known)
    entropy_bonus   loss −= β · mean_t H_t                                                  (A3C 1602.01783)
    overlong        r_i += c · max(−1, min(0, −(|y_i| − (L_max − L_c)) / L_c))              (DAPO 2503.14476)

kl_loss has the gradient of its estimator as it stands; kl_reward has none, the pass that scores `old` gives it. The mean over
tokens is taken as `aggregation` says (aggregate.py). In the loss k1 has an expected gradient of zero on policy, and k2's is
that of the reverse KL. Penalties are not touched by weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from megatron_rl.objectives.aggregate import Aggregation, aggregate
from megatron_rl.objectives.base import Metric, TokenBatch
from megatron_rl.objectives.compose import LossPenalty, Needs, RewardPenalty, require_not_negative, require_positive
from megatron_rl.objectives.metrics import token_mean

Estimator = Literal["k1", "k2", "k3"]

ESTIMATORS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: x,
    "k2": lambda x: x.square() / 2,
    "k3": lambda x: torch.expm1(-x) + x,
}
REFERENCE = Needs(columns=frozenset({"reference"}))


@dataclass(frozen=True, kw_only=True)
class ReferenceKlLoss(LossPenalty):
    """Holds the policy near a reference, in the loss. Reads the column `reference`.

    The papers' default is no such term at all. The coefficient is what peers use when they have one.
    """

    name: ClassVar[str] = "kl_loss"

    coefficient: Annotated[float, "β"] = 1e-3
    estimator: Annotated[Estimator, "Of the divergence, from one sample"] = "k3"
    aggregation: Annotated[Aggregation, "What the terms are divided by"] = "sequence_mean"
    constant: Annotated[float, "c of aggregation=constant"] = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "constant")
        require_not_negative(self, "coefficient")

    def needs(self) -> Needs:
        return REFERENCE

    def loss(self, batch: TokenBatch) -> tuple[Tensor, Mapping[str, Metric]]:
        divergence = ESTIMATORS[self.estimator](batch.log_probs - batch.columns["reference"])  # [tokens]
        mean = aggregate(batch.sum_sequences(divergence), batch, self.aggregation, self.constant)
        return self.coefficient * mean, {"reference_kl": token_mean(batch, divergence)}


@dataclass(frozen=True, kw_only=True)
class EntropyBonus(LossPenalty):
    """Rewards uncertainty, in the loss, with its gradient. Reads the entropy."""

    name: ClassVar[str] = "entropy_bonus"

    coefficient: Annotated[float, "β; the papers have none, this is what peers use when they do"] = 1e-3
    aggregation: Annotated[Aggregation, "What the terms are divided by"] = "sequence_mean"
    constant: Annotated[float, "c of aggregation=constant"] = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "constant")

    def needs(self) -> Needs:
        return Needs(entropy=True)

    def loss(self, batch: TokenBatch) -> tuple[Tensor, Mapping[str, Metric]]:
        if batch.entropy is None:
            raise ValueError("entropy_bonus reads the entropy of every token and was given none")
        return -self.coefficient * aggregate(batch.sum_sequences(batch.entropy), batch, self.aggregation, self.constant), {}


@dataclass(frozen=True, kw_only=True)
class ReferenceKlReward(RewardPenalty):
    """Holds the policy near a reference, in the reward. Its statistic is Σ_t k of the weights that scored the responses."""

    name: ClassVar[str] = "kl_reward"

    coefficient: Annotated[float, "β"] = 1e-3
    estimator: Annotated[Estimator, "Of the divergence, from one sample"] = "k1"

    def __post_init__(self) -> None:
        require_not_negative(self, "coefficient")

    def needs(self) -> Needs:
        return REFERENCE

    def statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        divergence = ESTIMATORS[self.estimator](batch.log_probs.detach() - batch.columns["reference"])
        return {self.name: batch.sum_sequences(divergence)}

    def adjust(self, rewards: Tensor, lengths: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        return rewards - self.coefficient * torch.where(lengths > 0, statistics[self.name], 0.0)


@dataclass(frozen=True, kw_only=True)
class OverlongPenalty(RewardPenalty):
    """DAPO's soft overlong punishment: from L_max − L_c tokens on the reward falls, by `factor` at L_max, and no further."""

    name: ClassVar[str] = "overlong"

    longest: Annotated[int, "L_max: responses of this length or more get the whole penalty"] = 20480
    buffer: Annotated[int, "L_c: over how many tokens below that it sets in"] = 4096
    factor: Annotated[float, "c: the whole penalty"] = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "longest", "buffer")
        require_not_negative(self, "factor")
        if self.buffer > self.longest:
            raise ValueError(f"overlong: buffer={self.buffer} is longer than longest={self.longest}")

    def adjust(self, rewards: Tensor, lengths: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        excess = lengths - (self.longest - self.buffer)
        return rewards + self.factor * (-excess / self.buffer).clamp(-1, 0).to(rewards.dtype)
