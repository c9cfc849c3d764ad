"""Losses that need several responses of a group at once, although those sit in different packs and on different ranks.

Such a loss is a function F(s_1 … s_N) of one number a sequence, s_i (a sum or mean over its tokens), and of who is in which
group. It is computed in two passes, exactly, because F sees the tokens through the s_i alone:

1. `statistics` gives s_i on a forward pass without gradient, with the weights that the update starts from (before the first
   minibatch these are the old log-probs). They are gathered over data-parallel ranks: [N] numbers cross, never [tokens].
2. `prepare` evaluates F on the [N] vectors of the step and gives each sequence a share of F (Σ_i share_i = F) and its slope
   ∂F/∂s_i. They travel in the scalars of the sequences, so packs and ranks no longer matter.

The update's loss is Σ_i share_i + slope_i (s_i − sg[s_i]): F in value and Σ_i ∂F/∂s_i ∇s_i in gradient. A minibatch must hold
whole groups, and each needs passes of its own. Sequences without a token that counts take no part in anything.
"""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_rl.objectives.base import GroupTable, Mean, Metric, TokenBatch
from megatron_rl.objectives.compose import SequenceSurrogate, Terms
from megatron_rl.objectives.metrics import sequence_mean

SHARE, SLOPE = "group_share", "group_slope"


def group_index(table: GroupTable) -> tuple[Tensor, int]:
    """The groups numbered from 0: the number of each row's ([N]), and how many there are."""
    known, index = table.groups.unique(return_inverse=True)
    return index, len(known)


def group_sums(values: Tensor, table: GroupTable) -> Tensor:
    """[N] -> [N]: for each row the sum over the rows of its group that count. Differentiable."""
    index, groups = group_index(table)
    return values.new_zeros(groups).index_add(0, index, torch.where(table.lengths > 0, values, 0.0))[index]


def group_sizes(table: GroupTable) -> Tensor:
    """[N] float64: how many rows of each row's group count."""
    return group_sums(torch.ones_like(table.lengths, dtype=torch.float64), table)


def pairs(table: GroupTable) -> tuple[Tensor, Tensor]:
    """Every unordered pair of rows of one group that count, once: the rows ([pairs]) and the other rows ([pairs])."""
    index, groups = group_index(table)
    rows = (table.lengths > 0).nonzero().squeeze(1)
    rows = rows[index[rows].argsort(stable=True)]  # [counting rows] group by group
    sizes = index[rows].bincount(minlength=groups).tolist()
    couples = [torch.combinations(members, 2) for members in rows.split(sizes)]
    first, second = torch.cat([rows.new_zeros(0, 2), *couples]).unbind(1)
    return first, second


def halves(values: Tensor, first: Tensor, second: Tensor, count: int) -> Tensor:
    """[pairs] -> [count]: what belongs to a pair, given to its two rows in equal parts."""
    return values.new_zeros(count).index_add(0, first, values / 2).index_add(0, second, values / 2)


def pair_accuracy(batch: TokenBatch, agreeing: str, pairs: str) -> Mean:
    """Metric: the share of pairs that are in order, from two scalars made with `halves`."""
    total, count = (torch.where(batch.counts, batch.scalars[name], 0.0).sum() for name in (agreeing, pairs))
    return Mean(total, count)


class GroupSurrogate(SequenceSurrogate):
    """A loss F of one statistic a sequence. What is left to say: the statistic, and F in shares."""

    @abstractmethod
    def statistic(self, batch: TokenBatch) -> Tensor:
        """s_i [count], with gradient."""

    @abstractmethod
    def shares(self, statistic: Tensor, table: GroupTable) -> Tensor:
        """F in parts: [N] that add up to it, divided and all, differentiable by the statistic [N]."""

    def diagnose(self, statistic: Tensor, table: GroupTable) -> dict[str, Tensor]:
        """Further scalars [N] for `report`, of the whole step."""
        return {}

    def report(self, batch: TokenBatch) -> dict[str, Metric]:
        """Metrics made of what `diagnose` gave."""
        return {}

    def statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """The first pass."""
        return {self.name: self.statistic(batch)}

    def prepare(self, table: GroupTable) -> dict[str, Tensor]:
        """Between the passes: shares and slopes of the whole step, in float64."""
        counts = table.lengths > 0
        with torch.enable_grad():
            statistic = torch.where(counts, table.statistics[self.name].detach().double(), 0.0).requires_grad_()  # [N]
            shares = torch.where(counts, self.shares(statistic, table), 0.0)
            (slopes,) = torch.autograd.grad(shares.sum(), statistic)
        return {SHARE: shares.detach(), SLOPE: slopes, **self.diagnose(statistic.detach(), table)}

    def terms(self, batch: TokenBatch) -> Terms:
        """The second pass."""
        require_prepared(self.name, SLOPE, batch.scalars)
        statistic = self.statistic(batch)
        loss = batch.scalars[SHARE] + batch.scalars[SLOPE] * (statistic - statistic.detach())  # [count]
        metrics: dict[str, Metric] = {
            "statistic": sequence_mean(batch, statistic),
            "slope": sequence_mean(batch, batch.scalars[SLOPE].abs()),
            **self.report(batch),
        }
        return Terms(-loss, metrics)

    def mean(self, sums: Tensor, batch: TokenBatch) -> Tensor:
        """Shares have been divided."""
        return sums.sum()


def require_prepared(name: str, scalar: str, scalars: Mapping[str, Tensor]) -> None:
    """The scalar of `prepare` that the second pass reads must be there."""
    if scalar not in scalars:
        raise ValueError(
            f"{name} looks at whole groups and finds no '{scalar}' among the scalars {sorted(scalars)}. Before each update, "
            "give the packs of the step to policy.group_pass.prepare_groups and update with the packs it returns."
        )
