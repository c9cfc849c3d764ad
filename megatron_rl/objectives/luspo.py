"""LUSPO: length-unbiased sequence policy optimisation (arXiv 2602.05261). GSPO's value times the length of the response.

    J = (1/N) Σ_i L_i min(s_i A_i, clip(s_i, 1−ε_lo, 1+ε_hi) A_i)

GSPO divides each token's gradient by L_i, so tokens of long responses count less; the factor takes that back. Stated as peers
ship it; the clip bounds are GSPO's.
"""

from dataclasses import dataclass
from typing import ClassVar

from megatron_rl.objectives.base import TokenBatch
from megatron_rl.objectives.compose import Terms
from megatron_rl.objectives.gspo import SequencePolicyLoss


@dataclass(frozen=True)
class LengthUnbiasedPolicyLoss(SequencePolicyLoss):
    """LUSPO. Reads the column `old` and the scalar `advantage`."""

    name: ClassVar[str] = "luspo"

    def terms(self, batch: TokenBatch) -> Terms:
        gspo = super().terms(batch)
        return Terms(batch.lengths * gspo.values, gspo.metrics)
