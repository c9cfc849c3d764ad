"""What must not matter: packing order, micro-batches, ranks, padding and what stands in it; and steps that hold nothing."""

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.objectives.registry import WEIGHTS, build_objective
from tests.objectives.cases import CASES, Case
from tests.objectives.reference import Sample
from tests.objectives.samples import sample_of, steps
from tests.objectives.steps import Layout, Outcome, metric, run_whole

GARBAGE = [0.0, 1e6, math.nan, -math.inf, math.inf]
WITHOUT_ADVANTAGE = {"trpa", "rebel", "agro", "sft"}
EVERY = pytest.mark.parametrize("case", CASES, ids=str)


@st.composite
def layouts(draw: st.DrawFn, count: int) -> Layout:
    """Any order of samples, cut into micro-batches of any size, empty ones among them, with any padding."""
    order = draw(st.permutations(range(count)))
    edges = [0, *sorted(draw(st.lists(st.integers(0, count), max_size=3))), count]
    return Layout(
        micro_batches=tuple(tuple(order[a:b]) for a, b in pairwise(edges)),
        before=draw(st.integers(0, 2)),
        after=draw(st.integers(0, 2)),
        between=draw(st.integers(0, 1)),
        garbage=draw(st.sampled_from(GARBAGE)),
    )


def same(one: Outcome, other: Outcome) -> None:
    """The same sums in another order."""
    assert one.answer.loss == pytest.approx(other.answer.loss, rel=1e-10, abs=1e-13)
    for mine, theirs in zip(one.answer.gradient, other.answer.gradient, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-10, abs=1e-13)
    assert one.results[0].metrics.keys() == other.results[0].metrics.keys()
    for name in one.results[0].metrics:
        assert metric(one, name) == pytest.approx(metric(other, name), rel=1e-9, abs=1e-10), name


@EVERY
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_any_packing_is_the_same(case: Case, data: st.DataObject) -> None:
    """Loss, gradient and metrics. Contributions of micro-batches, as of ranks, add up: divisors are the step's."""
    samples = data.draw(steps())
    objective = build_objective(case.surrogate, case.options)
    same(run_whole(objective, samples, data.draw(layouts(len(samples)))), run_whole(objective, samples, Layout(after=0)))


@pytest.mark.parametrize("name", WEIGHTS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_weights_do_not_see_the_packing(name: str, data: st.DataObject) -> None:
    samples = data.draw(steps())
    surrogate = "gspo_token" if getattr(WEIGHTS[name], "level", "token") == "token" else "gspo"
    penalties: list[tuple[str, Mapping[str, Any]]] = [("kl_loss", {"coefficient": 0.1}), ("entropy_bonus", {})]
    objective = build_objective(surrogate, weights=[(name, {})], penalties=penalties)
    same(run_whole(objective, samples, data.draw(layouts(len(samples)))), run_whole(objective, samples, Layout(after=0)))


@EVERY
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 3)])
def test_padding_is_not_looked_at(case: Case, garbage: float, before: int, after: int) -> None:
    """To the last bit."""
    samples = [replace(s, group=i % 2, reward=float(i)) for i, s in enumerate(_two_groups())]
    objective = build_objective(case.surrogate, case.options)
    padded = run_whole(objective, samples, Layout(before=before, after=after, garbage=garbage))
    zeros = run_whole(objective, samples, Layout(before=before, after=after, garbage=0.0))
    assert padded.answer == zeros.answer
    assert all(metric(padded, name) == metric(zeros, name) for name in zeros.results[0].metrics)


def _two_groups() -> list[Sample]:
    generator = random.Random(11)
    rows = [[generator.uniform(-0.5, 0.5) for _ in range(length)] for length in (3, 1, 0, 4)]
    return [sample_of(row, advantage) for row, advantage in zip(rows, (1.0, -1.0, 2.0, 0.0), strict=True)]


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_of_nothing(case: Case, dtype: torch.dtype) -> None:
    """No response at all, and none with a token: loss and gradient are 0, and no metric is NaN."""
    objective = build_objective(case.surrogate, case.options)
    for samples in ([], [sample_of([])], [sample_of([]), sample_of([], -1.0, group=1)]):
        for layout in (Layout(dtype=dtype), Layout(after=0, dtype=dtype), Layout(before=2, dtype=dtype)):
            outcome = run_whole(objective, samples, layout)
            assert outcome.answer.loss == 0.0
            assert not any(slope for row in outcome.answer.gradient for slope in row)
            assert not any(math.isnan(metric(outcome, name)) for name in outcome.results[0].metrics)


@EVERY
def test_responses_without_tokens_change_nothing(case: Case) -> None:
    """They are not in any divisor either."""
    samples = [replace(s, group=i % 2, reward=float(i)) for i, s in enumerate(_two_groups())]
    more = [*samples, sample_of([], 3.0, group=0, reward=7.0), sample_of([], -3.0, group=5)]
    objective = build_objective(case.surrogate, case.options)
    ours, plain = run_whole(objective, more).answer, run_whole(objective, samples).answer
    assert ours.loss == pytest.approx(plain.loss, rel=1e-12)
    assert ours.gradient[: len(samples)] == plain.gradient and ours.gradient[len(samples) :] == [[], []]


@pytest.mark.parametrize("case", [case for case in CASES if case.surrogate not in WITHOUT_ADVANTAGE], ids=str)
def test_no_advantage_no_gradient(case: Case) -> None:
    """Nor a NaN, however far the policy has gone: 0 · ∞ is kept out."""
    samples = [sample_of([800.0, -800.0], 0.0), sample_of([-5.0], 0.0), sample_of([800.0] * 3, 0.0, group=1)]
    answer = run_whole(build_objective(case.surrogate, case.options), samples).answer
    assert answer.loss == 0.0 and not any(slope for row in answer.gradient for slope in row)


@pytest.mark.parametrize(("name", "options"), [("sapo", {}), ("sspo", {}), ("sspo", {"gate": "arctan"})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_gates_saturate(name: str, options: Mapping[str, Any], dtype: torch.dtype) -> None:
    """However far a ratio has gone: what is left of the gradient is nothing, and no NaN."""
    for sign in (1.0, -1.0):
        answer = run_whole(build_objective(name, options), [sample_of([800.0, 25.0, -800.0], sign)], Layout(dtype=dtype)).answer
        assert math.isfinite(answer.loss)
        assert answer.gradient[0] == pytest.approx([0.0] * 3, abs=2e-3)


@EVERY
def test_training_precision(case: Case) -> None:
    """float32 gives the reference's numbers to its rounding, inputs being of size one."""
    samples = [replace(s, group=i % 2, reward=float(i)) for i, s in enumerate(_two_groups())]
    outcome = run_whole(build_objective(case.surrogate, case.options), samples, Layout(dtype=torch.float32))
    assert all(result.loss.dtype == torch.float32 for result in outcome.results)
    answer, expected = outcome.answer, case.reference(samples)
    assert answer.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
    for mine, theirs in zip(answer.gradient, expected.gradient, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
