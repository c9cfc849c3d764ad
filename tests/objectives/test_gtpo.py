"""GTPO: conflict masks against golden ones and nested loops, the loss against its formula token by token."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.objectives.compose import ComposedObjective
from megatron_rl.objectives.gtpo import (
    ConflictWeight,
    EntropyFilter,
    Filter,
    TrajectoryPolicyLoss,
    conflict_columns,
    conflict_runs,
    gtpo_masks,
)
from megatron_rl.objectives.sft import SupervisedLoss
from tests.objectives.reference import Sample
from tests.objectives.samples import random_samples, sample_of, steps
from tests.objectives.steps import Layout, metric, run

GOLDEN = {
    "beginning and end": ("+-+", [[5, 6, 7, 9], [5, 6, 8, 9], [5, 1, 9]], [[2, 2, 1, 2], [0, 0, 1, 0], [2, 1, 2]]),
    "both ways": ("+-", [[5, 6], [5, 6]], [[4, 4], [0, 0]]),
    "runs that others keep up": (
        "+--+",
        [[5, 6, 7], [5, 8, 7], [1, 6, 2], [5, 6, 3]],
        [[4, 4, 4], [0, 1, 0], [1, 1, 1], [2, 2, 1]],
    ),
    "no advantage, no part": ("+0+", [[5, 6, 7]] * 3, [[1, 1, 1]] * 3),
    "no advantage, no counterpart": ("+0", [[5], [5]], [[1], [1]]),
    "one sign": ("--", [[5, 6], [5, 6]], [[1, 1], [1, 1]]),
    "empty": ("+-+", [[], [5], [5]], [[], [0], [4]]),
}

SIGN = {"+": 1.0, "-": -1.0, "0": 0.0}


def masks_of(signs: Sequence[float], completions: Sequence[Sequence[int]], groups: Sequence[int] = ()) -> list[list[float]]:
    ids = [torch.tensor(row, dtype=torch.int64) for row in completions]
    of = torch.tensor(groups) if groups else None
    return [mask.tolist() for mask in gtpo_masks(ids, torch.tensor(signs), of)]


def slow_masks(signs: Sequence[float], completions: Sequence[Sequence[int]]) -> list[list[float]]:
    """By the definition: every token against every token of every completion."""

    def conflicts(i: int, position: int, from_end: bool) -> bool:
        seen = set()
        for j, other in enumerate(completions):
            if position < len(other):
                theirs, mine = (row[len(row) - 1 - position] if from_end else row[position] for row in (other, completions[i]))
                if theirs == mine:
                    seen.add(signs[j])
        return signs[i] != 0 and {1.0, -1.0} <= seen

    answer = []
    for i, row in enumerate(completions):
        factors = []
        for t in range(len(row)):
            forward = all(conflicts(i, u, False) for u in range(t + 1))
            backward = all(conflicts(i, u, True) for u in range(len(row) - t))
            factors.append((2.0 if signs[i] > 0 else 0.0) ** (forward + backward))
        answer.append(factors)
    return answer


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_masks(name: str) -> None:
    signs, completions, expected = GOLDEN[name]
    assert masks_of([SIGN[sign] for sign in signs], completions) == expected


responses = st.lists(
    st.tuples(st.sampled_from([1.0, -1.0, 0.0]), st.lists(st.integers(0, 2), max_size=6)), min_size=1, max_size=5
)


@given(group=responses)
@settings(max_examples=300, deadline=None)
def test_masks_of_random_tokens(group: list[tuple[float, list[int]]]) -> None:
    signs, completions = [sign for sign, _ in group], [row for _, row in group]
    assert masks_of(signs, completions) == slow_masks(signs, completions)


@given(groups=st.lists(responses, min_size=1, max_size=3), generator=st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_groups_do_not_touch(groups: list[list[tuple[float, list[int]]]], generator: random.Random) -> None:
    """Groups laid out in any order, their samples mixed: each as if it were alone."""
    alone = [mask for group in groups for mask in slow_masks([sign for sign, _ in group], [row for _, row in group])]
    flat = [(3 - number, sign, row) for number, group in enumerate(groups) for sign, row in group]
    order = generator.sample(range(len(flat)), len(flat))
    numbers, signs, completions = zip(*(flat[i] for i in order), strict=True)
    assert masks_of(signs, completions, numbers) == [alone[i] for i in order]


class Counted(int):
    """A token id that counts how often it is hashed."""

    hashes = 0

    def __hash__(self) -> int:
        Counted.hashes += 1
        return int.__hash__(self)

    __eq__ = int.__eq__


@pytest.mark.parametrize("length", [100, 1000, 10000])
def test_cost_is_linear_in_tokens(length: int) -> None:
    """At worst — all responses equal, and one much longer — a few hashes a token, whatever the length and the id."""
    rows = [[Counted(10**9 + t) for t in range(length)] for _ in range(6)]
    Counted.hashes = 0
    assert conflict_runs(rows, [1, -1, 1, -1, 1, 0]) == [length] * 5 + [0]
    assert Counted.hashes <= 3 * 6 * length
    rows[0], rows[5] = rows[0][:1], rows[5] * 3
    Counted.hashes = 0
    conflict_runs([rows[0], rows[5]], [1, -1])
    assert Counted.hashes <= 10  # it stops where the runs do


def test_columns_are_of_the_policys_own_tokens() -> None:
    """Prompts of different lengths and what the environment says in between are passed over; rounding is no sign."""
    tokens = [[9, 9, 5, 6, 7], [9, 5, 8, 8, 6, 3], [5, 6], [9, 5, 6]]
    masks = [[0, 0, 1, 1, 1], [0, 1, 0, 0, 1, 1], [0, 1], [0, 1, 1]]
    columns = conflict_columns(
        [torch.tensor(row) for row in tokens],
        [torch.tensor(row, dtype=torch.bool) for row in masks],
        torch.tensor([0.5, -0.5, 0.0, 1e-9]),
        torch.tensor([4, 4, 4, 4]),
    )
    assert [column.tolist() for column in columns] == [[1, 1, 2, 2, 1], [1, 0, 1, 1, 0, 1], [1, 1], [1, 1, 1]]


# -- the loss --------------------------------------------------------------------------------------------------------------


def keeps(sample: Sample, entropy: float, how: Filter) -> bool:
    if how == "paper":
        return not (sample.initial_entropy < math.log(2) < entropy)
    return how == "none" or entropy <= 0.7


def by_loops(samples: Sequence[Sample], how: Filter, gamma: float, divide: bool) -> tuple[float, list[list[float]]]:
    loss, gradients = 0.0, []
    number = sum(1 for sample in samples if sample.length)
    for sample in samples:
        gradients.append([0.0] * sample.length)
        if not sample.length:
            continue
        entropy = sum(sample.entropy) / sample.length
        factor = (sample.advantage - gamma * entropy) / sample.length if keeps(sample, entropy, how) else 0.0
        factor /= max(1, sum(value != 1 for value in sample.conflict)) if divide else number
        for t, value in enumerate(sample.conflict):
            loss -= factor * value
            gradients[-1][t] = -factor * value
    return loss, gradients


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("how", ["paper", "code", "none"])
@given(samples=steps(), generator=st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_loss(how: Filter, divide: bool, samples: list[Sample], generator: random.Random) -> None:
    order = generator.sample(range(len(samples)), len(samples))
    layout = Layout((tuple(order[: len(order) // 2]), tuple(order[len(order) // 2 :])), before=1)
    objective = TrajectoryPolicyLoss(gamma=0.3, filter=how, divide_by_conflicts=divide)
    loss, gradients = by_loops(samples, how, 0.3, divide)
    outcome = run(objective, samples, layout)
    assert outcome.answer.loss == pytest.approx(loss, abs=1e-12)
    for ours, theirs in zip(outcome.answer.gradient, gradients, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)
    tokens = [value for sample in samples for value in sample.conflict]
    counted = [sample for sample in samples if sample.length]
    dropped = sum(not keeps(s, sum(s.entropy) / s.length, how) for s in counted)
    assert metric(outcome, "conflict_share") == pytest.approx(sum(v != 1 for v in tokens) / max(len(tokens), 1))
    assert metric(outcome, "filtered_share") == pytest.approx(dropped / max(len(counted), 1))


def test_ratio_is_one_whatever_old_is() -> None:
    """On-policy: neither the old log-probs nor the rollout's enter."""
    samples = random_samples(random.Random(2), 2, 4)
    moved = [replace(s, old=[value + 1.0 for value in s.old], rollout=[0.0] * s.length) for s in samples]
    objective = TrajectoryPolicyLoss(filter="none")
    assert run(objective, samples).answer == run(objective, moved).answer


@pytest.mark.parametrize(("initial", "entropy", "kept"), [(0.5, 0.69, True), (0.5, 0.70, False), (0.7, 0.70, True)])
def test_paper_threshold(initial: float, entropy: float, kept: bool) -> None:
    """ln 2 = 0.6931…: a policy that started below it may not go above; one that started above may be anywhere."""
    sample = sample_of([0.0, 0.0], entropy=[entropy - 0.2, entropy + 0.2], initial_entropy=initial)
    outcome = run(TrajectoryPolicyLoss(), [sample])
    assert (outcome.answer.loss != 0.0) is kept
    assert metric(outcome, "filtered_share") == (0.0 if kept else 1.0)


def test_code_threshold() -> None:
    """The authors' code keeps a mean entropy that equals its threshold."""
    samples = [sample_of([0.0], entropy=[value]) for value in (0.5, 0.75, 1.02, 1.5)]
    assert metric(run(TrajectoryPolicyLoss(filter="code"), samples), "filtered_share") == 0.75
    assert metric(run(TrajectoryPolicyLoss(filter="code", threshold=1.02), samples), "filtered_share") == 0.25


def test_parts_for_other_surrogates() -> None:
    """λ and δ as weights: on the negative log-likelihood they give Σ δ λ new over the tokens of all."""
    samples = random_samples(random.Random(8), 3, 4)
    objective = ComposedObjective(SupervisedLoss(), [ConflictWeight(), EntropyFilter(filter="code")])
    outcome = run(objective, samples)
    tokens = sum(sample.length for sample in samples)
    for sample, row in zip(samples, outcome.answer.gradient, strict=True):
        keep = sample.length and sum(sample.entropy) / sample.length <= 0.7
        assert row == pytest.approx([-(value if keep else 0.0) / tokens for value in sample.conflict])
    assert 0 < metric(outcome, "filtered_share") < 1
    assert 0 < metric(outcome, "conflict_share") < 1


def test_entropy_is_asked_for() -> None:
    assert TrajectoryPolicyLoss().needs_entropy and EntropyFilter().needs_entropy and not ConflictWeight().needs_entropy
    assert "initial_entropy" in TrajectoryPolicyLoss().needs_scalars
    assert "initial_entropy" not in TrajectoryPolicyLoss(filter="code").needs_scalars
