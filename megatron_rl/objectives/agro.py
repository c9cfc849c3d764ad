"""AGRO: any-generation reward optimisation (arXiv 2503.19612): the regularised reward shall be the same for every response.

    R_i  = r_i − β Σ_t m_it (new_it − reference_it)
    loss = mean over groups of ½ Var_group[R]          gradient: −β E[(R_i − mean R) ∇ log π(y_i)], R held

Only the abstract was found: β and the estimate of the variance are ours. The samples may come from any policy. E and Var are
estimated without bias, Σ/(G−1); `unbiased` off takes Σ/G. Groups with one response have no variance and are not in the mean.
Computed in two passes (groups.py); the sums of log-ratios cross ranks.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from megatron_rl.objectives.base import GroupTable, TokenBatch
from megatron_rl.objectives.compose import Needs, require_positive
from megatron_rl.objectives.groups import GroupSurrogate, group_sizes, group_sums


@dataclass(frozen=True)
class AnyGenerationLoss(GroupSurrogate):
    """AGRO's variance of regularised rewards. Reads the column `reference` and rewards; takes no advantage."""

    name: ClassVar[str] = "agro"

    beta: Annotated[float, "β: weight of the divergence from the reference; 0.01 is ours, to be fitted to the rewards"] = 0.01
    unbiased: Annotated[bool, "Divide the group's squares by G − 1 and not by G"] = True

    def __post_init__(self) -> None:
        require_positive(self, "beta")

    def needs(self) -> Needs:
        return Needs(columns=frozenset({"reference"}), scalars=frozenset({"reward"}), groups=True)

    def statistic(self, batch: TokenBatch) -> Tensor:
        return batch.sum_sequences(batch.log_probs - batch.columns["reference"])

    def shares(self, statistic: Tensor, table: GroupTable) -> Tensor:
        regularised = table.rewards.double() - self.beta * statistic  # [N] R
        sizes = group_sizes(table)  # [N] G
        deviation = regularised - group_sums(regularised, table) / sizes.clamp(min=1)
        divisor = (sizes - 1 if self.unbiased else sizes).clamp(min=1)
        several = (table.lengths > 0) & (sizes > 1)
        groups = table.groups[several].unique().numel()
        return (deviation.square() / (2 * divisor * max(groups, 1))).where(several, 0.0)
