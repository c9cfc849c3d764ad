"""REBEL: regressing relative rewards (arXiv 2404.16767), over all pairs of a group.

    Δ_i  = Σ_t m_it (new_it − old_it)
    loss = (1/P) Σ_{pairs (i, j) of a group} (Δ_i − Δ_j − η (r_i − r_j))²

P is the number of pairs of the whole step; a group with a single response has none. Where Δ = η r + a constant of the group,
the loss is 0: one exact step of mirror descent. Computed in two passes (groups.py); the Δ_i cross ranks.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from megatron_rl.objectives.base import GroupTable, Metric, TokenBatch
from megatron_rl.objectives.compose import Needs, require_positive
from megatron_rl.objectives.groups import GroupSurrogate, halves, pair_accuracy, pairs

PAIRS, AGREEING = "rebel_pairs", "rebel_agreeing"


@dataclass(frozen=True)
class RelativeRewardRegression(GroupSurrogate):
    """REBEL's least squares on differences of rewards. Reads the column `old` and rewards; takes no advantage."""

    name: ClassVar[str] = "rebel"

    eta: Annotated[float, "η: how far log-ratios shall follow rewards"] = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "eta")

    def needs(self) -> Needs:
        return Needs(columns=frozenset({"old"}), scalars=frozenset({"reward"}), groups=True)

    def statistic(self, batch: TokenBatch) -> Tensor:
        return batch.sum_sequences(batch.log_probs - batch.columns["old"])

    def shares(self, statistic: Tensor, table: GroupTable) -> Tensor:
        first, second = pairs(table)
        rewards = table.rewards.double()
        gap = statistic[first] - statistic[second] - self.eta * (rewards[first] - rewards[second])  # [pairs]
        return halves(gap.square() / max(len(first), 1), first, second, len(statistic))

    def diagnose(self, statistic: Tensor, table: GroupTable) -> dict[str, Tensor]:
        first, second = pairs(table)
        by_reward = table.rewards.double()[first] - table.rewards.double()[second]
        differ = (by_reward != 0).double()
        agree = (by_reward * (statistic[first] - statistic[second]) > 0).double()
        return {PAIRS: halves(differ, first, second, len(statistic)), AGREEING: halves(agree, first, second, len(statistic))}

    def report(self, batch: TokenBatch) -> dict[str, Metric]:
        """Of the pairs whose rewards differ, the share in which the better response gained more."""
        return {"pair_accuracy": pair_accuracy(batch, AGREEING, PAIRS)}
