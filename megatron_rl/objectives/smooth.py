"""Surrogates that bend the ratio, or bound a weight, where others stop the gradient. w_it = exp(d_it), d_it = new_it − old_it.

    cispo   sg[clip(w, 1−ε_lo, 1+ε_hi)] A new; mean over all tokens             (MiniMax-M1, 2506.13585)
    sapo    (4/τ) σ(τ(w−1)) A, τ₊ for A > 0, else τ₋                            (2511.20347)
    gmpo    exp((1/L_i) Σ_t d'_it) A_i, d' = min(d, ε_hi) for A > 0, max(d, −ε_lo) for A < 0    (2507.20673)
    sspo    exp((1/L_i) Σ_t log g(w_it)) A_i, g a smooth bounded gate           (2602.19327, from the abstract)
    cfpo    r A − |A|/(2ε) (r−1)², r the token's or the sequence's ratio        (2601.22801, from the abstract)

At ratio 1 every one has the gradient A (of a token's log-prob, times 1/L_i in means over a sequence).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_rl.objectives.aggregate import Aggregation, aggregate
from megatron_rl.objectives.base import TokenBatch, select
from megatron_rl.objectives.compose import (
    Level,
    Needs,
    SequenceSurrogate,
    Surrogate,
    Terms,
    TokenSurrogate,
    require_not_negative,
    require_positive,
)
from megatron_rl.objectives.gspo import RATIO_NEEDS
from megatron_rl.objectives.metrics import clipped_tokens, sequence_ratio, token_ratio

# Beyond this log-ratio σ(τ(w−1)) is 1 to the last bit and its slope 0; holding d there keeps 0 · ∞ out of the gradient.
SATURATED = 20.0


@dataclass(frozen=True, kw_only=True)
class WeightClipPolicyLoss(TokenSurrogate):
    """CISPO: the clip bounds a token's weight and never stops its gradient. Reads `old` and `advantage` (or `token_advantage`).

    The paper sets no lower bound and tunes the upper one without printing it: ε_hi 0.28 is DAPO's. The clip fraction is the
    share of weights that the clip changed.
    """

    name: ClassVar[str] = "cispo"

    clip_low: Annotated[float, "ε_lo: weights are raised to 1 − ε_lo; 1 is no lower bound"] = 1.0
    clip_high: Annotated[float, "ε_hi: weights are cut to 1 + ε_hi"] = 0.28
    aggregation: Annotated[Aggregation, "What the terms are divided by"] = "token_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "clip_low", "clip_high")

    def needs(self) -> Needs:
        return RATIO_NEEDS

    def terms(self, batch: TokenBatch) -> Terms:
        log_ratio = batch.log_probs.detach() - batch.columns["old"]  # [tokens]
        ratio = torch.exp(log_ratio)
        changed = (ratio > 1 + self.clip_high) | (ratio < 1 - self.clip_low)
        weight = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * batch.advantage_tokens()
        return Terms(weight * batch.log_probs, token_ratio(batch, log_ratio) | clipped_tokens(batch, changed))


@dataclass(frozen=True, kw_only=True)
class SoftAdaptiveLoss(TokenSurrogate):
    """SAPO: a sigmoid in place of the clip. Reads the column `old` and the scalar `advantage` (or `token_advantage`)."""

    name: ClassVar[str] = "sapo"

    tau_positive: Annotated[float, "τ₊: steepness where the advantage is positive"] = 1.0
    tau_negative: Annotated[float, "τ₋: steepness elsewhere"] = 1.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "tau_positive", "tau_negative")

    def needs(self) -> Needs:
        return RATIO_NEEDS

    def terms(self, batch: TokenBatch) -> Terms:
        log_ratio = batch.log_probs - batch.columns["old"]  # [tokens]
        advantage = batch.advantage_tokens()
        tau = select(advantage > 0, self.tau_positive, self.tau_negative, log_ratio)
        gate = 4 / tau * torch.sigmoid(tau * torch.expm1(log_ratio.clamp(max=SATURATED)))
        return Terms(gate * advantage, token_ratio(batch, log_ratio))


@dataclass(frozen=True, kw_only=True)
class GeometricMeanLoss(SequenceSurrogate):
    """GMPO: the geometric mean of token ratios, each held back where the advantage would push it further out.

    Reads the column `old` and the scalar `advantage`.
    """

    name: ClassVar[str] = "gmpo"

    clip_low: Annotated[float, "Log-ratios are held at −this where the advantage is negative"] = 0.4
    clip_high: Annotated[float, "Log-ratios are held at this where the advantage is positive"] = 0.4

    def __post_init__(self) -> None:
        require_not_negative(self, "clip_low", "clip_high")

    def needs(self) -> Needs:
        return RATIO_NEEDS

    def terms(self, batch: TokenBatch) -> Terms:
        advantage = batch.scalars["advantage"]
        sign = batch.spread(advantage.sign())  # [tokens]
        log_ratio = batch.log_probs - batch.columns["old"]
        above, below = (sign > 0) & (log_ratio > self.clip_high), (sign < 0) & (log_ratio < -self.clip_low)
        held = torch.where(above, self.clip_high, torch.where(below, -self.clip_low, log_ratio))
        log_mean = batch.mean_tokens(held)  # [count]
        values = torch.exp(torch.where(advantage == 0, 0.0, log_mean)) * advantage
        return Terms(values, sequence_ratio(batch, log_mean) | clipped_tokens(batch, above | below))


def sigmoid_gate(log_ratio: Tensor, tau: Tensor) -> Tensor:
    """log g, g(w) = (4/τ) σ(τ(w−1)), SAPO's; slope 1 and value 2/τ at w = 1."""
    return math.log(4) - torch.log(tau) + logsigmoid(tau * torch.expm1(log_ratio.clamp(max=SATURATED)))


def arctan_gate(log_ratio: Tensor, tau: Tensor) -> Tensor:
    """log g, g(w) = exp(arctan(τ log w)/τ); slope 1 and value 1 at w = 1, between exp(−π/2τ) and exp(π/2τ)."""
    return torch.atan(tau * log_ratio) / tau


GATES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"sigmoid": sigmoid_gate, "arctan": arctan_gate}


@dataclass(frozen=True, kw_only=True)
class SoftSequenceLoss(SequenceSurrogate):
    """SSPO: the geometric mean of gated token ratios. Reads the column `old` and the scalar `advantage`.

    Only the abstract was found. The gates are ours by its words: the sigmoid with SAPO's τ by the sign of A, or an arctan of
    the log-ratio. The gradient of a token is f_i A_i/L_i · ∂log g/∂d; where all ratios are 1 it is A_i/L_i for both gates:
    f_i = 1 and slope 1 with the arctan, f_i = 2/τ and slope τ/2 with the sigmoid.
    """

    name: ClassVar[str] = "sspo"

    gate: Annotated[Literal["sigmoid", "arctan"], "How a token's ratio is bounded"] = "sigmoid"
    tau_positive: Annotated[float, "τ₊: steepness where the advantage is positive"] = 1.0
    tau_negative: Annotated[float, "τ₋: steepness elsewhere"] = 1.05

    def __post_init__(self) -> None:
        require_positive(self, "tau_positive", "tau_negative")

    def needs(self) -> Needs:
        return RATIO_NEEDS

    def terms(self, batch: TokenBatch) -> Terms:
        advantage = batch.scalars["advantage"]
        log_ratio = batch.log_probs - batch.columns["old"]  # [tokens]
        positive = batch.spread((advantage > 0).to(advantage.dtype)) > 0
        tau = select(positive, self.tau_positive, self.tau_negative, log_ratio)
        log_gate = batch.mean_tokens(GATES[self.gate](log_ratio, tau))  # [count]
        return Terms(torch.exp(log_gate) * advantage, token_ratio(batch, log_ratio))


@dataclass(frozen=True, kw_only=True)
class ClippingFreeLoss(Surrogate):
    """CFPO: a parabola with its top at r = 1 + ε·sign(A), which pulls back what has gone beyond.

    Reads the column `old` and the scalar `advantage` (at token level or the column `token_advantage`). Only the abstract was
    found: ε 0.2 is GRPO's clip; at sequence level take one of the size of GSPO's.
    """

    name: ClassVar[str] = "cfpo"

    ratio: Annotated[Literal["token", "sequence"], "Whose ratio r is"] = "token"
    epsilon: Annotated[float, "ε: how far from 1 the top of the parabola lies"] = 0.2
    aggregation: Annotated[Aggregation, "What the terms of tokens are divided by"] = "sequence_mean"
    constant: Annotated[float, "c of aggregation=constant"] = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "epsilon", "constant")

    @property
    def level(self) -> Level:
        return self.ratio

    @property
    def reads_token_advantages(self) -> bool:
        return self.ratio == "token"

    def needs(self) -> Needs:
        return RATIO_NEEDS

    def terms(self, batch: TokenBatch) -> Terms:
        log_ratio = batch.log_probs - batch.columns["old"]  # [tokens]
        if self.ratio == "token":
            return Terms(self._parabola(log_ratio, batch.advantage_tokens()), token_ratio(batch, log_ratio))
        of_sequence = batch.mean_tokens(log_ratio)  # [count]
        return Terms(self._parabola(of_sequence, batch.scalars["advantage"]), sequence_ratio(batch, of_sequence))

    def _parabola(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        excess = torch.expm1(torch.where(advantage == 0, 0.0, log_ratio))  # r − 1
        return (1 + excess) * advantage - advantage.abs() / (2 * self.epsilon) * excess.square()

    def mean(self, sums: Tensor, batch: TokenBatch) -> Tensor:
        if self.ratio == "sequence":
            return super().mean(sums, batch)
        return aggregate(sums, batch, self.aggregation, self.constant)
