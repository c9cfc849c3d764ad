"""Supervised fine-tuning: the mean negative log-likelihood of the tokens that count.

loss = −(1/T) Σ_i Σ_t m_it new_it,   T the number of such tokens in the whole step
"""

from megatron_rl.objectives.base import Mean, ObjectiveResult, TokenBatch


class SupervisedLoss:
    """Token-mean cross-entropy."""

    needs_entropy = False

    def __call__(self, batch: TokenBatch) -> ObjectiveResult:
        per_sequence = batch.sum_sequences(batch.log_probs)  # [count]
        loss = -per_sequence.sum() / max(batch.divisors.tokens, 1)
        negative_log_likelihood = Mean(-per_sequence.detach().sum(), batch.lengths.sum())
        return ObjectiveResult(loss, {"negative_log_likelihood": negative_log_likelihood})
