"""The layout on paper against Megatron's own: rank groups, layers of stages; and alignment against its definition."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_rl.config.architecture import Architecture, Experts, Rope
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.layout_map import (
    FP8_TOKENS,
    Coordinates,
    alignment,
    data_size,
    expert_data_size,
    local_experts,
    padded_vocab,
    rank_coordinates,
    smallest_world_size,
    stage_layers,
)
from megatron_rl.config.settings import LayoutSettings, Settings

SIZES = st.integers(1, 4)
LAYOUTS = st.builds(LayoutSettings, tensor=SIZES, pipeline=SIZES, context=SIZES, expert=SIZES, expert_tensor=SIZES)
MODEL = Architecture(
    family="qwen3_moe", layers=8, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn_hidden=128, vocab=100, max_positions=64,
    norm_eps=1e-6, rope=Rope(base=1e4), tied_embeddings=False, moe_layers=(True,) * 8,
    experts=Experts(count=12, top_k=2, hidden=32, scoring="softmax", normalize_top_k=True, softmax_before_top_k=False),
)  # fmt: skip


def groups(
    coordinates: Iterable[Coordinates], axes: Iterable[str], along: Callable[[Coordinates], tuple[int, ...]]
) -> list[list[int]]:
    """Ranks that agree in all of `axes`, each group in the order of `along`."""
    found = defaultdict(list)
    for place in sorted(coordinates, key=along):
        found[tuple(asdict(place)[axis] for axis in axes)].append(place.rank)
    return sorted(found.values())


@settings(deadline=None)
@given(layout=LAYOUTS, replicas=st.integers(1, 3))
def test_ranks_stand_where_megatron_puts_them(layout: LayoutSettings, replicas: int) -> None:
    world = replicas * smallest_world_size(layout)
    places = rank_coordinates(layout, world)
    assert [place.rank for place in places] == list(range(world))
    sizes = {"tp": layout.tensor, "cp": layout.context, "dp": data_size(layout, world), "pp": layout.pipeline}
    dense = RankGenerator(ep=1, order="tp-cp-ep-dp-pp", **sizes)
    copies = expert_data_size(layout, world)
    sparse = RankGenerator(
        tp=layout.expert_tensor, ep=layout.expert, dp=copies, pp=layout.pipeline, cp=1, order="tp-cp-ep-dp-pp"
    )
    assert groups(places, ("context", "data", "pipeline"), lambda p: (p.tensor,)) == sorted(dense.get_ranks("tp"))
    assert groups(places, ("tensor", "data", "pipeline"), lambda p: (p.context,)) == sorted(dense.get_ranks("cp"))
    assert groups(places, ("tensor", "context", "pipeline"), lambda p: (p.data,)) == sorted(dense.get_ranks("dp"))
    assert groups(places, ("tensor", "context", "data"), lambda p: (p.pipeline,)) == sorted(dense.get_ranks("pp"))
    assert groups(places, ("tensor", "pipeline"), lambda p: (p.data, p.context)) == sorted(dense.get_ranks("dp-cp"))
    assert groups(places, ("expert", "expert_data", "pipeline"), lambda p: (p.expert_tensor,)) == sorted(sparse.get_ranks("tp"))
    assert groups(places, ("expert_tensor", "expert_data", "pipeline"), lambda p: (p.expert,)) == sorted(sparse.get_ranks("ep"))
    assert groups(places, ("expert_tensor", "expert", "pipeline"), lambda p: (p.expert_data,)) == sorted(sparse.get_ranks("dp"))
    assert groups(places, ("expert_tensor", "expert", "expert_data"), lambda p: (p.pipeline,)) == sorted(sparse.get_ranks("pp"))


@settings(deadline=None)
@given(layout=LAYOUTS, world=st.integers(1, 400))
def test_a_world_that_does_not_hold_the_layout_is_refused(layout: LayoutSettings, world: int) -> None:
    stage = world / layout.pipeline
    holds = stage % (layout.tensor * layout.context) == 0 and stage % (layout.expert * layout.expert_tensor) == 0
    assert holds == (world % smallest_world_size(layout) == 0)
    if not holds:
        with pytest.raises(SettingsError, match=f"Start a multiple of {smallest_world_size(layout)} ranks"):
            rank_coordinates(layout, world)


@settings(deadline=None)
@given(layout=LAYOUTS, per_chunk=st.integers(1, 3), virtual=st.integers(1, 3))
def test_even_stages_hold_the_layers_megatron_gives_them(layout: LayoutSettings, per_chunk: int, virtual: int) -> None:
    virtual = virtual if layout.pipeline > 1 else 1
    layout = layout.model_copy(update={"virtual_pipeline": virtual})
    layers = per_chunk * layout.pipeline * virtual
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=4,
        num_attention_heads=1,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_dtype="unused",
    )
    for stage, chunks in enumerate(stage_layers(layout, replace(MODEL, layers=layers))):
        for index, chunk in enumerate(chunks):
            vp_stage = index if virtual > 1 else None
            assert chunk.start == get_transformer_layer_offset(config, vp_stage, stage)
            assert len(chunk) == get_num_layers_to_build(config, vp_stage, stage)


@settings(deadline=None)
@given(data=st.data(), pipeline=SIZES, virtual=st.integers(1, 3))
def test_uneven_stages_hold_the_layers_megatron_gives_them(data: st.DataObject, pipeline: int, virtual: int) -> None:
    chunks = pipeline * virtual
    sizes = tuple(data.draw(st.lists(st.integers(0, 4), min_size=chunks, max_size=chunks)))
    layout = LayoutSettings(pipeline=pipeline, virtual_pipeline=virtual, pipeline_layers=sizes)
    stages = stage_layers(layout, replace(MODEL, layers=sum(sizes)))
    theirs = PipelineParallelLayerLayout([["decoder"] * size for size in sizes], pipeline).layout
    assert [[len(chunk) for chunk in stage] for stage in stages] == [[len(chunk) for chunk in stage] for stage in theirs]
    assert LayerType.decoder in {kind for stage in theirs for chunk in stage for kind in chunk} or not sum(sizes)
    in_model_order = [stages[number % pipeline][number // pipeline] for number in range(chunks)]
    assert all(before.stop == after.start for before, after in pairwise(in_model_order))
    assert in_model_order[0].start == 0 and in_model_order[-1].stop == sum(sizes)


def test_layers_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"8 layers do not divide over 3 chunks. Say how with layout.pipeline_layers"):
        stage_layers(LayoutSettings(pipeline=3), MODEL)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_each_expert_has_one_place(size: int) -> None:
    layout = LayoutSettings(expert=size)
    held = [list(local_experts(layout, MODEL, rank)) for rank in range(size)]
    assert [expert for share in held for expert in share] == list(range(12))
    assert len({len(share) for share in held}) == 1


@settings(deadline=None)
@given(
    context=st.integers(1, 6),
    tensor=st.integers(1, 6),
    sequence_parallel=st.booleans(),
    fp8=st.sampled_from(["off", "simulated", "transformer_engine"]),
    recipe=st.sampled_from(list(FP8_TOKENS)),
)
def test_alignment_is_the_smallest_that_cuts_evenly(
    context: int, tensor: int, sequence_parallel: bool, fp8: str, recipe: str
) -> None:
    sequence_parallel = sequence_parallel and tensor > 1
    wanted = Settings.model_validate(
        {
            "policy": {"config": "m"},
            "layout": {"context": context, "tensor": tensor, "sequence_parallel": sequence_parallel},
            "precision": {"fp8": fp8, "fp8_recipe": recipe},
        }
    )
    pieces = 2 * context if context > 1 else 1  # zig-zag: each context rank takes one from each end

    def sequence_is_even(length: int) -> bool:
        return length % pieces == 0 and (not sequence_parallel or length // pieces % tensor == 0)

    def tokens_of_a_rank(pack: int) -> int:
        return pack // context // (tensor if sequence_parallel else 1)

    def pack_is_even(length: int) -> bool:
        return sequence_is_even(length) and (fp8 == "off" or tokens_of_a_rank(length) % FP8_TOKENS[recipe] == 0)

    found = alignment(wanted)
    assert found.sequence == next(filter(sequence_is_even, count(1)))
    assert found.pack == next(filter(pack_is_even, count(1)))
    assert found.pack % found.sequence == 0


@given(vocab=st.integers(1, 300_000))
def test_padded_vocabulary(vocab: int) -> None:
    padded = padded_vocab(vocab)
    assert padded % 128 == 0 and 0 <= padded - vocab < 128
