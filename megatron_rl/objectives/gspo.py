"""GSPO: group sequence policy optimisation (arXiv 2507.18071), and GSPO-token from the same paper.

    gspo         log s_i = (1/L_i) Σ_t m_it (new_it − old_it)
                 J = (1/N) Σ_i min(s_i A_i, clip(s_i, 1−ε_lo, 1+ε_hi) A_i)                          (2507.18071)
    gspo_token   s_it = sg[s_i] · exp(new_it − sg[new_it]), s_i as in gspo
                 J = (1/N) Σ_i (1/L_i) Σ_t m_it min(s_it A_it, clip(s_it, 1−ε_lo, 1+ε_hi) A_it)     (2507.18071)

N is the number of sequences in the whole step. GSPO-token is GSPO in value, clip set and gradient when A_it = A_i; it exists to
let the advantage differ between the tokens or turns of a sequence.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from megatron_rl.objectives.base import TokenBatch
from megatron_rl.objectives.compose import Needs, SequenceSurrogate, Terms, TokenSurrogate, require_not_negative
from megatron_rl.objectives.metrics import clipped_sequences, clipped_tokens, sequence_ratio

RATIO_NEEDS = Needs(columns=frozenset({"old"}), scalars=frozenset({"advantage"}))


def pessimistic(
    log_ratio: Tensor, advantage: Tensor, low: float, high: float, ceiling: float | None = None
) -> tuple[Tensor, Tensor]:
    """min(rA, clip(r, 1−low, 1+high) A), for A < 0 not below ceiling·A; and bool: where that is constant.

    It is constant strictly beyond a bound; a ratio on the bound still has its gradient. The exponential is taken where the
    gradient flows and nowhere else, so that a ratio that overflows behind a clip does no harm.
    """
    ratio = torch.exp(log_ratio.detach())
    above, below = (advantage > 0) & (ratio > 1 + high), (advantage < 0) & (ratio < 1 - low)
    inactive = above | below
    bound = ratio.clamp(1 - low, 1 + high)
    if ceiling is not None:
        steep = (advantage < 0) & (ratio > ceiling)
        inactive, bound = inactive | steep, torch.where(steep, ceiling, bound)
    moving = torch.exp(torch.where(inactive | (advantage == 0), 0.0, log_ratio))
    return torch.where(inactive, bound, moving) * advantage, inactive


@dataclass(frozen=True)
class SequencePolicyLoss(SequenceSurrogate):
    """GSPO's clipped sequence-level surrogate. Reads the column `old` and the scalar `advantage`."""

    name: ClassVar[str] = "gspo"

    clip_low: Annotated[float, "ε_lo: the sequence's ratio is clipped below 1 − ε_lo where the advantage is negative"] = 3e-4
    clip_high: Annotated[float, "ε_hi: and above 1 + ε_hi where it is positive"] = 4e-4

    def __post_init__(self) -> None:
        require_not_negative(self, "clip_low", "clip_high")

    def needs(self) -> Needs:
        return RATIO_NEEDS

    def terms(self, batch: TokenBatch) -> Terms:
        log_ratio = batch.mean_tokens(batch.log_probs - batch.columns["old"])  # [count]
        values, inactive = pessimistic(log_ratio, batch.scalars["advantage"], self.clip_low, self.clip_high)
        return Terms(values, sequence_ratio(batch, log_ratio) | clipped_sequences(batch, inactive))


@dataclass(frozen=True, kw_only=True)
class TokenAdvantagePolicyLoss(TokenSurrogate):
    """GSPO-token. Reads the column `old` and the scalar `advantage`, or the column `token_advantage` instead."""

    name: ClassVar[str] = "gspo_token"

    clip_low: Annotated[float, "ε_lo: the sequence's ratio is clipped below 1 − ε_lo where the advantage is negative"] = 3e-4
    clip_high: Annotated[float, "ε_hi: and above 1 + ε_hi where it is positive"] = 4e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "clip_low", "clip_high")

    def needs(self) -> Needs:
        return RATIO_NEEDS

    def terms(self, batch: TokenBatch) -> Terms:
        log_ratio = batch.mean_tokens(batch.log_probs.detach() - batch.columns["old"])  # [count]
        values, inactive = sequence_branch(batch, log_ratio, self.clip_low, self.clip_high)
        return Terms(values, sequence_ratio(batch, log_ratio) | clipped_tokens(batch, inactive))


def sequence_branch(batch: TokenBatch, log_ratio: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """[tokens] GSPO-token's terms from the detached log s_i ([count]), and where they are constant."""
    per_token = batch.spread(log_ratio) + (batch.log_probs - batch.log_probs.detach())
    return pessimistic(per_token, batch.advantage_tokens(), low, high)
