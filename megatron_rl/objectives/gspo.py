"""GSPO: group sequence policy optimisation (arXiv 2507.18071).

    log s_i = (1/L_i) Σ_t m_it (new_it − old_it)
    J       = (1/N) Σ_i min(s_i A_i, clip(s_i, 1−ε_lo, 1+ε_hi) A_i)

N is the number of sequences in the whole step. The loss is −J.
"""

from dataclasses import dataclass

import torch

from megatron_rl.objectives.base import Mean, ObjectiveResult, TokenBatch


@dataclass(frozen=True)
class SequencePolicyLoss:
    """GSPO's clipped sequence-level surrogate. Reads the column `old` and the scalar `advantage`."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    needs_entropy: bool = False

    def __call__(self, batch: TokenBatch) -> ObjectiveResult:
        lengths = batch.lengths.clamp(min=1)
        advantage = batch.scalars["advantage"]  # [count]
        log_ratio = batch.sum_sequences(batch.log_probs - batch.columns["old"]) / lengths  # [count]
        ratio = torch.exp(log_ratio)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        counts = batch.lengths > 0
        value = torch.where(counts, torch.minimum(ratio * advantage, clipped * advantage), 0.0)
        with torch.no_grad():
            sequences = counts.sum()
            inactive = ((advantage > 0) & (ratio > 1 + self.clip_high)) | ((advantage < 0) & (ratio < 1 - self.clip_low))
            metrics = {
                "ratio": Mean(torch.where(counts, ratio, 0.0).sum(), sequences),
                "ratio_deviation": Mean(torch.where(counts, (ratio - 1).abs(), 0.0).sum(), sequences),
                "clip_fraction": Mean((inactive & counts).sum(), sequences),
            }
        return ObjectiveResult(-value.sum() / max(batch.divisors.sequences, 1), metrics)
