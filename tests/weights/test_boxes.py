"""Boxes of flat ranges, their overlaps, and schedules: pure functions against slow ones."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config.settings import OptimizerSettings
from megatron_rl.policy.schedule import learning_rate, weight_decay
from megatron_rl.weights.boxes import overlap, row_major_boxes, within

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_boxes_fill_exactly_the_flat_range(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers = np.arange(size).reshape(shape)
    covered: list[int] = []
    for low, high, (offset, extent) in row_major_boxes(shape, start, stop):
        box = numbers[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))]
        assert box.shape == tuple(extent)
        assert box.ravel().tolist() == list(range(low, high))  # in the order in which the flat range holds them
        covered += range(low, high)
    assert covered == list(range(start, stop))
    if len(shape) == 2:
        assert len(list(row_major_boxes(shape, start, stop))) <= 3


BOX = st.tuples(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.tuples(st.integers(1, 4), st.integers(1, 4)))


@given(BOX, BOX)
def test_overlap_is_the_common_cells(a: tuple[tuple[int, ...], ...], b: tuple[tuple[int, ...], ...]) -> None:
    def cells(box: tuple[tuple[int, ...], ...]) -> set[tuple[int, int]]:
        (row, column), (rows, columns) = box
        return {(i, j) for i in range(row, row + rows) for j in range(column, column + columns)}

    shared = overlap((a[0], a[1]), (b[0], b[1]))
    assert (cells(shared) if shared else set()) == cells(a) & cells(b)
    if shared:
        grid = np.arange(64).reshape(8, 8)
        whole = grid[within((a[0], a[1]), ((0, 0), (8, 8)))]
        np.testing.assert_array_equal(whole[within(shared, (a[0], a[1]))], grid[within(shared, ((0, 0), (8, 8)))])


@pytest.mark.parametrize(
    ("schedule", "halfway"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0), ("inverse_sqrt", math.sqrt(10 / 61))]
)
def test_learning_rates(schedule: str, halfway: float) -> None:
    settings = OptimizerSettings.model_validate({"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, "lr_schedule": schedule})
    rates = [learning_rate(settings, step, 110) for step in range(120)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[60] == pytest.approx(halfway)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))
    if schedule in ("linear", "cosine"):
        assert rates[110:] == pytest.approx([0.1] * 10)
    assert min(rates[10:]) >= 0.1


def test_weight_decay_goes_from_start_to_end() -> None:
    settings = OptimizerSettings(weight_decay=0.1, weight_decay_end=0.5, weight_decay_schedule="linear")
    assert [weight_decay(settings, step, 100) for step in (0, 50, 100, 150)] == pytest.approx([0.1, 0.3, 0.5, 0.5])
    assert weight_decay(OptimizerSettings(weight_decay=0.1), 50, 100) == 0.1
