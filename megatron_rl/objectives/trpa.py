"""TRPA: trust region preference approximation (arXiv 2504.04524, and the authors' code where the paper says less).

    ρ_i  = (1/L_i) Σ_t m_it (new_it − reference_it)
    h    = a β (ρ_w − ρ_l)      for each pair of a group with r_w > r_l; a = 2.5 where w has the top level, else 1
    loss = −(1/P) Σ_pairs log σ(h) + κ (1/T) Σ_t k3(new ‖ old),      k3 = e^(−x) − 1 + x, x = new − old

P is the number of such pairs in the whole step, T its tokens. In the authors' code a multiplies h, inside of σ, and the top
level is the one their rules call solved. Here rewards are the levels. A group whose rewards are all equal has no pair and adds
nothing but k3. Computed in two passes (groups.py); the ρ_i cross ranks.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_rl.objectives.base import GroupTable, Metric, TokenBatch
from megatron_rl.objectives.compose import Needs, Terms, require_not_negative, require_positive
from megatron_rl.objectives.groups import GroupSurrogate, group_index, halves, pair_accuracy, pairs
from megatron_rl.objectives.metrics import token_mean

PAIRS, AGREEING = "trpa_pairs", "trpa_agreeing"


@dataclass(frozen=True)
class PreferencePairLoss(GroupSurrogate):
    """TRPA's preference loss. Reads the columns `old` and `reference`, and rewards as levels; takes no advantage."""

    name: ClassVar[str] = "trpa"

    beta: Annotated[float, "β: scale of the difference of mean log-ratios"] = 0.1
    top: Annotated[float, "a: factor on h where the winner has the top level"] = 2.5
    top_reward: Annotated[float | None, "From which reward on the level is the top one; none: the best of the group"] = None
    kl: Annotated[float, "κ: weight of the divergence from `old`, the trust region"] = 1e-3

    def __post_init__(self) -> None:
        require_positive(self, "beta", "top")
        require_not_negative(self, "kl")

    def needs(self) -> Needs:
        return Needs(columns=frozenset({"old", "reference"}), scalars=frozenset({"reward"}), groups=True)

    def statistic(self, batch: TokenBatch) -> Tensor:
        return batch.mean_tokens(batch.log_probs - batch.columns["reference"])

    def shares(self, statistic: Tensor, table: GroupTable) -> Tensor:
        winner, loser = _ordered(table)
        ahead = statistic[winner] - statistic[loser]  # [pairs]
        scale = torch.full_like(ahead, self.beta).masked_fill(self._top_level(table)[winner], self.top * self.beta)
        loss = -logsigmoid(scale * ahead)
        return halves(loss / max(len(winner), 1), winner, loser, len(statistic))

    def diagnose(self, statistic: Tensor, table: GroupTable) -> dict[str, Tensor]:
        winner, loser = _ordered(table)
        agree = (statistic[winner] > statistic[loser]).double()
        count = len(statistic)
        return {PAIRS: halves(torch.ones_like(agree), winner, loser, count), AGREEING: halves(agree, winner, loser, count)}

    def report(self, batch: TokenBatch) -> dict[str, Metric]:
        """The share of the pairs in which the winner is ahead."""
        return {"pair_accuracy": pair_accuracy(batch, AGREEING, PAIRS)}

    def terms(self, batch: TokenBatch) -> Terms:
        preference = super().terms(batch)
        log_ratio = batch.log_probs - batch.columns["old"]
        divergence = torch.expm1(-log_ratio) + log_ratio  # [tokens] k3
        penalty = self.kl * batch.sum_sequences(divergence) / max(batch.divisors.tokens, 1)  # [count]
        return Terms(preference.values - penalty, {**preference.metrics, "trust_region_k3": token_mean(batch, divergence)})

    def _top_level(self, table: GroupTable) -> Tensor:
        """[N] bool: has the highest level."""
        rewards = table.rewards.double()
        if self.top_reward is not None:
            return rewards >= self.top_reward
        index, groups = group_index(table)
        counted = torch.where(table.lengths > 0, rewards, -torch.inf)
        best = rewards.new_full((groups,), -torch.inf).scatter_reduce(0, index, counted, "amax")
        return rewards == best[index]


def _ordered(table: GroupTable) -> tuple[Tensor, Tensor]:
    """All pairs of a group with different rewards: the winners and the losers, [pairs] each."""
    first, second = pairs(table)
    better = table.rewards[first] > table.rewards[second]
    differ = table.rewards[first] != table.rewards[second]
    return torch.where(better, first, second)[differ], torch.where(better, second, first)[differ]
