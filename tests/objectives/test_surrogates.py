"""Every surrogate against the loops of the reference: value, gradient and clip set; and its gradient against its own value."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from megatron_rl.objectives.base import Mean
from megatron_rl.objectives.registry import SURROGATES, build_objective
from tests.objectives.cases import CASES, Case
from tests.objectives.reference import Answer, Sample
from tests.objectives.samples import random_samples, sample_of, steps
from tests.objectives.steps import Layout, lay_out, metric, prepared, run_whole

REACHES_NEW = [case for case in CASES if case.true_gradient]


def close(ours: Answer, theirs: Answer) -> None:
    """float64 against Python's: sums in another order differ by a few units of the last place."""
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-11, abs=1e-13)
    for mine, other in zip(ours.gradient, theirs.gradient, strict=True):
        assert mine == pytest.approx(other, rel=1e-10, abs=1e-13)


def test_every_surrogate_has_a_reference() -> None:
    assert {case.surrogate for case in CASES} == set(SURROGATES)


@pytest.mark.parametrize("case", CASES, ids=str)
@given(samples=steps())
@settings(max_examples=25, deadline=None)
def test_value_and_gradient(case: Case, samples: list[Sample]) -> None:
    close(run_whole(build_objective(case.surrogate, case.options), samples).answer, case.reference(samples))


@pytest.mark.parametrize("case", [case for case in CASES if case.clips], ids=str)
@given(samples=steps())
@settings(max_examples=10, deadline=None)
def test_clip_set(case: Case, samples: list[Sample]) -> None:
    """One response a micro-batch: what it reports as clipped is what is; and the fractions of the whole step."""
    objective = build_objective(case.surrogate, case.options)
    outcome = run_whole(objective, samples, Layout(tuple((i,) for i in range(len(samples)))))
    expected = case.reference(samples).clipped
    for result, clipped, sample in zip(outcome.results, expected, samples, strict=True):
        tokens = result.metrics["clip_fraction_tokens"]
        assert isinstance(tokens, Mean)
        assert (tokens.total.item(), tokens.count.item()) == (sum(clipped), sample.length)
    total = sum(sample.length for sample in samples)
    assert metric(outcome, "clip_fraction_tokens") == pytest.approx(sum(map(sum, expected)) / max(total, 1))
    shares = [sum(clipped) / len(clipped) for clipped in expected if clipped]
    assert metric(outcome, "clip_fraction") == pytest.approx(sum(shares) / max(len(shares), 1))


@pytest.mark.parametrize("case", REACHES_NEW, ids=str)
def test_gradient_is_that_of_the_value(case: Case) -> None:
    """torch's own check in float64, on ratios of every kind. Group methods move as a whole: both passes are differentiated."""
    samples = random_samples(random.Random(5), groups=2, size=3, spread=0.4)
    objective = build_objective(case.surrogate, case.options)

    def loss(*rows: torch.Tensor) -> torch.Tensor:
        return whole_loss(objective, samples, rows)

    rows = [torch.tensor(sample.new, dtype=torch.float64, requires_grad=True) for sample in samples]
    assert torch.autograd.gradcheck(loss, rows)


@pytest.mark.parametrize("case", [case for case in CASES if not case.true_gradient], ids=str)
def test_gradient_is_that_of_the_value_with_the_rest_held(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where gradients are stopped: what is detached is kept as it was at the point of the derivative."""
    samples = random_samples(random.Random(5), groups=2, size=3, spread=0.4)
    objective = build_objective(case.surrogate, case.options)
    (micro_batch,) = lay_out(samples, Layout(after=0))
    held: list[torch.Tensor] = []

    def loss(log_probs: torch.Tensor) -> torch.Tensor:
        batch = replace(micro_batch.batch, log_probs=log_probs)
        kept = iter(list(held))  # none yet at the first call, which notes them

        def hold(values: torch.Tensor) -> torch.Tensor:
            if (before := next(kept, None)) is not None:
                return before
            with torch.no_grad():
                held.append(values.clone())
            return held[-1]

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "detach", hold)
            value: torch.Tensor = objective(batch).loss
        return value

    point = micro_batch.leaf.detach().requires_grad_()
    assert loss(point).requires_grad and held
    assert torch.autograd.gradcheck(loss, point)


def whole_loss(objective: Any, samples: Sequence[Sample], rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """The loss of a step as a function of the log-probs, with the pass over groups made anew for each value."""
    moved = [replace(sample, new=row.tolist()) for sample, row in zip(samples, rows, strict=True)]
    scalars = prepared(objective, moved, Layout()) if objective.reads_groups else {}
    (micro_batch,) = lay_out(moved, Layout(after=0), scalars)
    batch = replace(micro_batch.batch, log_probs=torch.cat(list(rows)))
    loss: torch.Tensor = objective(batch).loss
    return loss


# -- quadrants and boundaries ----------------------------------------------------------------------------------------------

# Bounds that are exact in binary, and log-ratios whose exponential is exact: 1 − ½ and 1 + 1.
EXACT = {"clip_low": 0.5, "clip_high": 1.0}
LOW, HIGH = math.log(0.5), math.log(2.0)
STEP = 1e-9
# Where the gradient is off, by (sign of A, side).
PESSIMISTIC = {(1, "above"), (-1, "below")}
EVERYWHERE = {(1, "above"), (1, "below"), (-1, "above"), (-1, "below")}
NOWHERE: set[tuple[int, str]] = set()
CLIPPED = [
    ("gspo", EXACT, PESSIMISTIC),
    ("gspo_token", EXACT, PESSIMISTIC),
    ("luspo", EXACT, PESSIMISTIC),
    ("grpo", EXACT, PESSIMISTIC),
    ("grpo", {**EXACT, "dual_clip": 2.0}, PESSIMISTIC | {(-1, "above")}),
    ("dapo", EXACT, PESSIMISTIC),
    ("dhpo", {f"{branch}_{side}": EXACT[side] for branch in ("token", "sequence") for side in EXACT}, PESSIMISTIC),
    ("gmpo", {"clip_low": -LOW, "clip_high": HIGH}, PESSIMISTIC),
    ("cispo", EXACT, NOWHERE),
    ("abc", {"epsilon_1": 1.0, "epsilon_2": 0.5, "epsilon_3": 1.0, "epsilon_4": 0.5}, EVERYWHERE),
]


@pytest.mark.parametrize(("name", "options", "off"), CLIPPED)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("side", "edge", "out"), [("above", HIGH, STEP), ("below", LOW, -STEP)])
def test_quadrants_and_ties(
    name: str, options: dict[str, float], off: set[tuple[int, str]], sign: int, side: str, edge: float, out: float
) -> None:
    """On the boundary the gradient is still whole; a hair beyond it is gone, in the quadrants where it shall be."""
    objective = build_objective(name, options)
    for move, beyond in ((0.0, False), (-out, False), (out, True)):
        outcome = run_whole(objective, [sample_of([edge + move], float(sign))])
        slope = math.exp(edge) * -sign
        expected = 0.0 if beyond and (sign, side) in off else slope
        assert outcome.answer.gradient[0][0] == pytest.approx(expected, rel=1e-8)
        changes = name == "cispo"
        reported = metric(outcome, "clip_fraction")
        assert reported == (1.0 if beyond and ((sign, side) in off or changes) else 0.0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("branch", ["token", "sequence"])
def test_branches_of_dhpo_are_clipped_each_by_itself(branch: str, sign: int) -> None:
    """Beyond the bounds of one branch the other's half of the gradient is left."""
    other = "sequence" if branch == "token" else "token"
    wide = {f"{other}_clip_low": 0.9, f"{other}_clip_high": 9.0}
    objective = build_objective("dhpo", {**wide, **{f"{branch}_{side}": bound for side, bound in EXACT.items()}})
    edge, out = (HIGH, STEP) if sign > 0 else (LOW, -STEP)
    for move, share in ((0.0, 1.0), (out, 0.5)):
        outcome = run_whole(objective, [sample_of([edge + move], float(sign))])
        assert outcome.answer.gradient[0][0] == pytest.approx(-sign * share * math.exp(edge), rel=1e-8)
