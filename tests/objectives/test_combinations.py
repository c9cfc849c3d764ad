"""What goes with what: every pair is judged, and what is let through can be computed."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_rl.objectives.registry import (
    ADVANTAGES,
    PENALTIES,
    SURROGATES,
    WEIGHTS,
    build_advantage,
    build_objective,
    refuse_pair,
)
from tests.objectives.reference import Sample
from tests.objectives.samples import random_samples
from tests.objectives.steps import run_whole

WITHOUT_ADVANTAGE = {"trpa", "rebel", "agro", "sft"}
OF_GROUPS = {"trpa", "rebel", "agro"}
WITH_REFERENCE = {"trpa", "agro"}
ONE_VALUE_A_SEQUENCE = {"gspo", "luspo", "gmpo", "sspo"}
WITHOUT_TURNS = ONE_VALUE_A_SEQUENCE | {"gtpo"}  # its A − γ⟨H⟩ is of the whole completion
TOKEN_WEIGHTS = {"tis", "icepop", "gtpo_conflict"}


def makes_sense(advantage: str | None, surrogate: str, on_policy: bool) -> bool:
    """As the papers say, in words of this test's own; the run has a reference."""
    if surrogate in WITHOUT_ADVANTAGE:
        return advantage is None
    exact = advantage == "opo" or surrogate == "gtpo"
    return advantage is not None and (on_policy or not exact) and not (advantage == "per_turn" and surrogate in WITHOUT_TURNS)


def with_advantages(samples: Sequence[Sample], name: str) -> list[Sample]:
    """The samples with what the advantage makes of their rewards; every response is one turn."""
    rewards = torch.tensor([sample.reward for sample in samples])
    groups = torch.tensor([sample.group for sample in samples])
    lengths = torch.tensor([float(sample.length) for sample in samples])
    values = build_advantage(name)(rewards, groups, lengths, turns=torch.zeros(len(samples), dtype=torch.int64)).tolist()
    return [
        replace(sample, advantage=value, token_advantage=[value] * sample.length)
        for sample, value in zip(samples, values, strict=True)
    ]


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("advantage", [None, *ADVANTAGES])
def test_every_advantage_with_every_surrogate(advantage: str | None, on_policy: bool) -> None:
    """Refused or computed: to a finite loss that moves the policy."""
    samples = random_samples(random.Random(6), groups=3, size=4, spread=0.1)
    given = with_advantages(samples, advantage) if advantage else samples
    for surrogate in SURROGATES:
        objective: Any = build_objective(surrogate, on_policy=on_policy)
        chosen = build_advantage(advantage) if advantage else None
        if not makes_sense(advantage, surrogate, on_policy):
            with pytest.raises(ValueError, match=surrogate if advantage != "opo" else f"{surrogate}|'opo'"):
                refuse_pair(chosen, objective, reference=True, on_policy=on_policy)
            continue
        refuse_pair(chosen, objective, reference=True, on_policy=on_policy)
        answer = run_whole(objective, given).answer
        slopes = [slope for row in answer.gradient for slope in row]
        assert math.isfinite(answer.loss) and all(map(math.isfinite, slopes)) and any(slopes), surrogate


@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_weight_with_every_surrogate(weight: str) -> None:
    samples = random_samples(random.Random(6), groups=3, size=4, spread=0.1)
    for surrogate in SURROGATES:
        twice = surrogate == "gtpo" and weight.startswith("gtpo_")
        if surrogate in OF_GROUPS or twice or (weight in TOKEN_WEIGHTS and surrogate in ONE_VALUE_A_SEQUENCE):
            with pytest.raises(ValueError, match=weight):
                build_objective(surrogate, weights=[(weight, {})])
            continue
        assert math.isfinite(run_whole(build_objective(surrogate, weights=[(weight, {})]), samples).answer.loss), surrogate


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_reference_is_asked_for_where_it_is_read(surrogate: str) -> None:
    chosen = None if surrogate in WITHOUT_ADVANTAGE else build_advantage("grpo")
    plain = build_objective(surrogate)
    if surrogate in WITH_REFERENCE:
        with pytest.raises(ValueError, match=f"{surrogate} compares with a reference"):
            refuse_pair(chosen, plain, reference=False, on_policy=True)
    else:
        refuse_pair(chosen, plain, reference=False, on_policy=True)
    with pytest.raises(ValueError, match="kl_loss compares with a reference"):
        refuse_pair(chosen, build_objective(surrogate, penalties=[("kl_loss", {})]), reference=False, on_policy=True)


SENSELESS: list[tuple[str | None, str, dict[str, Any], bool, str]] = [
    ("opo", "gspo", {}, False, "policy itself"),
    (None, "gspo", {}, True, "needs an advantage"),
    ("grpo", "sft", {}, True, "takes no advantage"),
    ("grpo", "rebel", {}, True, "takes no advantage"),
    ("per_turn", "gspo", {}, True, "gspo_token"),
    ("per_turn", "gspo_token", {"weights": [("opsm", {})]}, False, "weight opsm reads a sequence's advantage"),
    ("dr_grpo", "gtpo", {}, False, "Take one step a rollout .* gtpo_conflict and gtpo_entropy as weights of gspo_token"),
    ("grpo", "gspo", {"weights": [("opsm", {})]}, True, "opsm .* would do nothing"),
    (None, "sft", {"penalties": [("overlong", {})]}, True, "overlong changes rewards, and sft reads none"),
    ("grpo", "gspo", {"penalties": [("kl_reward", {})]}, True, "kl_reward compares with a reference"),
]


@pytest.mark.parametrize(("advantage", "surrogate", "more", "on_policy", "said"), SENSELESS)
def test_senseless_pairs(advantage: str | None, surrogate: str, more: dict[str, Any], on_policy: bool, said: str) -> None:
    chosen = build_advantage(advantage) if advantage else None
    with pytest.raises(ValueError, match=said):
        refuse_pair(chosen, build_objective(surrogate, **more), reference=False, on_policy=on_policy)


@pytest.mark.parametrize("surrogate", ["gspo", *OF_GROUPS])
def test_penalties_on_rewards_go_with_what_reads_rewards(surrogate: str) -> None:
    objective = build_objective(surrogate, penalties=[(name, {}) for name in PENALTIES])
    chosen = None if surrogate in WITHOUT_ADVANTAGE else build_advantage("grpo")
    refuse_pair(chosen, objective, reference=True, on_policy=False)
