"""A policy's state as named slices of global tensors: what each rank holds, in words that no layout changes.

A slice says which box of which global tensor a live tensor of this rank is. Weights, float32 masters and Adam's moments are
all described so; a checkpoint is a set of saved slices, and loading is filling boxes from whatever boxes were saved.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from torch import Tensor

from megatron_rl.policy.layout import Layout
from megatron_rl.policy.model import Model, named_shards, sharded_state, shards_like
from megatron_rl.policy.optimizer import ParameterState

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


def model_slices(model: Model, layout: Layout) -> Iterator[Slice]:
    """Weights, and the buffers that belong to them (expert biases)."""
    for chunk in model.bare_chunks:
        live = {**dict(chunk.named_parameters()), **dict(chunk.named_buffers())}
        for name, description in sharded_state(chunk, layout).items():
            for shard in shards_like(description, live[name].data, prefix="model."):
                lead = (1,) * shard.prepend_axis_num
                size = (*lead, *shard.local_shape)
                yield Slice(
                    shard.key, shard.global_shape, shard.global_offset, size, shard.data, is_main_replica(shard.replica_id)
                )


def optimizer_slices(model: Model, states: Iterable[ParameterState], layout: Layout) -> Iterator[Slice]:
    """Per-parameter state (Adam's moments, float32 masters), cut as the weights are and then over data-parallel ranks."""
    descriptions = named_shards(model, layout)
    parameters = dict(model.named_parameters())
    distributed = layout.settings.distributed_optimizer
    for state in states:
        parameter = parameters[state.name].data
        for shard in shards_like(descriptions[state.name], parameter):
            begin = shard.data.storage_offset() - parameter.storage_offset()
            low, high = max(state.start - begin, 0), min(state.stop - begin, shard.data.numel())
            for start, stop, box in row_major_boxes(tuple(shard.local_shape), low, high):
                here = slice(begin + start - state.start, begin + stop - state.start)
                for kind, tensor in state.tensors.items():
                    yield _state_slice(f"optimizer.{kind}.{shard.key}", shard, box, tensor[here], distributed)


def _state_slice(name: str, shard: ShardedTensor, box: Box, tensor: Tensor, distributed: bool) -> Slice:
    """The last number of a replica id counts data-parallel copies; a distributed optimizer has none."""
    lead = shard.prepend_axis_num
    inner = tuple(a + b for a, b in zip(shard.global_offset[lead:], box[0], strict=True))
    replica = shard.replica_id[:-1] if distributed else shard.replica_id
    return Slice(
        name=name,
        shape=tuple(shard.global_shape),
        offset=(*shard.global_offset[:lead], *inner),
        size=(*(1,) * lead, *box[1]),
        tensor=tensor,
        saved_here=all(number == 0 for number in replica),
    )


def overlap(a: Box, b: Box) -> Box | None:
    """The box that two boxes share."""
    low = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    high = tuple(min(x + m, y + n) for x, m, y, n in zip(a[0], a[1], b[0], b[1], strict=True))
    size = tuple(end - begin for begin, end in zip(low, high, strict=True))
    return (low, size) if all(length > 0 for length in size) else None


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where `box` lies inside `outer`, as an index."""
    return tuple(slice(low - start, low - start + length) for low, length, start in zip(box[0], box[1], outer[0], strict=True))
