"""Two objectives of one's own. In the settings: `objective: {surrogate: "my_objective:PulledBack", options: {pull: 3.0}}`.

    PulledBack   w A − (pull/2) d², w = exp(d), d = new − old: no clip, but a spring that holds the policy near `old`
    BestOnly     −(1/N) Σ_i 1[A_i > 0] (1/L_i) Σ_t m_it new_it: imitate the responses that were better than the rest

Tested in tests/train/test_objective.py.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from megatron_rl.objectives.base import Mean, ObjectiveResult, TokenBatch
from megatron_rl.objectives.compose import Needs, Terms, TokenSurrogate
from megatron_rl.objectives.metrics import token_mean


@dataclass(frozen=True, kw_only=True)
class PulledBack(TokenSurrogate):
    """A surrogate: the terms of tokens are ours, everything else (divisors, masks, weights, penalties) is done for us."""

    name: ClassVar[str] = "pulled_back"

    pull: Annotated[float, "How strong the spring is"] = 2.0

    def needs(self) -> Needs:
        return Needs(columns=frozenset({"old"}), scalars=frozenset({"advantage"}))

    def terms(self, batch: TokenBatch) -> Terms:
        log_ratio = batch.log_probs - batch.columns["old"]  # [tokens] zero where the mask is off
        values = torch.exp(log_ratio) * batch.advantage_tokens() - self.pull / 2 * log_ratio.square()
        return Terms(values, {"spring": token_mean(batch, log_ratio.square())})


class BestOnly:
    """A bare objective: whatever can be called with a batch. Nothing is done for it: it masks and divides by itself."""

    needs_entropy = False

    def __call__(self, batch: TokenBatch) -> ObjectiveResult:
        best = (batch.scalars["advantage"] > 0) & batch.counts  # [count]
        mean = batch.sum_sequences(batch.log_probs) / batch.lengths.clamp(min=1)  # [count] over all ranks that share it
        loss = -torch.where(best, mean, 0.0).sum() / max(batch.divisors.sequences, 1)
        return ObjectiveResult(loss, {"imitated": Mean(best.sum(), batch.counts.sum())})
