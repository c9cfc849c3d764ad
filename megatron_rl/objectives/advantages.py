"""Advantages: from the rewards of whole groups, before anything is sharded, to one number a sequence.

    grpo                        (r − mean_G) / (std_G + ε)                                  (2402.03300; GSPO 2507.18071)
    dr_grpo                     r − mean_G                                                  (2503.20783; GTPO 2508.03772)
    rloo                        r − mean of the others = G/(G−1) · (r − mean_G)             (2402.14740)
    opo                         r − Σ_G L_j r_j / Σ_G L_j, on policy only                   (2505.23585)
    gdpo                        whiten(Σ_k w_k (r_k − mean_G r_k) / (std_G r_k + ε))        (2601.05242)
    reinforce_plus_plus         whiten(r)                                                   (2501.03262)
    reinforce_plus_plus_baseline  whiten(r − mean_G)                                        (2501.03262)
    per_turn                    (r − mean) / (std + ε) over the same turn of the group      (TL-GRPO 2601.16480, abstract)

std is the unbiased one, whiten(x) = (x − mean)/(std + ε) over the whole batch. All is computed in float64 and given in
float32. A group without differences, a single sample among them, has advantage 0 exactly (but for reinforce_plus_plus, which
knows no groups: a batch without differences has). Sequences without a token count as members of their group like any other.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

Rewards = Tensor | Mapping[str, Tensor]


class Groups:
    """Sums over groups: [N] -> [N], each row getting its group's number."""

    def __init__(self, groups: Tensor) -> None:
        names, self.index = groups.unique(return_inverse=True)  # [N] 0 … groups−1
        self.count = len(names)
        self.sizes = self.sum(torch.ones(len(groups), dtype=torch.float64, device=groups.device))

    def sum(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.count).index_add(0, self.index, values)[self.index]

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.sizes

    def std(self, values: Tensor) -> Tensor:
        """Unbiased; zero of one."""
        return (self.sum((values - self.mean(values)).square()) / (self.sizes - 1).clamp(min=1)).sqrt()

    def equal(self, values: Tensor) -> Tensor:
        """[N] bool: all values of the row's group are the same."""
        smallest = values.new_full((self.count,), torch.inf).scatter_reduce(0, self.index, values, "amin")
        largest = values.new_full((self.count,), -torch.inf).scatter_reduce(0, self.index, values, "amax")
        return (smallest == largest)[self.index]

    def centred(self, values: Tensor) -> Tensor:
        """Less the group's mean, exactly 0 where all are the same and rounding would leave dust."""
        return torch.where(self.equal(values), 0.0, values - self.mean(values))


def whiten(values: Tensor, epsilon: float) -> Tensor:
    """Over the batch: mean 0, standard deviation 1; zeros if there are no differences."""
    everyone = Groups(torch.zeros_like(values, dtype=torch.int64))
    return everyone.centred(values) / (everyone.std(values) + epsilon)


def require_epsilon(advantage: "Advantage", *names: str) -> None:
    """Without it a group (or batch) of equal rewards would give 0/0."""
    for name in names:
        if not getattr(advantage, name) > 0:
            raise ValueError(f"{advantage.name}: {name}={getattr(advantage, name)} must be above 0, as small as you like")


class Advantage(ABC):
    """A frozen dataclass whose fields are its options. Several named rewards are added up, unless it says otherwise."""

    kind: ClassVar[str] = "advantage"
    name: ClassVar[str]
    on_policy_only: ClassVar[bool] = False  # its baseline is right only for samples of the policy itself
    by_component: ClassVar[bool] = False  # it wants the named rewards, not their weighted sum
    per_turn: ClassVar[bool] = False  # rows are turns, and results go into the column `token_advantage`

    def __call__(self, rewards: Rewards, groups: Tensor, lengths: Tensor, turns: Tensor | None = None) -> Tensor:
        """[N] float32 from rewards [N] (or several by name), group ids [N], tokens that count [N], and turn ids [N]."""
        named = {"reward": rewards} if isinstance(rewards, Tensor) else dict(rewards)
        if not named:
            raise ValueError(f"advantage {self.name} was given no reward")
        for name, values in {**named, "lengths": lengths, **({} if turns is None else {"turns": turns})}.items():
            if values.shape != groups.shape or groups.dim() != 1:
                raise ValueError(
                    f"advantage {self.name}: '{name}' has shape {list(values.shape)}, groups {list(groups.shape)}; both are [N]"
                )
            if not torch.isfinite(values).all():
                row = int((~torch.isfinite(values)).nonzero()[0])
                raise ValueError(f"advantage {self.name}: '{name}' of row {row} is {values[row].item()}; it must be finite")
        if not len(groups):
            return torch.zeros_like(groups, dtype=torch.float32)
        if self.per_turn:
            if turns is None:
                raise ValueError(f"advantage {self.name} compares turns and was given none; pass turns=[N]")
            groups = torch.stack([groups, turns], dim=1).unique(dim=0, return_inverse=True)[1]
        return self.of({name: values.double() for name, values in named.items()}, Groups(groups), lengths.double()).float()

    def of(self, rewards: Mapping[str, Tensor], groups: Groups, lengths: Tensor) -> Tensor:
        """[N] float64."""
        return self.of_reward(torch.stack(list(rewards.values())).sum(0), groups, lengths)

    @abstractmethod
    def of_reward(self, reward: Tensor, groups: Groups, lengths: Tensor) -> Tensor:
        """[N] float64 from one reward a row."""


@dataclass(frozen=True, kw_only=True)
class GroupStandardised(Advantage):
    """GRPO's advantage: how many standard deviations of its group a response is better than the group."""

    name: ClassVar[str] = "grpo"

    epsilon: Annotated[float, "ε: added to the standard deviation"] = 1e-6

    def __post_init__(self) -> None:
        require_epsilon(self, "epsilon")

    def of_reward(self, reward: Tensor, groups: Groups, lengths: Tensor) -> Tensor:
        return groups.centred(reward) / (groups.std(reward) + self.epsilon)


@dataclass(frozen=True, kw_only=True)
class GroupCentred(Advantage):
    """Dr. GRPO's advantage, and GTPO's: without a standard deviation, groups of little difference stay little."""

    name: ClassVar[str] = "dr_grpo"

    def of_reward(self, reward: Tensor, groups: Groups, lengths: Tensor) -> Tensor:
        return groups.centred(reward)


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(Advantage):
    """RLOO's advantage: the baseline is the mean of the other responses."""

    name: ClassVar[str] = "rloo"

    def of_reward(self, reward: Tensor, groups: Groups, lengths: Tensor) -> Tensor:
        return groups.centred(reward) * groups.sizes / (groups.sizes - 1).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class LengthWeighted(Advantage):
    """OPO's advantage: the baseline of least variance, if gradients are as long as responses. For exact on-policy training.

    The paper trains with it without a KL penalty and without an entropy bonus; nothing here adds them. A group in which no
    response has tokens has the plain mean as its baseline.
    """

    name: ClassVar[str] = "opo"
    on_policy_only: ClassVar[bool] = True

    def of_reward(self, reward: Tensor, groups: Groups, lengths: Tensor) -> Tensor:
        total = groups.sum(lengths)
        weighted = groups.sum(lengths * reward) / torch.where(total > 0, total, 1.0)
        baseline = torch.where(total > 0, weighted, groups.mean(reward))
        return torch.where(groups.equal(reward), 0.0, reward - baseline)


@dataclass(frozen=True, kw_only=True)
class DecoupledRewards(Advantage):
    """GDPO's advantage: each named reward is standardised in its group by itself, so that none drowns the others."""

    name: ClassVar[str] = "gdpo"
    by_component: ClassVar[bool] = True

    weights: Annotated[Mapping[str, float], "w_k by the reward's name; 1 for those not named"] = field(default_factory=dict)
    epsilon: Annotated[float, "ε: added to the standard deviation of a group"] = 1e-4
    batch_epsilon: Annotated[float, "And to that of the batch"] = 1e-4

    def __post_init__(self) -> None:
        require_epsilon(self, "epsilon", "batch_epsilon")

    def of(self, rewards: Mapping[str, Tensor], groups: Groups, lengths: Tensor) -> Tensor:
        if unknown := sorted(set(self.weights) - set(rewards)):
            raise ValueError(f"gdpo: weights are given for {unknown}, but the rewards are {sorted(rewards)}")
        total = torch.zeros_like(lengths)
        for name, reward in rewards.items():
            total += self.weights.get(name, 1.0) * self.of_reward(reward, groups, lengths)
        undecided = torch.stack([groups.equal(reward) for reward in rewards.values()]).all(0)
        return torch.where(undecided, 0.0, whiten(total, self.batch_epsilon))

    def of_reward(self, reward: Tensor, groups: Groups, lengths: Tensor) -> Tensor:
        return groups.centred(reward) / (groups.std(reward) + self.epsilon)


@dataclass(frozen=True, kw_only=True)
class BatchWhitened(Advantage):
    """REINFORCE++'s advantage: the baseline is the batch, not the group."""

    name: ClassVar[str] = "reinforce_plus_plus"

    epsilon: Annotated[float, "ε: added to the standard deviation of the batch"] = 1e-8

    def __post_init__(self) -> None:
        require_epsilon(self, "epsilon")

    def of_reward(self, reward: Tensor, groups: Groups, lengths: Tensor) -> Tensor:
        return whiten(reward, self.epsilon)


@dataclass(frozen=True, kw_only=True)
class GroupCentredBatchWhitened(Advantage):
    """REINFORCE++ with baseline: less the group's mean, then whitened over the batch."""

    name: ClassVar[str] = "reinforce_plus_plus_baseline"

    epsilon: Annotated[float, "ε: added to the standard deviation of the batch"] = 1e-8

    def __post_init__(self) -> None:
        require_epsilon(self, "epsilon")

    def of_reward(self, reward: Tensor, groups: Groups, lengths: Tensor) -> Tensor:
        return torch.where(groups.equal(reward), 0.0, whiten(groups.centred(reward), self.epsilon))


@dataclass(frozen=True, kw_only=True)
class TurnStandardised(GroupStandardised):
    """GRPO's advantage among the actions that the samples of a group took at the same turn: rows are turns."""

    name: ClassVar[str] = "per_turn"
    per_turn: ClassVar[bool] = True


def zero_advantage_groups(advantages: Tensor, groups: Tensor) -> float:
    """Metric: the share of groups in which every advantage is zero, and there is nothing to learn; divisor: groups."""
    names, index = groups.unique(return_inverse=True)
    alive = torch.zeros(len(names), device=groups.device).index_add(0, index, (advantages != 0).float()) > 0
    return 1 - alive.double().mean().item() if len(names) else 0.0
