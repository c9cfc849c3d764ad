"""A step of samples laid out as tensors in any way that must not matter, run through an objective, and read back by sample."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rl.objectives.base import Divisors, GroupTable, Largest, Objective, ObjectiveResult, Smallest, TokenBatch
from tests.objectives.reference import Answer, Sample


@dataclass(frozen=True)
class Layout:
    """How samples lie: who shares a micro-batch and in which order, and what surrounds their tokens."""

    micro_batches: tuple[tuple[int, ...], ...] | None = None  # indices of samples; all in one if not given
    before: int = 0  # padding before each sample
    after: int = 1  # padding after it
    between: int = 0  # tokens that do not count after each that does (what an environment said)
    garbage: float = math.nan  # in every padded entry
    dtype: torch.dtype = torch.float64
    token_advantages: bool = False  # give them as a column, too


@dataclass(frozen=True)
class MicroBatch:
    batch: TokenBatch
    leaf: Tensor  # [tokens] the log-probs that the gradient is taken by
    samples: tuple[int, ...]


def lay_out(
    samples: Sequence[Sample], layout: Layout, scalars: Mapping[str, Sequence[float]] | None = None
) -> list[MicroBatch]:
    """Micro-batches of a step; `scalars` adds numbers by sample to their own."""
    split = layout.micro_batches or (tuple(range(len(samples))),)
    divisors = Divisors(sequences=sum(s.length > 0 for s in samples), tokens=sum(s.length for s in samples))
    return [_micro_batch(samples, chosen, layout, divisors, scalars or {}) for chosen in split]


def _micro_batch(
    samples: Sequence[Sample],
    chosen: tuple[int, ...],
    layout: Layout,
    divisors: Divisors,
    scalars: Mapping[str, Sequence[float]],
) -> MicroBatch:
    here = [samples[i] for i in chosen]
    count = len(here)

    def around(row: Sequence[Any], filler: Any) -> list[Any]:
        inner = [entry for value in row for entry in [value, *[filler] * layout.between]]
        return [*[filler] * layout.before, *inner, *[filler] * layout.after]

    def flat(rows: Sequence[Sequence[float]]) -> Tensor:  # [tokens]
        return torch.tensor([value for row in rows for value in around(row, layout.garbage)], dtype=layout.dtype)

    def by_sample(values: Sequence[float]) -> Tensor:  # [count]
        return torch.tensor(list(values), dtype=layout.dtype)

    marks = [around([True] * sample.length, False) for sample in here]
    mask = torch.tensor([mark for row in marks for mark in row], dtype=torch.bool)
    segments = torch.tensor([i for i, row in enumerate(marks) for _ in row], dtype=torch.int64)
    leaf = flat([sample.new for sample in here]).requires_grad_()

    def sum_sequences(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=values.dtype).index_add(0, segments, torch.where(mask, values, 0.0))

    own = {name: by_sample([getattr(s, name) for s in here]) for name in ("advantage", "reward", "initial_entropy")}
    given = {name: by_sample([values[i] for i in chosen]) for name, values in scalars.items()}
    columns = {name: flat([getattr(s, name) for s in here]) for name in ("old", "rollout", "reference", "conflict")}
    if layout.token_advantages:
        columns["token_advantage"] = flat([sample.token_advantage for sample in here])
    batch = TokenBatch(
        log_probs=leaf,
        mask=mask,
        segments=segments,
        lengths=by_sample([float(sample.length) for sample in here]),
        columns=columns,
        scalars={**own, **given},
        divisors=divisors,
        sum_sequences=sum_sequences,
        entropy=flat([sample.entropy for sample in here]),
    )
    return MicroBatch(batch, leaf, chosen)


@dataclass(frozen=True)
class Outcome:
    """What an objective said of a step: loss and gradient by sample, and the results of each micro-batch."""

    answer: Answer
    results: list[ObjectiveResult]


def run(objective: Objective, samples: Sequence[Sample], layout: Layout | None = None, **scalars: Sequence[float]) -> Outcome:
    """Sum the contributions of all micro-batches; entries outside the masks must get no gradient at all."""
    loss, gradient, results = 0.0, [[0.0]] * len(samples), []
    for micro_batch in lay_out(samples, layout or Layout(), scalars):
        result = objective(micro_batch.batch)
        results.append(result)
        loss += result.loss.item()
        slopes = torch.zeros_like(micro_batch.leaf)
        if result.loss.requires_grad:
            (taken,) = torch.autograd.grad(result.loss, micro_batch.leaf, allow_unused=True)
            slopes = slopes if taken is None else taken
        outside = slopes[~micro_batch.batch.mask]
        assert torch.equal(outside, torch.zeros_like(outside))
        numbers = [number for m in result.metrics.values() for number in vars(m).values() if isinstance(number, Tensor)]
        assert not any(number.requires_grad for number in numbers)
        for place, i in enumerate(micro_batch.samples):
            gradient[i] = slopes[micro_batch.batch.mask & (micro_batch.batch.segments == place)].tolist()
    return Outcome(Answer(loss, gradient), results)


def prepared(objective: Any, samples: Sequence[Sample], layout: Layout) -> dict[str, list[float]]:
    """What lies between the passes of an objective that looks at groups: numbers by sample."""
    order: list[int] = []
    parts = []
    for micro_batch in lay_out(samples, layout):
        order += micro_batch.samples
        parts.append(objective.statistics(micro_batch.batch))
    table = GroupTable(
        groups=torch.tensor([samples[i].group for i in order]),
        rewards=torch.tensor([samples[i].reward for i in order], dtype=layout.dtype),
        lengths=torch.tensor([float(samples[i].length) for i in order]),
        statistics={name: torch.cat([part[name] for part in parts]) for name in parts[0]},
        advantages=torch.tensor([samples[i].advantage for i in order], dtype=layout.dtype),
    )
    rows = {name: values.tolist() for name, values in objective.prepare(table).items()}
    return {name: [row for _, row in sorted(zip(order, values, strict=True))] for name, values in rows.items()}


def run_whole(objective: Any, samples: Sequence[Sample], layout: Layout | None = None) -> Outcome:
    """`run`, after the pass over groups where the objective wants one."""
    layout = layout or Layout()
    scalars = prepared(objective, samples, layout) if objective.reads_groups else {}
    return run(objective, samples, layout, **scalars)


def metric(outcome: Outcome, name: str) -> float:
    """A metric over all micro-batches, put together as ranks would."""
    found: list[Any] = [result.metrics[name] for result in outcome.results]
    if isinstance(found[0], Largest | Smallest):
        return (max if isinstance(found[0], Largest) else min)(float(m.value) for m in found)
    sums = [sum(float(number) for number in numbers) for numbers in zip(*(m.sums() for m in found), strict=True)]
    return float(found[0].finish(*sums))
