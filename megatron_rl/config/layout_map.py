"""Which rank holds what, worked out from the settings alone: pure arithmetic, no process groups.

The policy builds the same layout out of Megatron's process groups; tests hold the two against each other.
"""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.settings import LayoutSettings, Settings

# Tokens that an FP8 matrix product takes together. 16: alignment of FP8 tensor cores. 32: the blocks of MXFP8. 128: those of
# blockwise scaling, which Transformer Engine insists on for what is gathered over tensor ranks (Float8BlockQuantizer).
FP8_TOKENS = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}


VOCAB_MULTIPLE = 128  # the padded vocabulary must not depend on the layout, or checkpoints could not move between layouts


@dataclass(frozen=True)
class Alignment:
    """How much padding a pack needs: each sequence to a multiple of `sequence`, the whole pack to a multiple of `pack`."""

    sequence: int
    pack: int


def alignment(settings: Settings) -> Alignment:
    """The multiples that the layout and FP8 ask for.

    Context parallelism cuts every sequence into 2 x context equal pieces (zig-zag), sequence parallelism cuts each of them
    over the tensor ranks. FP8 looks at the tokens that one rank holds, of whatever sequence: it binds the pack only.
    """
    layout, precision = settings.layout, settings.precision
    split = layout.tensor if layout.sequence_parallel_on else 1
    sequence = (2 * layout.context if layout.context > 1 else 1) * split
    if precision.fp8 == "off":
        return Alignment(sequence, sequence)
    return Alignment(sequence, math.lcm(sequence, layout.context * split * FP8_TOKENS[precision.fp8_recipe]))


@dataclass(frozen=True)
class Coordinates:
    """The place of a global rank. Dense parameters are laid out by (tensor, context, data), experts by (expert_tensor,
    expert, expert_data); both fill the same ranks of a pipeline stage."""

    rank: int
    pipeline: int
    tensor: int
    context: int
    data: int
    expert_tensor: int
    expert: int
    expert_data: int


def rank_coordinates(layout: LayoutSettings, world_size: int) -> list[Coordinates]:
    """The coordinates of every rank in Megatron's order tp-cp-ep-dp-pp, the first changing fastest.

    Source: megatron.core.parallel_state.RankGenerator. Experts have no context axis, dense parameters no expert axis.
    """
    stage = stage_size(layout, world_size)
    return [
        Coordinates(
            rank=rank,
            pipeline=rank // stage,
            tensor=rank % layout.tensor,
            context=rank // layout.tensor % layout.context,
            data=rank % stage // (layout.tensor * layout.context),
            expert_tensor=rank % layout.expert_tensor,
            expert=rank // layout.expert_tensor % layout.expert,
            expert_data=rank % stage // (layout.expert_tensor * layout.expert),
        )
        for rank in range(world_size)
    ]


def stage_size(layout: LayoutSettings, world_size: int) -> int:
    """Ranks of one pipeline stage: whole sets of dense shards and whole sets of experts."""
    stage = world_size // layout.pipeline
    whole = math.lcm(layout.tensor * layout.context, layout.expert * layout.expert_tensor)
    if world_size % layout.pipeline or stage % whole:
        raise SettingsError(
            f"{world_size} ranks cannot hold this layout: each of the {layout.pipeline} pipeline stages takes a multiple of "
            f"{whole} ranks. Start a multiple of {smallest_world_size(layout)} ranks."
        )
    return stage


def smallest_world_size(layout: LayoutSettings) -> int:
    """The fewest ranks that hold the layout; every multiple of it holds it too."""
    return layout.pipeline * math.lcm(layout.tensor * layout.context, layout.expert * layout.expert_tensor)


def data_size(layout: LayoutSettings, world_size: int) -> int:
    """Model replicas: each works on packs of its own."""
    return stage_size(layout, world_size) // (layout.tensor * layout.context)


def expert_data_size(layout: LayoutSettings, world_size: int) -> int:
    """Copies of each expert."""
    return stage_size(layout, world_size) // (layout.expert_tensor * layout.expert)


def chunk_sizes(layout: LayoutSettings, layers: int) -> tuple[int, ...]:
    """Decoder layers of each of the pipeline x virtual_pipeline chunks, in the order of the model."""
    if layout.pipeline_layers is not None:
        return layout.pipeline_layers
    chunks = layout.pipeline * layout.virtual_pipeline
    if layers % chunks:
        raise SettingsError(f"{layers} layers do not divide over {chunks} chunks. Say how with layout.pipeline_layers.")
    return (layers // chunks,) * chunks


def stage_layers(layout: LayoutSettings, architecture: Architecture) -> list[list[range]]:
    """For each pipeline stage, for each of its virtual chunks, the decoder layers it holds, counted from 0.

    Chunks are dealt out in turn: chunk v of stage p is number v x pipeline + p of the model (interleaved schedule).
    """
    sizes = chunk_sizes(layout, architecture.layers)
    chunks = [range(start, end) for start, end in pairwise(accumulate(sizes, initial=0))]
    return [chunks[stage :: layout.pipeline] for stage in range(layout.pipeline)]


def padded_vocab(vocab: int) -> int:
    """Rows of the embedding and output matrices. Those beyond the vocabulary are never predicted."""
    return -(-vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def local_experts(layout: LayoutSettings, architecture: Architecture, expert_rank: int) -> range:
    """The experts of an expert-parallel rank: equal runs, in order."""
    if architecture.experts is None:
        return range(0)
    share = architecture.experts.count // layout.expert
    return range(expert_rank * share, (expert_rank + 1) * share)
