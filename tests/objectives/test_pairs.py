"""Losses over whole groups, in two passes over scattered samples, against their definitions with everything in one place."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.objectives.agro import AnyGenerationLoss
from megatron_rl.objectives.base import GroupObjective, GroupTable
from megatron_rl.objectives.compose import ComposedObjective
from megatron_rl.objectives.egsw import EntropyGuidedWeight
from megatron_rl.objectives.groups import SHARE, SLOPE, GroupSurrogate
from megatron_rl.objectives.gspo import SequencePolicyLoss
from megatron_rl.objectives.rebel import RelativeRewardRegression
from megatron_rl.objectives.trpa import PreferencePairLoss
from tests.objectives.reference import Sample
from tests.objectives.samples import random_samples, sample_of, steps
from tests.objectives.steps import Layout, Outcome, lay_out, metric, run

# -- definitions -----------------------------------------------------------------------------------------------------------

Rows = Sequence[Tensor]  # the new log-probs of each sample, leaves


def tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def couples(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """All ordered pairs of one group, each way round."""
    numbers = [i for i, sample in enumerate(samples) if sample.length]
    return [(i, j) for i in numbers for j in numbers if i != j and samples[i].group == samples[j].group]


def rebel(samples: Sequence[Sample], rows: Rows, eta: float = 1.0) -> Tensor:
    change = [(row - tensor(sample.old)).sum() for sample, row in zip(samples, rows, strict=True)]
    gaps = [change[i] - change[j] - eta * (samples[i].reward - samples[j].reward) for i, j in couples(samples)]
    return torch.stack(gaps).square().mean() if gaps else torch.zeros(())


def agro(samples: Sequence[Sample], rows: Rows, beta: float = 0.01, correction: int = 1) -> Tensor:
    regularised = [s.reward - beta * (row - tensor(s.reference)).sum() for s, row in zip(samples, rows, strict=True)]
    groups: dict[int, list[Tensor]] = {}
    for sample, value in zip(samples, regularised, strict=True):
        if sample.length:
            groups.setdefault(sample.group, []).append(value)
    variances = [torch.stack(group).var(correction=correction) / 2 for group in groups.values() if len(group) > 1]
    return torch.stack(variances).mean() if variances else torch.zeros(())


def trpa(samples: Sequence[Sample], rows: Rows, top_reward: float | None = None, kl: float = 1e-3) -> Tensor:
    rho = [(row - tensor(s.reference)).sum() / max(s.length, 1) for s, row in zip(samples, rows, strict=True)]
    losses = []
    for winner, loser in couples(samples):
        if samples[winner].reward > samples[loser].reward:
            best = max(s.reward for s in samples if s.group == samples[winner].group and s.length)
            top = samples[winner].reward >= (best if top_reward is None else top_reward)
            losses.append(torch.log1p(torch.exp(-(2.5 if top else 1.0) * 0.1 * (rho[winner] - rho[loser]))))
    moved = torch.cat([row - tensor(s.old) for s, row in zip(samples, rows, strict=True)])
    divergence = (torch.exp(-moved) - 1 + moved).sum() / max(len(moved), 1)
    return (torch.stack(losses).mean() if losses else 0.0) + kl * divergence


Definition = Callable[[Sequence[Sample], Rows], Tensor]
DEFINITIONS: Mapping[str, tuple[GroupSurrogate, Definition]] = {
    "rebel": (RelativeRewardRegression(), rebel),
    "rebel η 0.3": (RelativeRewardRegression(eta=0.3), lambda samples, rows: rebel(samples, rows, 0.3)),
    "agro": (AnyGenerationLoss(beta=0.1), lambda samples, rows: agro(samples, rows, 0.1)),
    "agro Σ/G": (AnyGenerationLoss(beta=0.1, unbiased=False), lambda samples, rows: agro(samples, rows, 0.1, 0)),
    "trpa": (PreferencePairLoss(), trpa),
    "trpa with a known top": (PreferencePairLoss(top_reward=2.0), lambda samples, rows: trpa(samples, rows, 2.0)),
    "trpa without trust region": (PreferencePairLoss(kl=0.0), lambda samples, rows: trpa(samples, rows, None, 0.0)),
}

# -- two passes ------------------------------------------------------------------------------------------------------------


def gathered(objective: GroupObjective, samples: Sequence[Sample], layout: Layout) -> tuple[GroupTable, list[int]]:
    """The table as ranks would gather it, micro-batch by micro-batch, and the sample of each row."""
    parts: list[dict[str, Tensor]] = []
    order: list[int] = []
    for micro_batch in lay_out(samples, layout):
        with torch.no_grad():
            parts.append(objective.statistics(micro_batch.batch))
        order += micro_batch.samples
    table = GroupTable(
        groups=torch.tensor([100 - 7 * samples[i].group for i in order]),
        rewards=tensor([samples[i].reward for i in order]),
        lengths=tensor([samples[i].length for i in order]),
        statistics={name: torch.cat([part[name] for part in parts]) for name in parts[0]},
        advantages=tensor([samples[i].advantage for i in order]),
    )
    return table, order


def prepared(objective: GroupObjective, samples: Sequence[Sample], layout: Layout) -> dict[str, list[float]]:
    table, order = gathered(objective, samples, layout)
    return {
        name: [value for _, value in sorted(zip(order, values.tolist(), strict=True))]
        for name, values in objective.prepare(table).items()
    }


def two_passes(objective: GroupObjective, samples: Sequence[Sample], layout: Layout) -> Outcome:
    return run(objective, samples, layout, **prepared(objective, samples, layout))


def scattered(generator: random.Random, count: int) -> Layout:
    """Samples in any order in micro-batches of any size, an empty one among them."""
    order = generator.sample(range(count), count)
    cuts = sorted(generator.choices(range(count + 1), k=3))
    edges = [0, *cuts, count]
    micro_batches = tuple(tuple(order[a:b]) for a, b in pairwise(edges))
    return Layout(micro_batches, before=generator.randint(0, 2), garbage=generator.choice([math.nan, -math.inf, 1e6]))


def in_one_place(definition: Definition, samples: Sequence[Sample]) -> tuple[float, list[Tensor]]:
    rows = [tensor(sample.new).requires_grad_() for sample in samples]
    loss = definition(samples, rows)
    loss = loss + 0.0 * sum(row.sum() for row in rows)
    return loss.item(), list(torch.autograd.grad(loss, rows))


@pytest.mark.parametrize("name", DEFINITIONS)
@given(samples=steps(), generator=st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_definition(name: str, samples: list[Sample], generator: random.Random) -> None:
    """Value and gradient, whatever the packs: the statistics' float64 carries both to rounding."""
    objective, definition = DEFINITIONS[name]
    loss, gradients = in_one_place(definition, samples)
    outcome = two_passes(objective, samples, scattered(generator, len(samples)))
    assert outcome.answer.loss == pytest.approx(loss, rel=1e-10, abs=1e-12)
    for ours, theirs in zip(outcome.answer.gradient, gradients, strict=True):
        assert ours == pytest.approx(theirs.tolist(), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_in_the_precision_of_training(name: str) -> None:
    """float32 keeps value and gradient to its rounding, a few 1e-7 of the largest number in them."""
    objective, definition = DEFINITIONS[name]
    generator = random.Random(3)
    samples = random_samples(generator, 4, 5, longest=40)
    loss, gradients = in_one_place(definition, samples)
    outcome = two_passes(objective, samples, replace(scattered(generator, len(samples)), dtype=torch.float32))
    assert outcome.answer.loss == pytest.approx(loss, rel=1e-5)
    largest = max(float(row.abs().max()) for row in gradients if row.numel())
    for ours, theirs in zip(outcome.answer.gradient, gradients, strict=True):
        assert ours == pytest.approx(theirs.tolist(), rel=1e-5, abs=1e-5 * largest)


@pytest.mark.parametrize("name", ["rebel", "agro", "trpa without trust region"])
def test_nothing_to_compare(name: str) -> None:
    """Responses alone in their group, and a step of empty ones: no loss, no gradient, nothing that is not finite."""
    objective, _ = DEFINITIONS[name]
    alone = [sample_of([0.3, -0.1], group=g, reward=float(g)) for g in range(3)]
    empty = [sample_of([], group=0), sample_of([], group=0, reward=1.0)]
    beside_empty = [sample_of([0.5], group=0), sample_of([], group=0, reward=1.0)]
    for samples in (alone, empty, beside_empty):
        outcome = two_passes(objective, samples, Layout())
        assert outcome.answer.loss == 0.0
        assert all(g == 0.0 for row in outcome.answer.gradient for g in row)


def test_equal_rewards() -> None:
    """TRPA learns nothing of them; REBEL and AGRO only pull log-ratios together."""
    samples = [replace(s, reward=1.0) for s in random_samples(random.Random(5), 2, 4)]
    still = [replace(s, new=s.old, reference=s.old) for s in samples]
    trpa_outcome = two_passes(PreferencePairLoss(kl=0.0), samples, Layout())
    assert trpa_outcome.answer.loss == 0.0 and not any(g for row in trpa_outcome.answer.gradient for g in row)
    for objective in (RelativeRewardRegression(), AnyGenerationLoss()):
        outcome = two_passes(objective, still, Layout())
        assert outcome.answer.loss == 0.0 and not any(g for row in outcome.answer.gradient for g in row)
        assert two_passes(objective, samples, Layout()).answer.loss > 0.0


def test_where_they_come_to_rest() -> None:
    """REBEL: log-ratios that are η r up to a constant. AGRO: log-ratios that are r/β up to a constant."""
    rewards = [0.0, 1.0, 3.0]
    of_rebel = [sample_of([2.0 * r - 0.7, 0.0], reward=r) for r in rewards]
    of_agro = [sample_of([0.25, r / 0.5], reward=r) for r in rewards]
    for objective, samples in ((RelativeRewardRegression(eta=2.0), of_rebel), (AnyGenerationLoss(beta=0.5), of_agro)):
        outcome = two_passes(objective, samples, Layout(((2,), (0, 1))))
        assert outcome.answer.loss == pytest.approx(0.0, abs=1e-20)
        assert [g for row in outcome.answer.gradient for g in row] == pytest.approx([0.0] * 6, abs=1e-12)


def test_who_is_ahead() -> None:
    """Of TRPA's pairs (2 > 1, 2 > 0, 1 > 0) one has its winner ahead; groups with equal rewards have no pair."""
    rho = {2.0: -0.1, 1.0: 0.5, 0.0: 0.2}
    samples = [sample_of([value], reward=reward) for reward, value in rho.items()]
    samples += [sample_of([0.1], reward=1.0, group=1), sample_of([0.2], reward=1.0, group=1)]
    for objective in (PreferencePairLoss(), RelativeRewardRegression()):
        outcome = two_passes(objective, samples, Layout(((0, 3), (4, 2), (1,))))
        assert metric(outcome, "pair_accuracy") == pytest.approx(1 / 3)


def test_value_and_slope_add_up() -> None:
    """Shares are the loss, and slopes are the derivatives of their sum: central differences of the sum by one statistic."""
    samples = random_samples(random.Random(11), 3, 4)
    for objective, _ in DEFINITIONS.values():
        table, _ = gathered(objective, samples, Layout())
        slopes = objective.prepare(table)[SLOPE]
        for row in range(len(samples)):
            moved = []
            for step in (1e-5, -1e-5):
                statistic = table.statistics[objective.name].clone()
                statistic[row] += step
                moved.append(objective.prepare(replace(table, statistics={objective.name: statistic}))[SHARE].sum())
            assert slopes[row].item() == pytest.approx(((moved[0] - moved[1]) / 2e-5).item(), abs=1e-8)


def test_one_pass_is_refused() -> None:
    for objective in (RelativeRewardRegression(), ComposedObjective(SequencePolicyLoss(), [EntropyGuidedWeight()])):
        with pytest.raises(ValueError, match="prepare_groups"):
            run(objective, [sample_of([0.1])])


# -- EGSW ------------------------------------------------------------------------------------------------------------------


@given(samples=steps(), generator=st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_egsw_weights(samples: list[Sample], generator: random.Random) -> None:
    """A softmax over the group, whose mean over the group's responses is 1; against a loop, wherever they lie."""
    objective = ComposedObjective(SequencePolicyLoss(0.2, 0.2), [EntropyGuidedWeight(alpha=0.7, temperature=0.5)])
    layout = scattered(generator, len(samples))
    weights = prepared(objective, samples, layout)["egsw"]
    for group in {sample.group for sample in samples}:
        rows = [i for i, sample in enumerate(samples) if sample.group == group and sample.length]
        raw = [math.exp((samples[i].advantage + 0.7 * sum(samples[i].entropy) / samples[i].length) / 0.5) for i in rows]
        assert [weights[i] for i in rows] == pytest.approx([len(rows) * value / sum(raw) for value in raw], rel=1e-9)
        assert sum(weights[i] for i in rows) == pytest.approx(len(rows))
    assert all(weights[i] == 0.0 for i, sample in enumerate(samples) if not sample.length)
    ours = two_passes(objective, samples, layout).answer.gradient
    plain = run(SequencePolicyLoss(0.2, 0.2), samples).answer.gradient
    for weight, row, unweighted in zip(weights, ours, plain, strict=True):
        assert row == pytest.approx([weight * g for g in unweighted], rel=1e-9, abs=1e-15)


def test_egsw_of_large_scores() -> None:
    """A temperature near 0 picks the best response and overflows nothing; a high one weighs all alike."""
    samples = [sample_of([0.0], advantage=a) for a in (500.0, 1000.0, -3.0)]
    cold, hot = (
        prepared(ComposedObjective(SequencePolicyLoss(), [EntropyGuidedWeight(temperature=t)]), samples, Layout())["egsw"]
        for t in (1e-3, 1e9)
    )
    assert cold == [0.0, 3.0, 0.0]
    assert hot == pytest.approx([1.0, 1.0, 1.0], rel=1e-5)
    with pytest.raises(ValueError, match="temperature"):
        EntropyGuidedWeight(temperature=0.0)
