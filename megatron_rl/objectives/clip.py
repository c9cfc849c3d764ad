"""Surrogates with a clipped ratio for each token, w_it = exp(new_it − old_it), d_it = log w_it.

    grpo   min(w A, clip(w, 1−ε_lo, 1+ε_hi) A); dual clip: for A < 0 not below c·A      (PPO 1707.06347, GRPO 2402.03300)
    dapo   grpo with ε 0.2/0.28, and the mean over all tokens of the step              (2503.14476)
    abc    clip(w, 1−ε2, 1+ε1) A for A > 0, clip(w, 1−ε4, 1+ε3) A for A < 0, no min:
           no gradient outside, in all four quadrants                                   (ABC-GRPO 2601.03895)
    dhpo   α·(token branch: grpo) + (1−α)·(sequence branch: gspo_token),
           each clipped in its own region before they are mixed                         (2601.05607, from the abstract)

Inactive (without gradient) is what lies strictly beyond a bound. J aggregates the terms by the option `aggregation`.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from megatron_rl.objectives.aggregate import Aggregation
from megatron_rl.objectives.base import Metric, TokenBatch, select
from megatron_rl.objectives.compose import Needs, Terms, TokenSurrogate, require_not_negative
from megatron_rl.objectives.gspo import RATIO_NEEDS, pessimistic, sequence_branch
from megatron_rl.objectives.metrics import clipped_tokens, token_ratio


@dataclass(frozen=True, kw_only=True)
class TokenPolicyLoss(TokenSurrogate):
    """GRPO's clipped surrogate. Reads the column `old` and the scalar `advantage` (or the column `token_advantage`)."""

    name: ClassVar[str] = "grpo"

    clip_low: Annotated[float, "ε_lo: a token's ratio is clipped below 1 − ε_lo where the advantage is negative"] = 0.2
    clip_high: Annotated[float, "ε_hi: and above 1 + ε_hi where it is positive"] = 0.2
    dual_clip: Annotated[float | None, "c: for A < 0 the term is not below c·A (often 3); none: no such bound"] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "clip_low", "clip_high")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"{self.name}: dual_clip={self.dual_clip} must be above 1, the ratio on policy")

    def needs(self) -> Needs:
        return RATIO_NEEDS

    def terms(self, batch: TokenBatch) -> Terms:
        log_ratio = batch.log_probs - batch.columns["old"]  # [tokens]
        advantage = batch.advantage_tokens()
        values, inactive = pessimistic(log_ratio, advantage, self.clip_low, self.clip_high, self.dual_clip)
        return Terms(values, token_ratio(batch, log_ratio) | clipped_tokens(batch, inactive))


@dataclass(frozen=True, kw_only=True)
class DecoupledClipPolicyLoss(TokenPolicyLoss):
    """DAPO's surrogate: GRPO's with a higher upper bound and every token counting alike."""

    name: ClassVar[str] = "dapo"

    clip_high: Annotated[float, "ε_hi: and above 1 + ε_hi where it is positive"] = 0.28
    aggregation: Annotated[Aggregation, "What the terms are divided by"] = "token_mean"


@dataclass(frozen=True, kw_only=True)
class AdaptiveBoundaryLoss(TokenSurrogate):
    """ABC-GRPO. Reads the column `old` and the scalar `advantage` (or the column `token_advantage`)."""

    name: ClassVar[str] = "abc"

    epsilon_1: Annotated[float, "A > 0: the ratio is clipped above 1 + ε1"] = 0.2
    epsilon_2: Annotated[float, "A > 0: and below 1 − ε2"] = 0.2
    epsilon_3: Annotated[float, "A < 0: the ratio is clipped above 1 + ε3"] = 0.2
    epsilon_4: Annotated[float, "A < 0: and below 1 − ε4"] = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "epsilon_1", "epsilon_2", "epsilon_3", "epsilon_4")

    def needs(self) -> Needs:
        return RATIO_NEEDS

    def terms(self, batch: TokenBatch) -> Terms:
        log_ratio = batch.log_probs - batch.columns["old"]  # [tokens]
        advantage = batch.advantage_tokens()
        ratio = torch.exp(log_ratio.detach())
        low = select(advantage > 0, 1 - self.epsilon_2, 1 - self.epsilon_4, ratio)
        high = select(advantage > 0, 1 + self.epsilon_1, 1 + self.epsilon_3, ratio)
        inactive = ((ratio > high) | (ratio < low)) & (advantage != 0)
        moving = torch.exp(torch.where(inactive | (advantage == 0), 0.0, log_ratio))
        values = torch.where(inactive, ratio.clamp(low, high), moving) * advantage
        return Terms(values, token_ratio(batch, log_ratio) | clipped_tokens(batch, inactive))


@dataclass(frozen=True, kw_only=True)
class HybridPolicyLoss(TokenSurrogate):
    """DHPO. Reads the column `old`, the scalar `advantage` (or the column `token_advantage`), and for α by entropy the entropy.

    The abstract speaks of averaged and entropy-guided mixing and gives no formula for the latter. Ours:
    α_it = clip(H_it / (2⟨H⟩_i), 0, 1), detached: one half for a token of its sequence's mean entropy ⟨H⟩_i, the token's own
    ratio for tokens at twice that (the uncertain ones), the sequence's ratio for certain ones; one half where ⟨H⟩_i is 0.
    """

    name: ClassVar[str] = "dhpo"

    mixing: Annotated[Literal["average", "entropy"], "average: α is the option; entropy: α is each token's own"] = "average"
    alpha: Annotated[float, "α: the token branch's share under mixing=average"] = 0.5
    token_clip_low: Annotated[float, "ε_lo of the token branch"] = 0.2
    token_clip_high: Annotated[float, "ε_hi of the token branch"] = 0.28
    sequence_clip_low: Annotated[float, "ε_lo of the sequence branch"] = 3e-4
    sequence_clip_high: Annotated[float, "ε_hi of the sequence branch"] = 4e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "token_clip_low", "token_clip_high", "sequence_clip_low", "sequence_clip_high")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"dhpo: alpha={self.alpha} is a share, between 0 and 1")

    def needs(self) -> Needs:
        return RATIO_NEEDS | Needs(entropy=self.mixing == "entropy")

    def terms(self, batch: TokenBatch) -> Terms:
        log_ratio = batch.log_probs - batch.columns["old"]  # [tokens]
        advantage = batch.advantage_tokens()
        own, own_inactive = pessimistic(log_ratio, advantage, self.token_clip_low, self.token_clip_high)
        of_sequence = batch.mean_tokens(log_ratio.detach())  # [count]
        shared, inactive = sequence_branch(batch, of_sequence, self.sequence_clip_low, self.sequence_clip_high)
        share = self._share(batch)
        branch: dict[str, Metric] = {f"sequence_{k}": v for k, v in clipped_tokens(batch, inactive).items()}
        metrics = token_ratio(batch, log_ratio) | clipped_tokens(batch, own_inactive) | branch
        return Terms(share * own + (1 - share) * shared, metrics)

    def _share(self, batch: TokenBatch) -> Tensor | float:
        """α of each token ([tokens]), or of all."""
        if self.mixing == "average":
            return self.alpha
        if batch.entropy is None:
            raise ValueError("dhpo with mixing=entropy reads the entropy of every token and was given none")
        entropy = batch.entropy.detach()
        twice = 2 * batch.spread(batch.mean_tokens(entropy))  # [tokens]
        flat = twice <= 0
        return torch.where(flat, 0.5, entropy / torch.where(flat, 1.0, twice)).clamp(0, 1)
