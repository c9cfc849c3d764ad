"""GTPO: group-relative trajectory-based policy optimisation (arXiv 2508.03772), whole, and its two ideas as weights for others.

    gtpo            J = (1/N) Σ_i δ_i (A_i − γ⟨H⟩_i) (1/L_i) Σ_t λ_it w_it,  w_it = exp(new_it − sg[new_it]), on policy
                    A_i = r_i − mean_group r, no std: the advantage `dr_grpo`; λ: gtpo_conflict, δ: gtpo_entropy   (2508.03772)
    gtpo_conflict   λ_it = 1 off conflicts; 2 on one of a positive completion, 0 of a negative one;
                    forward and backward λ multiply                                                    (2508.03772)
    gtpo_entropy    δ_i = 0, which drops the completion:
                    by the paper if ⟨H⟩ before training < ln 2 and ⟨H⟩_i > ln 2,
                    by the authors' code if ⟨H⟩_i > 0.7                                                (2508.03772)

⟨H⟩_i is the mean token entropy, detached. A token conflicts forward if at its position the same id stands in a completion of
positive and in one of negative advantage of the group, and if every token before it in its completion conflicts too; backward
is the same counted from the last token. Completions with A_i = 0 take no part. The ratio is 1 in value; there is no clip, no
KL and no reference, so samples must be of the policy itself: one optimizer step a rollout. Off policy, put the weights on a
surrogate that has a ratio, gspo_token say. The authors' code further divides a completion by max(1, its conflict tokens) and
sums over completions.

λ depends on token ids and signs alone: it is computed before packing, where groups are whole, and travels as the column
`conflict`. The entropy is the update's own. So there is one pass.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from megatron_rl.objectives.aggregate import aggregate
from megatron_rl.objectives.base import Mean, Metric, TokenBatch
from megatron_rl.objectives.compose import Level, Needs, Surrogate, Terms, Weight, require_not_negative
from megatron_rl.objectives.metrics import sequence_mean, token_mean

CONFLICT = "conflict"
PAPER_THRESHOLD = math.log(2.0)
NOTHING = 1e-6  # an advantage this small is the rounding of a mean

Filter = Literal["paper", "code", "none"]

# -- conflicts -------------------------------------------------------------------------------------------------------------


def conflict_runs(completions: Sequence[Sequence[int]], signs: Sequence[int]) -> list[int]:
    """For one group: how many tokens from its start each completion has in its unbroken run of conflicts.

    Goes from position to position while a run lasts, with the ids that stand there as the keys of two hash sets: each token is
    looked at most twice, and only up to the end of the group's longest run.
    """
    runs = [0] * len(completions)
    present = [i for i, sign in enumerate(signs) if sign]  # completions that reach the position
    running = present
    position = 0
    while running:
        present = [i for i in present if position < len(completions[i])]
        positive = {completions[i][position] for i in present if signs[i] > 0}
        negative = {completions[i][position] for i in present if signs[i] < 0}
        conflicts = positive & negative
        running = [i for i in running if position < len(completions[i]) and completions[i][position] in conflicts]
        for i in running:
            runs[i] += 1
        position += 1
    return runs


def gtpo_masks(completions: Sequence[Tensor], signs: Tensor, groups: Tensor | None = None) -> list[Tensor]:
    """λ for each token of each completion, float32 [length] each.

    completions: token ids [length] each. signs [N]: the sign of each advantage. groups [N]: one group if not given.
    """
    if groups is None:
        groups = torch.zeros_like(signs, dtype=torch.int64)
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(row)
    masks = [torch.ones(len(completion)) for completion in completions]
    for rows in members.values():
        ids = [completions[row].tolist() for row in rows]
        of_group = [int(signs[row]) for row in rows]
        forward = conflict_runs(ids, of_group)
        backward = conflict_runs([tokens[::-1] for tokens in ids], of_group)
        for row, sign, first, last in zip(rows, of_group, forward, backward, strict=True):
            factor = 2.0 if sign > 0 else 0.0
            masks[row][:first] *= factor
            masks[row][len(masks[row]) - last :] *= factor
    return masks


def conflict_columns(tokens: Sequence[Tensor], masks: Sequence[Tensor], advantages: Tensor, groups: Tensor) -> list[Tensor]:
    """The column `conflict` of each sequence, aligned with its tokens, 1 where the loss mask is off.

    tokens and masks: [length] each, prompt and response. A completion is what the mask covers: with several turns, positions
    count the policy's own tokens, and what the environment said is passed over.
    """
    signs = torch.where(advantages.abs() > NOTHING, advantages, 0.0).sign()
    covered = [ids[mask] for ids, mask in zip(tokens, masks, strict=True)]
    columns = [torch.ones(len(ids)) for ids in tokens]
    for column, mask, values in zip(columns, masks, gtpo_masks(covered, signs, groups), strict=True):
        column[mask] = values
    return columns


def conflict_share(batch: TokenBatch) -> Mean:
    """Metric: the share of the tokens that are in a conflict."""
    return token_mean(batch, batch.columns[CONFLICT] != 1)


# -- entropy ---------------------------------------------------------------------------------------------------------------


def mean_entropy(batch: TokenBatch, name: str) -> Tensor:
    """[count] ⟨H⟩_i, detached."""
    if batch.entropy is None:
        raise ValueError(f"{name} reads the entropy of every token and was given none")
    return batch.mean_tokens(batch.entropy.detach())


def kept(batch: TokenBatch, entropy: Tensor, how: Filter, threshold: float) -> Tensor:
    """[count] bool: δ_i."""
    if how == "none":
        return torch.ones_like(entropy, dtype=torch.bool)
    if how == "code":
        return entropy <= threshold
    was_low = batch.scalars["initial_entropy"] < PAPER_THRESHOLD
    return ~(was_low & (entropy > PAPER_THRESHOLD))


def filter_needs(how: Filter) -> Needs:
    """The paper's filter wants to know the entropy before training."""
    return Needs(entropy=True, scalars=frozenset({"initial_entropy"} if how == "paper" else ()))


# -- the parts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrajectoryPolicyLoss(Surrogate):
    """GTPO. Reads the entropy, the column `conflict`, the scalar `advantage` and, for the paper's rule, `initial_entropy`."""

    name: ClassVar[str] = "gtpo"
    on_policy_only: ClassVar[bool] = True
    includes: ClassVar[tuple[str, ...]] = ("gtpo_conflict", "gtpo_entropy")

    gamma: Annotated[float, "γ: how much entropy costs"] = 0.1
    filter: Annotated[Filter, "δ: the paper's rule, that of the authors' code, or none"] = "paper"
    threshold: Annotated[float, "Mean entropy from which the code's rule drops (they set 1.02 for Qwen)"] = 0.7
    divide_by_conflicts: Annotated[bool, "As the authors' code: divide by conflict tokens, sum over completions"] = False

    def __post_init__(self) -> None:
        require_not_negative(self, "gamma", "threshold")

    @property
    def level(self) -> Level:
        return "token"

    def needs(self) -> Needs:
        own = Needs(entropy=True, columns=frozenset({CONFLICT}), scalars=frozenset({"advantage"}))
        return own | filter_needs(self.filter)

    def terms(self, batch: TokenBatch) -> Terms:
        entropy = mean_entropy(batch, self.name)  # [count]
        keep = kept(batch, entropy, self.filter, self.threshold)
        factor = torch.where(keep, batch.scalars["advantage"] - self.gamma * entropy, 0.0)
        if self.divide_by_conflicts:
            conflicts = batch.sum_sequences((batch.columns[CONFLICT] != 1).to(batch.lengths.dtype))  # [count]
            factor = factor / conflicts.clamp(min=1)
        ratio = torch.exp(batch.log_probs - batch.log_probs.detach())  # [tokens] 1, with gradient
        metrics: dict[str, Metric] = {
            "conflict_share": conflict_share(batch),
            "filtered_share": sequence_mean(batch, ~keep),
            "sequence_entropy": sequence_mean(batch, entropy),
        }
        return Terms(batch.spread(factor) * batch.columns[CONFLICT] * ratio, metrics)

    def mean(self, sums: Tensor, batch: TokenBatch) -> Tensor:
        if self.divide_by_conflicts:
            return (sums / batch.lengths.clamp(min=1)).sum()
        return aggregate(sums, batch, "sequence_mean")


@dataclass(frozen=True)
class ConflictWeight(Weight):
    """GTPO's λ for any surrogate with a value a token. Reads the column `conflict`."""

    name: ClassVar[str] = "gtpo_conflict"
    level: ClassVar[Level] = "token"

    def needs(self) -> Needs:
        return Needs(columns=frozenset({CONFLICT}))

    def factors(self, batch: TokenBatch) -> tuple[Tensor, Mapping[str, Metric]]:
        return batch.columns[CONFLICT], {"conflict_share": conflict_share(batch)}


@dataclass(frozen=True)
class EntropyFilter(Weight):
    """GTPO's δ for any surrogate. Reads the entropy and, for the paper's rule, the scalar `initial_entropy`."""

    name: ClassVar[str] = "gtpo_entropy"
    level: ClassVar[Level] = "sequence"

    filter: Annotated[Filter, "The paper's rule, that of the authors' code, or none"] = "paper"
    threshold: Annotated[float, "Mean entropy from which the code's rule drops"] = 0.7

    def __post_init__(self) -> None:
        require_not_negative(self, "threshold")

    def needs(self) -> Needs:
        return filter_needs(self.filter)

    def factors(self, batch: TokenBatch) -> tuple[Tensor, Mapping[str, Metric]]:
        keep = kept(batch, mean_entropy(batch, self.name), self.filter, self.threshold)
        return keep.to(batch.lengths.dtype), {"filtered_share": sequence_mean(batch, ~keep)}
