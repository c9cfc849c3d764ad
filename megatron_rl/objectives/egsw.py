"""EGSW: entropy-guided sequence weighting (arXiv 2503.22456), the form for whole trajectories.

    w_i = G exp((A_i + α⟨H⟩_i) / P) / Σ_group exp((A_j + α⟨H⟩_j) / P)

⟨H⟩_i is the mean token entropy, P a temperature. The weights of a group's G responses have mean 1, and not sum 1, because the
surrogate divides by the number of responses; only the scale of the loss differs from the paper. Computed in two passes
(groups.py): the ⟨H⟩_i cross ranks, advantages are known. α and P were not found; the defaults are neutral.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from megatron_rl.objectives.base import EffectiveShare, GroupTable, Metric, TokenBatch
from megatron_rl.objectives.compose import Level, Needs, Weight, require_positive
from megatron_rl.objectives.groups import group_index, group_sizes, group_sums, require_prepared

ENTROPY, FACTOR = "egsw_entropy", "egsw"


@dataclass(frozen=True)
class EntropyGuidedWeight(Weight):
    """EGSW's softmax over the group. Reads the entropy and the scalar `advantage`."""

    name: ClassVar[str] = "egsw"
    level: ClassVar[Level] = "sequence"

    alpha: Annotated[float, "α: how much entropy counts beside the advantage"] = 1.0
    temperature: Annotated[float, "P: the higher, the more alike the weights"] = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "temperature")

    def needs(self) -> Needs:
        return Needs(entropy=True, scalars=frozenset({"advantage"}), groups=True)

    def statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        if batch.entropy is None:
            raise ValueError("egsw weighs by entropy and was given none; ask for it in the pass over the group")
        return {ENTROPY: batch.mean_tokens(batch.entropy)}

    def prepare(self, table: GroupTable) -> dict[str, Tensor]:
        if table.advantages is None:
            raise ValueError("egsw weighs by advantage: the sequences need a scalar 'advantage'")
        score = (table.advantages.double() + self.alpha * table.statistics[ENTROPY].double()) / self.temperature  # [N]
        index, groups = group_index(table)
        counted = torch.where(table.lengths > 0, score, -torch.inf)
        largest = score.new_full((groups,), -torch.inf).scatter_reduce(0, index, counted, "amax")[index]
        raw = torch.exp(torch.where(table.lengths > 0, score - largest, -torch.inf))  # [N] in (0, 1]
        total = group_sums(raw, table)
        return {FACTOR: torch.where(table.lengths > 0, group_sizes(table) * raw / total, 0.0)}

    def factors(self, batch: TokenBatch) -> tuple[Tensor, Mapping[str, Metric]]:
        require_prepared(self.name, FACTOR, batch.scalars)
        weights = torch.where(batch.counts, batch.scalars[FACTOR], 0.0)  # [count]
        share = EffectiveShare(weights.sum(), weights.square().sum(), batch.counts.sum())
        return batch.scalars[FACTOR], {"egsw_effective_share": share}
