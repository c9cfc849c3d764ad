"""Supervised fine-tuning (maximum likelihood, no paper of its own): the mean negative log-likelihood of the tokens that count.

    loss = −(1/T) Σ_i Σ_t m_it new_it

T is the number of such tokens in the whole step.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from megatron_rl.objectives.aggregate import Aggregation
from megatron_rl.objectives.base import TokenBatch
from megatron_rl.objectives.compose import Terms, TokenSurrogate
from megatron_rl.objectives.metrics import token_mean


@dataclass(frozen=True, kw_only=True)
class SupervisedLoss(TokenSurrogate):
    """Cross-entropy of the tokens. Reads nothing but log-probs."""

    name: ClassVar[str] = "sft"

    aggregation: Annotated[Aggregation, "What the terms are divided by"] = "token_mean"

    @property
    def reads_token_advantages(self) -> bool:
        return False

    def terms(self, batch: TokenBatch) -> Terms:
        return Terms(batch.log_probs, {"negative_log_likelihood": token_mean(batch, -batch.log_probs)})
