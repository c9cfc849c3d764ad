"""Loss and metrics of a whole optimizer step, from what its micro-batches gave on every rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.objectives.base import Largest, Metric, ObjectiveResult, Smallest
from megatron_rl.policy.layout import Layout


def reduce_results(results: Sequence[ObjectiveResult], layout: Layout) -> tuple[float, dict[str, float]]:
    """The loss and each metric by name, on every rank. All micro-batches of the step must have metrics of the same kinds."""
    reduced: tuple[float, dict[str, float]] = (0.0, {})
    if layout.sees_loss:
        first = results[0].metrics
        names = sorted(first)
        sums = torch.stack([_vector([result.loss, *_sums(result, names)], result.loss) for result in results]).sum(0)
        extremes = torch.stack([_vector(_extremes(result, names), result.loss) for result in results]).amax(0)
        loss, *totals = layout.sum_over_data(sums).tolist()
        largest = layout.largest_over_data(extremes).tolist()
        reduced = loss, {name: _finish(first[name], totals, largest) for name in names}
    return layout.object_from_last_stage(reduced)


def _sums(result: ObjectiveResult, names: Sequence[str]) -> list[Tensor]:
    metrics = [result.metrics[name] for name in names]
    return [number for metric in metrics if not isinstance(metric, Largest | Smallest) for number in metric.sums()]


def _extremes(result: ObjectiveResult, names: Sequence[str]) -> list[Tensor]:
    """All as values whose largest is wanted."""
    metrics = [result.metrics[name] for name in names]
    return [m.value if isinstance(m, Largest) else -m.value for m in metrics if isinstance(m, Largest | Smallest)]


def _vector(numbers: list[Tensor], like: Tensor) -> Tensor:
    """float64, where `like` is."""
    return torch.stack([number.double() for number in numbers]) if numbers else like.new_zeros(0, dtype=torch.float64)


def _finish(metric: Metric, totals: list[float], largest: list[float]) -> float:
    """Take this metric's numbers from the front of the lists."""
    if isinstance(metric, Largest | Smallest):
        value = largest.pop(0)
        sign = 1.0 if isinstance(metric, Largest) else -1.0
        return sign * value if value != -torch.inf else 0.0
    return metric.finish(*(totals.pop(0) for _ in metric.sums()))
