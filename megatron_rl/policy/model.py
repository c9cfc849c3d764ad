"""A Megatron-core GPT model built from an HF config, spread over the layout's ranks.

`build_model` makes this rank's chunks, gives them weights that do not depend on the layout, and wraps them for data-parallel
training. `named_shards` says, for every parameter of this rank, which slice of which global tensor it is: initialisation,
checkpoints and tests all speak in these.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.layout_map import stage_layers
from megatron_rl.config.settings import Settings
from megatron_rl.policy.layout import Layout
from megatron_rl.policy.modules import without_extra_state
from megatron_rl.policy.precision import simulate_fp8, takes_transformer_engine
from megatron_rl.policy.specs import backend_for, block_spec
from megatron_rl.policy.transformer_config import build_transformer_config, gpt_model_arguments


@dataclass(frozen=True)
class Model:
    """This rank's part of the model: one wrapped chunk, or several under a virtual pipeline."""

    chunks: tuple[DistributedDataParallel, ...]
    config: TransformerConfig
    architecture: Architecture

    @property
    def bare_chunks(self) -> list[GPTModel]:
        return [bare(chunk) for chunk in self.chunks]

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Every parameter of this rank under a name that is unique on it."""
        for index, chunk in enumerate(self.bare_chunks):
            for name, parameter in chunk.named_parameters():
                yield f"{index}.{name}", parameter


def let_go(model: Model) -> None:
    """Loosen what would keep a model, and the process groups that it knows, for good."""
    for chunk in model.chunks:
        chunk.__dict__.clear()  # autograd's hooks hold it, it holds the model, the model holds autograd's graph
    for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
        embedding.forward.cache_clear()  # keyed by the module, which knows its group


def bare(chunk: torch.nn.Module) -> GPTModel:
    """The GPTModel inside its wrappers."""
    while not isinstance(chunk, GPTModel):
        chunk = cast(torch.nn.Module, chunk.module)
    return chunk


def build_model(architecture: Architecture, settings: Settings, layout: Layout) -> Model:
    """Build and wrap this rank's chunks. Weights are random, or, when they come from a checkpoint, not yet anything."""
    device = layout.device
    engine = takes_transformer_engine(settings.precision, device)
    config = build_transformer_config(architecture, settings, cuda=device.cuda, transformer_engine=engine)
    chunks: list[torch.nn.Module] = []
    stages = stage_layers(settings.layout, architecture)[layout.pipeline_rank]
    for index, layers in enumerate(stages):
        chunk: torch.nn.Module = _build_chunk(architecture, config, layout, index, layers)
        _mark_expert_parameters(chunk)
        simulate_fp8(chunk, settings.precision, first_layer=layers.start, layers=architecture.layers)
        if config.bf16:
            chunk = Float16Module(config, chunk)
        chunk.to(device.torch_device)
        chunks.append(chunk)
    if settings.policy.init == "random":
        for chunk in chunks:
            initialize(bare(chunk), layout, settings.policy.seed, architecture.init_std)
    return Model(_wrap(chunks, config, settings, layout), config, architecture)


def _build_chunk(architecture: Architecture, config: TransformerConfig, layout: Layout, index: int, layers: range) -> GPTModel:
    backend = backend_for(config.transformer_impl == "transformer_engine")
    return GPTModel(
        config=config,
        transformer_layer_spec=block_spec(architecture, config, backend, layers, layout.groups.tp),
        pre_process=layout.is_first_stage(index),
        post_process=layout.is_last_stage(index),
        pg_collection=layout.groups,
        vp_stage=index if layout.chunks > 1 else None,
        **gpt_model_arguments(architecture),
    )


def _mark_expert_parameters(chunk: torch.nn.Module) -> None:
    """Say of every expert parameter that it is reduced over expert-data ranks, in every layout.

    Upstream says so only when that group differs from the data-parallel one, and keeps a second optimizer for experts
    only then; the optimizer's structure would depend on the layout, and its checkpoints could not move.
    """
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def _wrap(
    chunks: list[torch.nn.Module], config: TransformerConfig, settings: Settings, layout: Layout
) -> tuple[DistributedDataParallel, ...]:
    wrapping = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=settings.layout.overlap_grad_reduce,
        overlap_param_gather=settings.layout.overlap_param_gather,
        use_distributed_optimizer=settings.layout.distributed_optimizer,
        average_in_collective=False,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        # Only the first chunk's gradients are on the critical path of the last reduction: the others go in one bucket.
        ddp = DistributedDataParallel(
            config, replace(wrapping), chunk, disable_bucketing=index > 0, pg_collection=layout.groups
        )
        wrapped.append(ddp)
    if settings.layout.overlap_grad_reduce:
        config.no_sync_func = [ddp.no_sync for ddp in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return tuple(wrapped)


# -- global names ------------------------------------------------------------------------------------------------------


def sharded_state(chunk: GPTModel, layout: Layout) -> dict[str, Any]:
    """Megatron's description of a chunk: local name -> slice of a global tensor, one global name a layer."""
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": layout.groups.dp_cp}
    return without_extra_state(chunk.sharded_state_dict(metadata=metadata))


def shards_like(description: Any, tensor: Tensor, prefix: str = "") -> list[ShardedTensor]:
    """The slices of global tensors that `tensor` is, being shaped like the parameter that `description` describes.

    A gated layer's weight is two slices (gate and up are cut separately over tensor ranks), others are one.
    """
    if isinstance(description, ShardedTensorFactory):
        pieces: list[ShardedTensor] = replace(description, data=tensor, key=prefix + description.key).build()
        return pieces
    return [replace(description, data=tensor, key=prefix + description.key, dtype=tensor.dtype)]


def named_shards(model: Model, layout: Layout) -> dict[str, Any]:
    """For each name of `Model.named_parameters`, the description of which slice of which global tensor it is."""
    return {
        f"{index}.{name}": description
        for index, chunk in enumerate(model.bare_chunks)
        for name, description in sharded_state(chunk, layout).items()
    }


# -- initialisation ----------------------------------------------------------------------------------------------------


def initialize(chunk: GPTModel, layout: Layout, seed: int, std: float) -> None:
    """Random weights that are the same under every layout: each global matrix is drawn from a generator of its own name."""
    descriptions = sharded_state(chunk, layout)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if "norm" in name.rsplit(".", 2)[-2] + name.rsplit(".", 1)[-1]:
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                for shard in shards_like(descriptions[name], parameter.data):
                    shard.data.copy_(_draw(shard, seed, std))


def _draw(shard: ShardedTensor, seed: int, std: float) -> Tensor:
    """This slice of a normal matrix. Leading (expert) axes choose the matrix, so only one is drawn whole."""
    lead = shard.prepend_axis_num
    matrix = shard.key + str(shard.global_offset[:lead])
    digest = hashlib.sha256(f"{seed}:{matrix}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    whole = torch.randn(shard.global_shape[lead:], generator=generator) * std
    window = tuple(
        slice(start, start + size) for start, size in zip(shard.global_offset[lead:], shard.local_shape, strict=True)
    )
    return whole[window]
