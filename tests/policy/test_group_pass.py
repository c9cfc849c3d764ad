"""Whole groups through a real policy: responses of a group in different packs, against the definition in one pack."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rl.config.layout_map import Alignment
from megatron_rl.data.packing import build_pack
from megatron_rl.objectives.base import GroupObjective, Mean, Objective, ObjectiveResult, TokenBatch
from megatron_rl.objectives.compose import ComposedObjective
from megatron_rl.objectives.egsw import EntropyGuidedWeight
from megatron_rl.objectives.gspo import SequencePolicyLoss
from megatron_rl.objectives.rebel import RelativeRewardRegression
from megatron_rl.policy.group_pass import prepare_groups
from megatron_rl.policy.policy import Policy
from megatron_rl.types import Pack
from megatron_rl.types import Sequence as TokenSequence
from tests.parallel.jobs import Arrays, gradients, toy_sequences
from tests.policy.single import opened, tiny_settings

GROUPS = [3, 3, 8, 3, 8, 5, 8]  # unequal, one response alone


def group_sequences() -> list[TokenSequence]:
    """Responses with rewards and old log-probs that are not the policy's, and one without a token that counts."""
    generator = np.random.default_rng(7)
    sequences = []
    for sequence, group in zip(toy_sequences(3, len(GROUPS), 120, 24), GROUPS, strict=True):
        old = generator.normal(-4.0, 0.5, sequence.length).astype(np.float32)
        scalars = {**sequence.scalars, "reward": float(generator.integers(0, 3))}
        sequences.append(replace(sequence, columns={"old": old}, scalars=scalars, group=group))
    nothing = np.zeros(4, np.bool_)
    extra = TokenSequence(
        50, np.arange(4), nothing, {"old": np.zeros(4, np.float32)}, {"advantage": 1.0, "reward": 2.0}, group=8
    )
    return [*sequences, extra]


class InOnePack:
    """The definitions, for a pack that holds everything: loops over pairs and groups, with gradient straight through."""

    def __init__(self, name: str, groups: Sequence[int]) -> None:
        self.name, self.groups, self.needs_entropy = name, groups, name == "egsw"

    def __call__(self, batch: TokenBatch) -> ObjectiveResult:
        rows = [i for i in range(batch.count) if batch.lengths[i] > 0]
        change = batch.sum_sequences(batch.log_probs - batch.columns["old"])
        if self.name == "rebel":
            rewards = batch.scalars["reward"]
            pairs = [(i, j) for i in rows for j in rows if i < j and self.groups[i] == self.groups[j]]
            gaps = [change[i] - change[j] - 0.5 * (rewards[i] - rewards[j]) for i, j in pairs]
            loss = torch.stack(gaps).square().mean()
        else:
            assert batch.entropy is not None
            entropy = batch.sum_sequences(batch.entropy.detach()) / batch.lengths.clamp(min=1)
            score = torch.exp(batch.scalars["advantage"] + 2.0 * entropy)
            loss = torch.zeros(())
            for i in rows:
                group = [j for j in rows if self.groups[i] == self.groups[j]]
                weight = len(group) * score[i] / sum(score[j] for j in group)
                ratio = torch.exp(change[i] / batch.lengths[i])
                advantage = batch.scalars["advantage"][i]
                value = torch.minimum(ratio * advantage, ratio.clamp(0.5, 1.5) * advantage)
                loss = loss - weight * value / len(rows)
        return ObjectiveResult(loss, {"nothing": Mean(torch.zeros(()), torch.ones(()))})


OBJECTIVES: dict[str, GroupObjective] = {
    "rebel": RelativeRewardRegression(eta=0.5),
    "egsw": ComposedObjective(SequencePolicyLoss(0.5, 0.5), [EntropyGuidedWeight(alpha=2.0)]),
}


def step(policy: Policy, packs: list[Pack], objective: Objective) -> tuple[float, Arrays]:
    report = policy.update(packs, objective)
    assert report.applied
    return report.loss, gradients(policy)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_groups_over_packs(name: str, tmp_path: Path) -> None:
    """One pack or many, in any order, with empty ones between. float32 all through: sums in another order, a few 1e-6."""
    objective, sequences = OBJECTIVES[name], group_sequences()
    with opened(tiny_settings(tmp_path, "qwen3", optimizer={"lr": 0.0, "clip_grad": 0.0})) as policy:
        everything = build_pack(sequences, Alignment(1, 1))
        loss, expected = step(policy, [everything], InOnePack(name, [*GROUPS, 8]))
        alone = [build_pack([sequence], Alignment(1, 1)) for sequence in sequences]
        mixed = [
            build_pack(sequences[5:] + sequences[:2], Alignment(8, 32)),
            build_pack([], Alignment(8, 8)),
            build_pack(sequences[2:5], Alignment(1, 1)),
        ]
        for packs in ([everything], alone, mixed, policy.pack(sequences)):
            ours = step(policy, prepare_groups(policy, packs, objective), objective)
            assert ours[0] == pytest.approx(loss, rel=1e-5)
            for parameter, gradient in expected.items():
                atol = 2e-5 * np.abs(gradient).max()
                np.testing.assert_allclose(ours[1][parameter], gradient, rtol=0, atol=atol, err_msg=parameter)


def test_coefficients_are_of_the_current_weights(tmp_path: Path) -> None:
    """After a step they are another loss's; prepared again, loss and gradient are the definition's at the new weights."""
    objective, sequences = OBJECTIVES["rebel"], group_sequences()
    settings = tiny_settings(tmp_path, "qwen3", optimizer={"lr": 1e-3, "clip_grad": 0.0})
    with opened(settings) as policy:
        packs = policy.pack(sequences)
        first = policy.update(prepare_groups(policy, packs, objective), objective)
        again = policy.update(prepare_groups(policy, packs, objective), objective)
    with opened(settings) as policy:
        policy.update(prepare_groups(policy, policy.pack(sequences), objective), objective)
        expected = policy.update([build_pack(sequences, Alignment(1, 1))], InOnePack("rebel", [*GROUPS, 8]))
    assert again.loss != pytest.approx(first.loss, rel=1e-2)
    assert (again.loss, again.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-4)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    sequence = toy_sequences(3, 1, 120, 8)[0]
    old = {"old": np.zeros(sequence.length, np.float32)}
    without_group = replace(sequence, columns=old, scalars={"reward": 1.0})
    without_reward = replace(sequence, columns=old, group=1)
    twice = replace(without_group, group=1)
    objective = OBJECTIVES["rebel"]
    with opened(tiny_settings(tmp_path, "qwen3")) as policy:
        for sequences, words in (
            ([without_group], "belongs to no group"),
            ([without_reward], "no scalar 'reward'"),
            ([twice, twice], "same index"),
        ):
            with pytest.raises(ValueError, match=words):
                prepare_groups(policy, policy.pack(sequences), objective)
