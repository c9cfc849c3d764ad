"""A policy's state as named slices of global tensors: what each rank holds, in words that no layout changes."""

from collections.abc import Iterable, Iterator

from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from torch import Tensor

from megatron_rl.policy.layout import Layout
from megatron_rl.policy.model import Model, named_shards, sharded_state, shards_like
from megatron_rl.policy.optimizer import ParameterState
from megatron_rl.weights.boxes import Box, Slice, row_major_boxes


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
