"""The golden numbers of GSPO, and what ties it to its relatives."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from megatron_rl.objectives.registry import build_objective
from tests.objectives.reference import Sample
from tests.objectives.samples import doubled, random_samples, sample_of, steps
from tests.objectives.steps import Layout, lay_out, metric, run

DIFFERENCES = [[2e-4, 4e-4], [1e-3, 5e-4, 3e-4], [-5e-4], [1e-4, -2e-4, 3e-4, -1e-4]]
ADVANTAGES = [1.0, -1.0, -1.0, 1.0]
GOLDEN = [sample_of(row, advantage) for row, advantage in zip(DIFFERENCES, ADVANTAGES, strict=True)]
RATIOS = [1.000300045005, 1.000600180036, 0.999500124979, 1.000025000313]
VALUES = [1.000300045, -1.000600180, -0.9997, 1.000025]
SLOPES = [0.125037505626, -0.083383348336, 0.0, 0.06250156252]
ALONE = Layout(tuple((i,) for i in range(len(GOLDEN))))


@pytest.mark.parametrize("garbage", [0.0, 1e6, math.nan, -math.inf])
@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_golden_numbers(name: str, garbage: float) -> None:
    outcome = run(build_objective(name), GOLDEN, replace(ALONE, before=1, after=2, garbage=garbage))
    assert outcome.answer.loss == pytest.approx(-6.21632e-6, rel=1e-6)
    for row, slope in zip(outcome.answer.gradient, SLOPES, strict=True):
        assert row == pytest.approx([-slope] * len(row), abs=1e-12)
    assert [-4 * result.loss.item() for result in outcome.results] == pytest.approx(VALUES, abs=1e-8)
    by_sample = [replace(outcome, results=[result]) for result in outcome.results]
    assert [metric(one, "ratio") for one in by_sample] == pytest.approx(RATIOS, abs=1e-12)
    assert [metric(one, "clip_fraction") for one in by_sample] == [0.0, 0.0, 1.0, 0.0]
    assert metric(outcome, "clip_fraction") == 0.25
    assert metric(outcome, "clip_fraction_tokens") == pytest.approx(0.1)
    assert metric(outcome, "ratio_min") == pytest.approx(min(RATIOS), abs=1e-12)
    assert metric(outcome, "ratio_max") == pytest.approx(max(RATIOS), abs=1e-12)
    centre = sum(RATIOS) / 4
    assert metric(outcome, "ratio_std") == pytest.approx(math.sqrt(sum((s - centre) ** 2 for s in RATIOS) / 4), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "advantage", "value", "gradient"),
    [
        ("gspo", 1.0, 1.0, (0.5, 0.5)),
        ("gspo", -1.0, -1.0, (-0.5, -0.5)),
        ("grpo", 1.0, 0.85, (0.25, 0.0)),
        ("grpo", -1.0, -1.4, (0.0, -1.0)),
    ],
)
def test_ratios_cancel_within_a_sequence(name: str, advantage: float, value: float, gradient: tuple[float, float]) -> None:
    """Tokens of ratio 0.5 and 2 make a sequence of ratio 1, of which GSPO clips nothing and GRPO half."""
    objective = build_objective(name, {"clip_low": 0.2, "clip_high": 0.2})
    answer = run(objective, [sample_of([math.log(0.5), math.log(2.0)], advantage)]).answer
    assert answer.loss == pytest.approx(-value)
    assert answer.gradient[0] == pytest.approx([-g for g in gradient])


@given(samples=steps())
@settings(max_examples=30, deadline=None)
def test_gspo_token_is_gspo_for_one_advantage(samples: list[Sample]) -> None:
    for options in ({}, {"clip_low": 0.03, "clip_high": 0.05}):
        whole, by_token = (run(build_objective(name, options), samples) for name in ("gspo", "gspo_token"))
        given_by_token = run(build_objective("gspo_token", options), samples, Layout(token_advantages=True))
        for other in (by_token, given_by_token):
            assert other.answer.loss == pytest.approx(whole.answer.loss, rel=1e-12, abs=1e-14)
            for mine, theirs in zip(other.answer.gradient, whole.answer.gradient, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-11, abs=1e-14)
        for name in ("clip_fraction", "clip_fraction_tokens", "ratio"):
            assert metric(by_token, name) == pytest.approx(metric(whole, name), rel=1e-12)


def test_gspo_token_tells_turns_apart() -> None:
    """Advantages of two signs in one sequence of ratio 1.0005: its good turn is clipped, its bad one is not."""
    sample = sample_of([5e-4, 5e-4, 5e-4, 5e-4], 0.0, token_advantage=[1.0, 1.0, -2.0, 0.0])
    outcome = run(build_objective("gspo_token"), [sample], Layout(token_advantages=True))
    ratio = math.exp(5e-4)
    assert outcome.answer.gradient[0] == pytest.approx([0.0, 0.0, 2 * ratio / 4, 0.0], rel=1e-9)
    assert outcome.answer.loss == pytest.approx(-(2 * 1.0004 - 2 * ratio) / 4)
    assert metric(outcome, "clip_fraction") == 0.5


@given(samples=steps())
@settings(max_examples=20, deadline=None)
def test_luspo_is_gspo_times_the_length(samples: list[Sample]) -> None:
    ours, gspo = (run(build_objective(name), samples).answer.gradient for name in ("luspo", "gspo"))
    for sample, mine, theirs in zip(samples, ours, gspo, strict=True):
        assert mine == pytest.approx([sample.length * slope for slope in theirs], rel=1e-12)
    for i in range(len(samples)):
        luspo, gspo_loss = (run(build_objective(name), samples[i : i + 1]).answer.loss for name in ("luspo", "gspo"))
        assert luspo == pytest.approx(samples[i].length * gspo_loss, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"ratio": "sequence", "epsilon": 3e-4}])
def test_cfpo_and_grpo_are_one_at_ratio_one(options: dict[str, object]) -> None:
    samples = random_samples(random.Random(2), groups=3, size=4, spread=0.0)
    cfpo, grpo = run(build_objective("cfpo", options), samples).answer, run(build_objective("grpo"), samples).answer
    assert cfpo.loss == pytest.approx(grpo.loss, rel=1e-12)
    for mine, theirs in zip(cfpo.gradient, grpo.gradient, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("options", [{"epsilon": 0.2}, {"ratio": "sequence", "epsilon": 0.01}])
def test_cfpo_turns_back_at_its_bound(sign: float, options: dict[str, float]) -> None:
    """The gradient is A at ratio 1, none at 1 + ε·sign(A), and points back beyond."""
    epsilon = options["epsilon"]
    slopes = [
        -run(build_objective("cfpo", options), [sample_of([math.log(1 + sign * move)], 2 * sign)]).answer.gradient[0][0]
        for move in (0.0, epsilon, 1.5 * epsilon)
    ]
    assert slopes[:2] == pytest.approx([2 * sign, 0.0], abs=1e-12)
    assert slopes[2] * sign < 0


@given(samples=steps())
@settings(max_examples=20, deadline=None)
def test_every_token_twice(samples: list[Sample]) -> None:
    """GSPO's ratio does not see it, and a token's gradient halves."""
    objective = build_objective("gspo", {"clip_low": 0.03, "clip_high": 0.05})
    once, twice = run(objective, samples), run(objective, [doubled(sample) for sample in samples])
    assert twice.answer.loss == pytest.approx(once.answer.loss, rel=1e-11, abs=1e-14)
    for name in ("ratio", "ratio_std", "clip_fraction"):
        assert metric(twice, name) == pytest.approx(metric(once, name), rel=1e-6, abs=1e-12)
    for single, double in zip(once.answer.gradient, twice.answer.gradient, strict=True):
        assert double == pytest.approx([slope / 2 for slope in single for _ in range(2)], rel=1e-10, abs=1e-15)


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "luspo"])
def test_first_minibatch_is_not_clipped(name: str) -> None:
    """On policy the ratio is 1 exactly, in float32; handing `old` over or saying `on_policy` is the same."""
    samples = random_samples(random.Random(7), groups=3, size=4, spread=0.0, longest=200)
    layout = Layout(dtype=torch.float32)
    handed = run(build_objective(name), samples, layout)
    assert metric(handed, "ratio_deviation") == 0.0 == metric(handed, "clip_fraction")
    moved = [replace(sample, old=[-9.0] * sample.length) for sample in samples]
    assert run(build_objective(name, on_policy=True), moved, layout).answer == handed.answer


def test_contributions_are_of_the_whole_step() -> None:
    """The divisor of a micro-batch is that of the step, whatever it holds itself."""
    alone = lay_out(GOLDEN, ALONE)[0].batch
    assert (alone.divisors.sequences, alone.divisors.tokens) == (4, 10)
    assert build_objective("gspo")(alone).loss.item() == pytest.approx(-VALUES[0] / 4, rel=1e-9)
