"""Advantages against loops over groups, and the rules for groups in which there is nothing to compare."""

import math
import random
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.objectives.advantages import zero_advantage_groups
from megatron_rl.objectives.registry import ADVANTAGES, build_advantage
from tests.objectives import reference_rules as rules

Rule = Callable[[Sequence[float], Sequence[int], Sequence[float]], list[float]]


def whitened_baseline(rewards: Sequence[float], groups: Sequence[int], epsilon: float) -> list[float]:
    """REINFORCE++ with baseline; a group without differences has none after whitening either."""
    whole = rules.whitened(rules.centred(rewards, groups), epsilon)
    return [0.0 if _level(rewards, groups, i) else value for i, value in enumerate(whole)]


def _level(rewards: Sequence[float], groups: Sequence[int], i: int) -> bool:
    return rules.equal([rewards[j] for j in rules.members(groups, i)])


RULES: Mapping[str, Rule] = {
    "grpo": lambda r, g, _: rules.standardised(r, g),
    "dr_grpo": lambda r, g, _: rules.centred(r, g),
    "rloo": lambda r, g, _: rules.leave_one_out(r, g),
    "opo": rules.length_weighted,
    "reinforce_plus_plus": lambda r, g, _: rules.whitened(r, 1e-8),
    "reinforce_plus_plus_baseline": lambda r, g, _: whitened_baseline(r, g, 1e-8),
}
NEEDING_MORE = {"gdpo", "per_turn"}

# Rewards as verifiers give them: few levels, any size; groups in any order.
levels = st.sampled_from([-1.0, 0.0, 0.1, 0.7, 1.0, 3.5, 100.0])
rows = st.lists(st.tuples(levels, st.integers(0, 3), st.integers(0, 50)), min_size=1, max_size=12)


def columns(table: list[tuple[float, int, int]]) -> tuple[list[float], list[int], list[float]]:
    return [row[0] for row in table], [7 * row[1] - 3 for row in table], [float(row[2]) for row in table]


def test_every_advantage_has_a_rule() -> None:
    assert set(RULES) | NEEDING_MORE == set(ADVANTAGES)


@pytest.mark.parametrize("name", RULES)
@given(table=rows)
@settings(max_examples=40, deadline=None)
def test_rule(name: str, table: list[tuple[float, int, int]]) -> None:
    """To float32's rounding; a spread of rounding dust alone must not be blown up to size one."""
    rewards, groups, lengths = columns(table)
    result = build_advantage(name)(torch.tensor(rewards), torch.tensor(groups), torch.tensor(lengths))
    assert result.dtype == torch.float32
    as_float32 = torch.tensor(rewards).double().tolist()
    expected = RULES[name](as_float32, groups, lengths)
    assert result.tolist() == pytest.approx(expected, rel=2e-6, abs=1e-5)


@pytest.mark.parametrize("name", [*RULES, "gdpo"])
def test_groups_without_differences(name: str) -> None:
    """Equal rewards without an exact mean, a singleton, and (but for the rule without groups) beside a group that differs."""
    advantage = build_advantage(name)
    equal = torch.full((10,), 0.1, dtype=torch.float64)
    assert equal[0] != equal.cumsum(0)[-1] / 10
    assert advantage(equal, torch.zeros(10).long(), torch.ones(10)).tolist() == [0.0] * 10
    assert advantage(torch.tensor([0.3]), torch.tensor([4]), torch.tensor([0.0])).tolist() == [0.0]
    rewards = torch.cat([equal, torch.tensor([5.0, 0.0, 2.0], dtype=torch.float64)])
    mixed = advantage(rewards, torch.tensor([*[0] * 10, 1, 2, 2]), torch.arange(13))
    assert torch.isfinite(mixed).all() and mixed[11] != mixed[12]
    if name != "reinforce_plus_plus":
        assert mixed[:11].tolist() == [0.0] * 11
    assert advantage(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0)).tolist() == []


def test_golden() -> None:
    rewards, groups, lengths = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4).long(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    given_by = {name: build_advantage(name)(rewards, groups, lengths).tolist() for name in RULES}
    std = math.sqrt(1 / 3)  # unbiased
    assert given_by["grpo"] == pytest.approx([0.5 / (std + 1e-6) * s for s in (1, -1, -1, 1)])
    assert given_by["dr_grpo"] == [0.5, -0.5, -0.5, 0.5]
    assert given_by["rloo"] == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert given_by["opo"] == pytest.approx([0.5, -0.5, -0.5, 0.5])
    longer = build_advantage("opo")(rewards, groups, torch.tensor([3.0, 2.0, 1.0, 4.0])).tolist()
    assert longer == pytest.approx([0.3, -0.7, -0.7, 0.3])


@given(table=rows, weight=st.sampled_from([0.0, 0.3, 2.0]))
@settings(max_examples=40, deadline=None)
def test_gdpo(table: list[tuple[float, int, int]], weight: float) -> None:
    """Two rewards of very different size are standardised each by itself; groups that differ in neither stay at 0."""
    first, groups, lengths = columns(table)
    second = [1000.0 * (i % 3 == 0) for i in range(len(first))]
    advantage = build_advantage("gdpo", {"weights": {"second": weight}})
    rewards = {"first": torch.tensor(first), "second": torch.tensor(second)}
    result = advantage(rewards, torch.tensor(groups), torch.tensor(lengths))
    exact = {name: values.double().tolist() for name, values in rewards.items()}
    expected = rules.decoupled(exact, groups, {"second": weight}, 1e-4, 1e-4)
    expected = [0.0 if _level(first, groups, i) and _level(second, groups, i) else value for i, value in enumerate(expected)]
    assert result.tolist() == pytest.approx(expected, rel=2e-6, abs=1e-5)


def test_named_rewards_are_added_up_otherwise() -> None:
    named = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.5, 3.0])}
    groups, lengths = torch.zeros(2).long(), torch.ones(2)
    advantage = build_advantage("dr_grpo")
    assert torch.equal(advantage(named, groups, lengths), advantage(named["a"] + named["b"], groups, lengths))
    with pytest.raises(ValueError, match="thrid"):
        build_advantage("gdpo", {"weights": {"thrid": 1.0}})(named, groups, lengths)


@given(table=rows)
@settings(max_examples=30, deadline=None)
def test_per_turn(table: list[tuple[float, int, int]]) -> None:
    """A row is compared with those of its group at its turn."""
    rewards, groups, lengths = columns(table)
    turns = [int(length) % 2 for length in lengths]
    numbers = (torch.tensor(rewards), torch.tensor(groups), torch.tensor(lengths))
    result = build_advantage("per_turn")(*numbers, torch.tensor(turns))
    keys = [1000 * group + turn for group, turn in zip(groups, turns, strict=True)]
    expected = rules.standardised(torch.tensor(rewards).double().tolist(), keys)
    assert result.tolist() == pytest.approx(expected, rel=2e-6, abs=1e-5)
    with pytest.raises(ValueError, match="turns"):
        build_advantage("per_turn")(*numbers)


@pytest.mark.parametrize("name", RULES)
@given(table=rows, generator=st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None)
def test_order_does_not_matter(name: str, table: list[tuple[float, int, int]], generator: random.Random) -> None:
    rewards, groups, lengths = (torch.tensor(column) for column in columns(table))
    order = torch.tensor(generator.sample(range(len(table)), len(table)))
    advantage = build_advantage(name)
    shuffled = advantage(rewards[order], groups[order], lengths[order])
    assert shuffled.tolist() == pytest.approx(advantage(rewards, groups, lengths)[order].tolist(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("rewards", "lengths", "said"),
    [([1.0, math.nan], [1.0, 1.0], "row 1"), ([1.0], [1.0, 1.0], "reward"), ([1.0, 2.0], [1.0], "lengths")],
)
def test_refusals(rewards: list[float], lengths: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_advantage("grpo")(torch.tensor(rewards), torch.zeros(2).long(), torch.tensor(lengths))


def test_share_of_groups_with_nothing_to_learn() -> None:
    groups = torch.tensor([5, 5, 2, 2, 9])
    assert zero_advantage_groups(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]), groups) == pytest.approx(2 / 3)
