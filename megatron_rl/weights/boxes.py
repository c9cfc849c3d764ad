"""Boxes of global tensors: the words in which weights are cut, found, moved and put together, whatever the layout.

A slice says which box of which global tensor a live tensor of this rank is. Weights, float32 masters and Adam's moments are
all described so; a checkpoint is a set of saved slices, and loading is filling boxes from whatever boxes were saved.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, size


@dataclass(frozen=True)
class Slice:
    """A live tensor, and the box of a global tensor that it is."""

    name: str
    shape: tuple[int, ...]  # of the global tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]
    tensor: Tensor  # numel = product of size; filled in place when loading
    saved_here: bool  # exactly one rank saves each box


def row_major_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int, Box]]:
    """Cut the flat range start … stop of a row-major tensor into boxes: (flat start, flat stop, box), in order.

    A range of a matrix is at most three boxes: the end of a row, whole rows, the beginning of a row.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield start, stop, ((start,), (stop - start,))
        return
    inner = math.prod(shape[1:])
    first_row, last_row = start // inner, (stop - 1) // inner
    if start % inner or (first_row == last_row and stop - start < inner):
        end = min(stop, (first_row + 1) * inner)
        base = first_row * inner
        for low, high, (offset, size) in row_major_boxes(shape[1:], start - base, end - base):
            yield base + low, base + high, ((first_row, *offset), (1, *size))
        yield from row_major_boxes(shape, end, stop)
        return
    rows = (stop - start) // inner
    whole = start + rows * inner
    zeros = (0,) * (len(shape) - 1)
    yield start, whole, ((first_row, *zeros), (rows, *shape[1:]))
    yield from row_major_boxes(shape, whole, stop)


def overlap(a: Box, b: Box) -> Box | None:
    """The box that two boxes share."""
    low = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    high = tuple(min(x + m, y + n) for x, m, y, n in zip(a[0], a[1], b[0], b[1], strict=True))
    size = tuple(end - begin for begin, end in zip(low, high, strict=True))
    return (low, size) if all(length > 0 for length in size) else None


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where `box` lies inside `outer`, as an index."""
    return tuple(slice(low - start, low - start + length) for low, length, start in zip(box[0], box[1], outer[0], strict=True))


def finite(values: Tensor) -> bool:
    """Are all numbers finite? By the smallest and the largest, to which NaN spreads: far cheaper than asking each."""
    return not values.numel() or all(math.isfinite(bound.item()) for bound in torch.aminmax(values))
