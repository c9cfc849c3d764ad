"""Weights and penalties against loops over tokens: what they do to loss and gradient, alone and together."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from megatron_rl.objectives.registry import PENALTIES, WEIGHTS, build_objective
from tests.objectives import reference as plain
from tests.objectives import reference_rules as rules
from tests.objectives.reference import Answer, Sample, mean, one_value, sum_answers, value_a_token
from tests.objectives.samples import random_samples, sample_of, steps
from tests.objectives.steps import Layout, lay_out, metric, run, run_whole

Factors = Callable[[Sequence[Sample]], list[Any]]


def each(rule: Callable[..., Any], **options: Any) -> Factors:
    return lambda samples: [rule(sample, **options) for sample in samples]


def entropy_filter(sample: Sample) -> float:
    return 0.0 if plain.gtpo_drops_by_paper(sample) else 1.0


BY_TOKEN: list[tuple[str, Mapping[str, Any], Factors]] = [
    ("tis", {}, each(rules.truncated)),
    ("tis", {"cap": 1.1}, each(rules.truncated, cap=1.1)),
    ("icepop", {}, each(rules.icepop)),
    ("icepop", {"low": 0.9, "high": 1.5}, each(rules.icepop, low=0.9, high=1.5)),
    ("gtpo_conflict", {}, each(lambda sample: sample.conflict)),
]
BY_SEQUENCE: list[tuple[str, Mapping[str, Any], Factors]] = [
    ("sequence_weight", {}, each(rules.sequence_geometric)),
    ("sequence_weight", {"form": "product"}, each(rules.sequence_product)),
    ("sequence_weight", {"form": "product", "cap": 1.5}, each(lambda sample: min(rules.sequence_product(sample), 1.5))),
    ("geometric_mask", {}, each(rules.geometric_mask)),
    ("geometric_mask", {"low": 0.8, "high": 1.2}, each(rules.geometric_mask, low=0.8, high=1.2)),
    ("opsm", {}, each(rules.opsm, delta=1e-4)),
    ("opsm", {"delta": 0.05}, each(rules.opsm, delta=0.05)),
    ("egsw", {"alpha": 0.5, "temperature": 2.0}, partial(rules.entropy_softmax, alpha=0.5, temperature=2.0)),
    ("gtpo_entropy", {}, each(entropy_filter)),
]


def close(ours: Answer, theirs: Answer) -> None:
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-10, abs=1e-13)
    for mine, other in zip(ours.gradient, theirs.gradient, strict=True):
        assert mine == pytest.approx(other, rel=1e-9, abs=1e-13)


def test_every_weight_and_penalty_has_a_rule() -> None:
    assert {name for name, _, _ in BY_TOKEN + BY_SEQUENCE} == set(WEIGHTS)
    assert {"kl_loss", "entropy_bonus", "kl_reward", "overlong"} == set(PENALTIES)


@pytest.mark.parametrize(("name", "options", "factors"), BY_TOKEN)
@given(samples=steps())
@settings(max_examples=15, deadline=None)
def test_weights_of_tokens(name: str, options: Mapping[str, Any], factors: Factors, samples: list[Sample]) -> None:
    by_token = factors(samples)
    for aggregation, divide_by_tokens in (("sequence_mean", False), ("token_mean", True)):
        objective = build_objective("grpo", {"aggregation": aggregation}, weights=[(name, options)])
        expected = value_a_token(samples, plain.grpo, by_token, divide_by_tokens=divide_by_tokens)
        close(run(objective, samples).answer, expected)


@pytest.mark.parametrize(("name", "options", "factors"), BY_SEQUENCE)
@given(samples=steps())
@settings(max_examples=15, deadline=None)
def test_weights_of_sequences(name: str, options: Mapping[str, Any], factors: Factors, samples: list[Sample]) -> None:
    """On a surrogate by sequence, and on one by token; a dropped response stays in the divisor."""
    by_sequence = factors(samples)
    by_value, by_token = (run_whole(build_objective(core, weights=[(name, options)]), samples) for core in ("gspo", "grpo"))
    close(by_value.answer, one_value(samples, plain.gspo, by_sequence))
    spread = [[factor] * sample.length for factor, sample in zip(by_sequence, samples, strict=True)]
    close(by_token.answer, value_a_token(samples, plain.grpo, spread))


@given(samples=steps())
@settings(max_examples=15, deadline=None)
def test_weights_multiply(samples: list[Sample]) -> None:
    objective = build_objective("dapo", weights=[("opsm", {"delta": 0.01}), ("icepop", {}), ("sequence_weight", {})])
    factors = [
        [rules.opsm(s, 0.01) * rules.sequence_geometric(s) * factor for factor in rules.icepop(s)] if s.length else []
        for s in samples
    ]
    close(run(objective, samples).answer, value_a_token(samples, plain.grpo, factors, clip_high=0.28, divide_by_tokens=True))


def test_what_is_dropped_is_not_looked_at() -> None:
    """A ratio that overflows, in a token or response with weight 0, gives neither value nor gradient, nor a NaN."""
    far = sample_of([2000.0, 0.1], -1.0, rollout=[60.0, 0.0])
    icepop = run(build_objective("grpo", weights=[("icepop", {})]), [far]).answer
    assert icepop.loss == pytest.approx(math.exp(0.1) / 2)
    assert icepop.gradient[0] == pytest.approx([0.0, math.exp(0.1) / 2])
    whole = run(build_objective("gspo", weights=[("geometric_mask", {})]), [far, sample_of([0.0])]).answer
    assert whole.loss == -0.5 and whole.gradient == [[0.0, 0.0], [-0.5]]


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.5, True), (0.5 - 1e-9, False), (5.0, True), (5.0 + 1e-9, False), (1.0, True), (0.0, False)]
)
def test_icepop_keeps_its_bounds(ratio: float, kept: bool) -> None:
    rollout = [-math.log(ratio) if ratio else 1e9]
    answer = run(build_objective("grpo", weights=[("icepop", {})]), [sample_of([0.0], rollout=rollout)]).answer
    assert answer.loss == pytest.approx(-ratio if kept else 0.0)


@pytest.mark.parametrize(
    ("advantage", "fallen", "dropped"),
    [(-1.0, 0.5, False), (-1.0, 0.5 + 1e-9, True), (0.0, 1.0, False), (1.0, 1.0, False), (-1.0, -1.0, False)],
)
def test_opsm_drops_bad_responses_alone(advantage: float, fallen: float, dropped: bool) -> None:
    outcome = run(build_objective("gspo", weights=[("opsm", {"delta": 0.5})]), [sample_of([-fallen], advantage)])
    assert metric(outcome, "opsm_dropped") == float(dropped)
    assert (outcome.answer.loss == 0.0) is (dropped or advantage == 0)


def test_product_and_geometric_mean_are_told_apart() -> None:
    sample = sample_of([0.0] * 100, rollout=[0.1] * 100)
    for form, weight in (("geometric", math.exp(-0.1)), ("product", math.exp(-10.0))):
        objective = build_objective("gspo", weights=[("sequence_weight", {"form": form})])
        assert run(objective, [sample]).answer.loss == pytest.approx(-weight)


def test_mismatch_is_always_reported() -> None:
    samples = random_samples(random.Random(1), groups=2, size=4)
    outcome = run(build_objective("gspo"), samples)
    x = [value for sample in samples for value in rules.mismatch(sample)]
    ratios = [math.exp(value) for value in x]
    gaps = [new - reference for sample in samples for new, reference in zip(sample.new, sample.reference, strict=True)]
    expected = {
        "mismatch_k1": -mean(x),
        "mismatch_k3": mean([math.exp(value) - 1 - value for value in x]),
        "mismatch_chi2": mean([ratio**2 - 1 for ratio in ratios]),
        "mismatch_perplexity_ratio": mean([1 / rules.sequence_geometric(sample) for sample in samples if sample.length]),
        "mismatch_effective_share": sum(ratios) ** 2 / (len(ratios) * sum(ratio**2 for ratio in ratios)),
        "mismatch_max": max(map(abs, x)),
        "zero_advantage": mean([float(sample.advantage == 0) for sample in samples if sample.length]),
        "entropy": mean([value for sample in samples for value in sample.entropy]),
        "old_k1": -mean([d for sample in samples for d in sample.differences]),
        "old_k3": mean([math.exp(d) - 1 - d for sample in samples for d in sample.differences]),
        "reference_k1": mean(gaps),
        "reference_k3": mean([math.exp(-gap) - 1 + gap for gap in gaps]),
    }
    assert {name: metric(outcome, name) for name in expected} == pytest.approx(expected)


# -- penalties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@given(samples=steps())
@settings(max_examples=15, deadline=None)
def test_kl_in_the_loss(estimator: str, samples: list[Sample]) -> None:
    for aggregation, divide_by_tokens in (("sequence_mean", False), ("token_mean", True)):
        words = {"estimator": estimator, "coefficient": 0.3, "aggregation": aggregation}
        parts = [one_value(samples, plain.gspo), rules.kl_in_loss(samples, estimator, 0.3, divide_by_tokens)]
        close(run(build_objective("gspo", penalties=[("kl_loss", words)]), samples).answer, sum_answers(parts, [1.0, 1.0]))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward(estimator: str) -> None:
    """Minus β times the sum over the tokens, from log-probs of the policy that was scored; the loss is left alone."""
    samples = random_samples(random.Random(3), groups=2, size=3)
    objective: Any = build_objective("gspo", penalties=[("kl_reward", {"estimator": estimator, "coefficient": 0.3})])
    (micro_batch,) = lay_out(samples, Layout(before=1))
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    adjusted = objective.adjust_rewards(rewards, micro_batch.batch.lengths, objective.statistics(micro_batch.batch))
    for sample, value in zip(samples, adjusted.tolist(), strict=True):
        gaps = [new - reference for new, reference in zip(sample.new, sample.reference, strict=True)]
        assert value == pytest.approx(sample.reward - 0.3 * sum(rules.KL[estimator](gap)[0] for gap in gaps))
    close(run(objective, samples).answer, one_value(samples, plain.gspo))


def test_overlong() -> None:
    objective: Any = build_objective("gspo", penalties=[("overlong", {"longest": 100, "buffer": 20})])
    lengths = [0, 50, 80, 81, 90, 99, 100, 101, 5000]
    adjusted = objective.adjust_rewards(torch.ones(len(lengths)), torch.tensor(lengths, dtype=torch.float32), {})
    assert adjusted.tolist() == pytest.approx([1 + rules.overlong(length, 100, 20) for length in lengths])
    assert adjusted.tolist()[-3:] == [0.0, 0.0, 0.0] and adjusted.tolist()[:3] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("divide_by_tokens", [False, True])
def test_entropy_bonus(divide_by_tokens: bool) -> None:
    """−β times its mean, with the gradient of the entropy."""
    samples = random_samples(random.Random(4), groups=2, size=3)
    words = {"coefficient": 0.2, "aggregation": "token_mean" if divide_by_tokens else "sequence_mean"}
    objective = build_objective("sft", penalties=[("entropy_bonus", words)])
    (micro_batch,) = lay_out(samples, Layout())
    assert micro_batch.batch.entropy is not None
    entropy = micro_batch.batch.entropy.clone().requires_grad_()
    loss = objective(replace(micro_batch.batch, entropy=entropy)).loss
    as_log_probs = [replace(sample, new=sample.entropy) for sample in samples]
    bonus = value_a_token(as_log_probs, plain.supervised, divide_by_tokens=divide_by_tokens)
    assert loss.item() == pytest.approx(value_a_token(samples, plain.supervised, divide_by_tokens=True).loss + 0.2 * bonus.loss)
    (slopes,) = torch.autograd.grad(loss, entropy)
    flat = [0.2 * slope for row in bonus.gradient for slope in row]
    assert slopes[micro_batch.batch.mask].tolist() == pytest.approx(flat)
    assert not slopes[~micro_batch.batch.mask].any()
