"""Parameters of ranks, as the plan counts them, against the model that Megatron-core builds for that rank.

The model is built on the meta device, by this very process as one rank of a process group of the full size whose collectives do
nothing. Layers are those of the CPU, whose parameters are named and cut as Transformer Engine's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_rl.config.architecture import Architecture, Rope
from megatron_rl.config.checks import check
from megatron_rl.config.layout_map import stage_layers
from megatron_rl.plan.job import Job
from megatron_rl.plan.memory import in_flight, rank_memory
from megatron_rl.policy.device import CPU, Device, adapt_to_cpu
from megatron_rl.policy.layout import Launch, Layout
from megatron_rl.policy.model import _build_chunk
from megatron_rl.policy.transformer_config import build_transformer_config
from tests.plan.jobs import job
from tools.plan_published import DEEPSEEK_V3, LLAMA_405B, MIXTRAL, QWEN3_235B

QWEN = replace(QWEN3_235B, qk_norm="head")
DEEPSEEK = replace(DEEPSEEK_V3, rope=Rope(base=1e4, interleaved=True))
LAYOUTS: dict[str, tuple[Architecture, int, dict[str, Any]]] = {
    "Qwen3-235B on 256": (
        QWEN, 256,
        {"tensor": 4, "pipeline": 8, "context": 2, "expert": 8, "pipeline_layers": [11, 12, 12, 12, 12, 12, 12, 11]},
    ),
    "Qwen3-235B on 256, interleaved": (
        QWEN, 256,
        {"tensor": 2, "pipeline": 4, "virtual_pipeline": 2, "expert": 32, "pipeline_layers": [11, 12, 12, 12, 12, 12, 12, 11]},
    ),
    "Mixtral on 256, experts cut": (MIXTRAL, 256, {"tensor": 2, "pipeline": 4, "expert": 4, "expert_tensor": 2}),
    "DeepSeek-V3 on 1,024": (
        DEEPSEEK, 1024, {"tensor": 4, "pipeline": 16, "expert": 32, "pipeline_layers": [3, *[4] * 14, 2]},
    ),
    "DeepSeek-V3 on 1,024, interleaved": (
        DEEPSEEK, 1024,
        {"pipeline": 8, "virtual_pipeline": 2, "context": 2, "expert": 64, "pipeline_layers": [3, *[4] * 14, 2]},
    ),
    "tied embeddings, dense, on 1,024": (
        replace(LLAMA_405B, tied_embeddings=True, qkv_bias=True), 1024,
        {"tensor": 8, "pipeline": 8, "virtual_pipeline": 2, "context": 2, "pipeline_layers": [7, *[8] * 14, 7]},
    ),
}  # fmt: skip


@contextmanager
def as_rank(planned: Job, rank: int) -> Iterator[Layout]:
    """This process as one rank of many that are not there."""
    adapt_to_cpu()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=planned.world_size)
    device = Device("cpu", CPU, "gloo", transformer_engine=False)
    launch = Launch(rank, planned.world_size, rank % 8, 8)
    layout = Layout.of_initialized_ranks(planned.settings, device, launch)
    try:
        yield layout
    finally:
        layout.close()


def built(planned: Job, layout: Layout) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by name, on the meta device."""
    config = build_transformer_config(planned.architecture, planned.settings, cuda=False, transformer_engine=False)
    config.perform_initialization = False
    with torch.device("meta"):
        chunks = [
            _build_chunk(planned.architecture, config, layout, index, layers)
            for index, layers in enumerate(stage_layers(planned.layout, planned.architecture)[layout.pipeline_rank])
        ]
    return {f"{index}.{name}": value for index, chunk in enumerate(chunks) for name, value in chunk.named_parameters()}


@pytest.mark.parametrize(("architecture", "ranks", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_ranks_hold_what_the_plan_says(architecture: Architecture, ranks: int, layout: dict[str, Any]) -> None:
    planned = job(architecture, ranks, layout=layout)
    assert check(planned.settings, architecture, ranks) == []
    stages = rank_memory(planned)
    looked_at = (stages[0], stages[1], stages[len(stages) // 2], stages[-1])
    for stage in looked_at:
        for rank in (stage.ranks.start, stage.ranks.stop - 1):
            with as_rank(planned, rank) as here:
                parameters = built(planned, here)
                assert here.pipeline_rank == stage.stage
                chunks = planned.layout.virtual_pipeline
                group = planned.layout.pipeline if chunks > 1 else None
                _, _, warm_up, _ = get_pp_rank_microbatches(10**6, chunks, group)
            assert sum(parameter.numel() for parameter in parameters.values()) == stage.parameters.total
            assert sum(p.numel() * p.element_size() for p in parameters.values()) == stage.weights
            experts = sum(p.numel() for name, p in parameters.items() if ".mlp.experts." in name)
            assert experts == stage.parameters.experts
            # After the warm-up each forward pass of a chunk is followed by a backward pass.
            assert in_flight(planned, stage.stage) == (warm_up + 1) / chunks
