"""Weights: what is done about samples that the policy of today would not quite have drawn.

With ρ_t = exp(old_t − rollout_t), the trainer's old probability over the rollout engine's, for the same weights:

    tis               f_t = min(ρ_t, C)                               (a blog post, Yao et al. 2025; no arXiv number known)
    icepop            f_t = ρ_t if low ≤ ρ_t ≤ high, else 0                      (Ring-1T 2510.18855)
    sequence_weight   f_i = exp((1/L_i) Σ_t log ρ_t) with form geometric
                      f_i = exp(Σ_t log ρ_t) with form product                   (as peers ship it; no arXiv number known)
    geometric_mask    f_i = 1 if low ≤ exp((1/L_i) Σ_t log ρ_t) ≤ high, else 0   (as peers ship it; no arXiv number known)
    opsm              f_i = 0 if A_i < 0 and (1/L_i) Σ_t (old_t − new_t) > δ,
                      else 1                                                     (DeepSeek-V3.2 2512.02556)

All bounds belong to the inside. Factors are detached. Zero drops the token or sequence; divisors stay as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from megatron_rl.objectives.base import Metric, TokenBatch
from megatron_rl.objectives.compose import Level, Needs, Weight, require_not_negative, require_positive
from megatron_rl.objectives.metrics import sequence_mean, token_mean

MISMATCH = Needs(columns=frozenset({"old", "rollout"}))


def log_mismatch(batch: TokenBatch) -> Tensor:
    """[tokens] log ρ_t."""
    return batch.columns["old"] - batch.columns["rollout"]


def require_order(part: Weight, low: float, high: float) -> None:
    if not low <= high:
        raise ValueError(f"{part.name}: low={low} is above high={high}, so everything would be dropped")


@dataclass(frozen=True, kw_only=True)
class TruncatedImportanceWeight(Weight):
    """TIS: token ratios of trainer over rollout, cut at C. Reads the columns `old` and `rollout`."""

    name: ClassVar[str] = "tis"
    level: ClassVar[Level] = "token"

    cap: Annotated[float, "C: the largest weight"] = 2.0

    def __post_init__(self) -> None:
        require_positive(self, "cap")

    def needs(self) -> Needs:
        return MISMATCH

    def factors(self, batch: TokenBatch) -> tuple[Tensor, Mapping[str, Metric]]:
        ratio = torch.exp(log_mismatch(batch))
        return ratio.clamp(max=self.cap), {"tis_cut": token_mean(batch, ratio > self.cap)}


@dataclass(frozen=True, kw_only=True)
class IcePopWeight(Weight):
    """IcePop: token ratios of trainer over rollout, tokens outside of the bounds dropped. Reads `old` and `rollout`."""

    name: ClassVar[str] = "icepop"
    level: ClassVar[Level] = "token"

    low: Annotated[float, "The smallest ratio that is kept"] = 0.5
    high: Annotated[float, "The largest ratio that is kept"] = 5.0

    def __post_init__(self) -> None:
        require_order(self, self.low, self.high)

    def needs(self) -> Needs:
        return MISMATCH

    def factors(self, batch: TokenBatch) -> tuple[Tensor, Mapping[str, Metric]]:
        ratio = torch.exp(log_mismatch(batch))
        keep = (ratio >= self.low) & (ratio <= self.high)
        return torch.where(keep, ratio, 0.0), {"icepop_dropped": token_mean(batch, ~keep)}


@dataclass(frozen=True, kw_only=True)
class SequenceWeight(Weight):
    """One ratio of trainer over rollout a sequence. Reads the columns `old` and `rollout`.

    The product is the unbiased weight, and ≈ 0 or huge for long responses; the geometric mean is biased and tame. Peers call
    either of them "sequence".
    """

    name: ClassVar[str] = "sequence_weight"
    level: ClassVar[Level] = "sequence"

    form: Annotated[Literal["geometric", "product"], "Of token ratios: the geometric mean, or the product"] = "geometric"
    cap: Annotated[float | None, "The largest weight; none: as it is"] = None

    def __post_init__(self) -> None:
        if self.cap is not None:
            require_positive(self, "cap")

    def needs(self) -> Needs:
        return MISMATCH

    def factors(self, batch: TokenBatch) -> tuple[Tensor, Mapping[str, Metric]]:
        reduce = batch.mean_tokens if self.form == "geometric" else batch.sum_sequences
        weight = torch.exp(reduce(log_mismatch(batch)))  # [count]
        weight = weight if self.cap is None else weight.clamp(max=self.cap)
        return weight, {"sequence_weight": sequence_mean(batch, weight)}


@dataclass(frozen=True, kw_only=True)
class GeometricMask(Weight):
    """Keeps sequences whose geometric mean ratio of trainer over rollout is in bounds. Reads `old` and `rollout`."""

    name: ClassVar[str] = "geometric_mask"
    level: ClassVar[Level] = "sequence"

    low: Annotated[float, "The smallest geometric mean that is kept"] = 0.999
    high: Annotated[float, "The largest geometric mean that is kept"] = 1.002

    def __post_init__(self) -> None:
        require_order(self, self.low, self.high)

    def needs(self) -> Needs:
        return MISMATCH

    def factors(self, batch: TokenBatch) -> tuple[Tensor, Mapping[str, Metric]]:
        mean = torch.exp(batch.mean_tokens(log_mismatch(batch)))  # [count]
        keep = (mean >= self.low) & (mean <= self.high)
        return keep.to(mean.dtype), {"geometric_mask_dropped": sequence_mean(batch, ~keep)}


@dataclass(frozen=True, kw_only=True)
class OffPolicySequenceMask(Weight):
    """OPSM: drops bad responses that the policy has moved away from. Reads the column `old` and the scalar `advantage`.

    δ has no published value; 1e-4 is what a peer ships.
    """

    name: ClassVar[str] = "opsm"
    level: ClassVar[Level] = "sequence"
    off_policy_only: ClassVar[bool] = True

    delta: Annotated[float, "δ: how far the mean log-prob may have fallen"] = 1e-4

    def __post_init__(self) -> None:
        require_not_negative(self, "delta")

    def needs(self) -> Needs:
        return Needs(columns=frozenset({"old"}), scalars=frozenset({"advantage"}))

    def factors(self, batch: TokenBatch) -> tuple[Tensor, Mapping[str, Metric]]:
        fallen = batch.mean_tokens(batch.columns["old"] - batch.log_probs)  # [count]
        drop = (batch.scalars["advantage"] < 0) & (fallen > self.delta)
        return (~drop).to(fallen.dtype), {"opsm_dropped": sequence_mean(batch, drop)}
