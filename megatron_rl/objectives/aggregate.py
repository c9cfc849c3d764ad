"""From one number a sequence to the loss: which divisor.

    sequence_mean   (1/N) Σ_i (1/L_i) Σ_t x_it     every sequence counts alike (GRPO, GSPO)
    token_mean      (1/T) Σ_i Σ_t x_it             every token counts alike (DAPO, 2503.14476)
    constant        (1/(N·c)) Σ_i Σ_t x_it         no length in it at all (Dr. GRPO, 2503.20783)

N and T are the sequences and tokens that count in the whole optimizer step, over all ranks and micro-batches. A sequence
without such tokens adds nothing, and is not in N. Dropping a token or sequence by a weight of zero does not change the divisor.
"""

from typing import Literal

from torch import Tensor

from megatron_rl.objectives.base import TokenBatch

Aggregation = Literal["sequence_mean", "token_mean", "constant"]


def aggregate(sums: Tensor, batch: TokenBatch, how: Aggregation, constant: float = 1.0) -> Tensor:
    """Scalar: this micro-batch's part of the mean, from the sum over each sequence's tokens (`[count]`)."""
    if how == "token_mean":
        return sums.sum() / max(batch.divisors.tokens, 1)
    if how == "constant":
        return sums.sum() / (constant * max(batch.divisors.sequences, 1))
    return (sums / batch.lengths.clamp(min=1)).sum() / max(batch.divisors.sequences, 1)
