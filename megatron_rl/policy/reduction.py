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
        once = layout.context_rank == 0  # of what all context ranks hold alike, the first one's is counted
        sums = torch.stack([_vector(_counted(result, names, once), result.loss) for result in results]).sum(0)
        extremes = torch.stack([_vector(_extremes(result, names), result.loss) for result in results]).amax(0)
        loss, *totals = layout.sum_over_data_and_context(sums).tolist()
        largest = layout.largest_over_data_and_context(extremes).tolist()
        reduced = loss, {name: _finish(first[name], totals, largest) for name in names}
    return layout.object_from_last_stage(reduced)


def _counted(result: ObjectiveResult, names: Sequence[str], once: bool) -> list[Tensor]:
    """The loss and the metrics' sums, zero where another rank's are counted."""
    summed = [m for m in (result.metrics[name] for name in names) if not isinstance(m, Largest | Smallest)]
    numbers = [(result.loss, False), *((number, metric.partial) for metric in summed for number in metric.sums())]
    return [number if partial or once else torch.zeros_like(number) for number, partial in numbers]


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
