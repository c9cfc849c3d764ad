"""Layer specs: which module stands at each place of a transformer layer, by backend.

One description of the layers serves Transformer Engine (on a GPU) and plain torch (anywhere): a `Backend` names the
modules, `layer_spec` puts them in place. Parameter names are Transformer Engine's in both cases.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import TransformerLayerSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_rl.config.architecture import Architecture
from megatron_rl.policy.attention import PackedAttention
from megatron_rl.policy.group_choice import router_for
from megatron_rl.policy.modules import (
    ColumnGroupedLinear,
    FullWidthRMSNorm,
    LatentSelfAttention,
    NormColumnParallelLinear,
    RMSNorm,
    RowGroupedLinear,
)


@dataclass(frozen=True)
class Backend:
    """The modules that layers are made of. `down` and `normed_up` lead into and, with a norm, out of MLA's bottlenecks."""

    norm: type
    column: type
    row: type
    norm_column: type
    down: type
    normed_up: type
    latent_attention: type
    core_attention: type
    grouped_column: type
    grouped_row: type


def torch_backend() -> Backend:
    return Backend(
        norm=RMSNorm,
        column=ColumnParallelLinear,
        row=RowParallelLinear,
        norm_column=NormColumnParallelLinear,
        down=ColumnParallelLinear,
        normed_up=NormColumnParallelLinear,
        latent_attention=LatentSelfAttention,
        core_attention=PackedAttention,
        grouped_column=ColumnGroupedLinear,
        grouped_row=RowGroupedLinear,
    )


def transformer_engine_backend() -> Backend:
    from megatron.core.extensions import transformer_engine as te

    # Megatron decides by identity with TELayerNormColumnParallelLinear whether an MLA bottleneck is normed, and then
    # also norms the query of models without a query bottleneck, which none of them do. A subclass is built as it stands.
    normed_up = type("NormedUpProjection", (te.TELayerNormColumnParallelLinear,), {})
    return Backend(
        norm=te.TENorm,
        column=te.TEColumnParallelLinear,
        row=te.TERowParallelLinear,
        norm_column=te.TELayerNormColumnParallelLinear,
        down=te.TELinear,
        normed_up=normed_up,
        latent_attention=MLASelfAttention,
        core_attention=te.TEDotProductAttention,
        grouped_column=te.TEColumnParallelGroupedLinear,
        grouped_row=te.TERowParallelGroupedLinear,
    )


def backend_for(transformer_engine: bool) -> Backend:
    return transformer_engine_backend() if transformer_engine else torch_backend()


def _latent_attention(backend: Backend) -> ModuleSpec:
    return ModuleSpec(
        module=backend.latent_attention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=backend.column,
            linear_q_down_proj=backend.down,
            linear_q_up_proj=backend.normed_up,
            linear_kv_down_proj=backend.down,
            linear_kv_up_proj=backend.normed_up,
            core_attention=backend.core_attention,
            linear_proj=backend.row,
            q_layernorm=IdentityOp,
            kv_layernorm=IdentityOp,
        ),
    )


def _attention(architecture: Architecture, backend: Backend, tensor_group: Any) -> ModuleSpec:
    q_norm: Any = None
    k_norm: Any = None
    if architecture.qk_norm == "head":
        q_norm = k_norm = backend.norm
    elif architecture.qk_norm == "full":
        q_norm = partial(FullWidthRMSNorm, heads=architecture.heads, group=tensor_group)
        k_norm = partial(FullWidthRMSNorm, heads=architecture.kv_heads, group=tensor_group)
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.norm_column,
            core_attention=backend.core_attention,
            linear_proj=backend.row,
            q_layernorm=q_norm,
            k_layernorm=k_norm,
        ),
    )


def _experts(architecture: Architecture, backend: Backend) -> Any:
    assert architecture.experts is not None
    shared = None
    if architecture.experts.shared_hidden:
        shared = partial(SharedExpertMLP, submodules=MLPSubmodules(linear_fc1=backend.column, linear_fc2=backend.row))
    grouped = partial(
        TEGroupedMLP,
        submodules=GroupedMLPSubmodules(linear_fc1=backend.grouped_column, linear_fc2=backend.grouped_row),
    )
    router = router_for(architecture.experts)
    return partial(MoELayer, submodules=MoESubmodules(experts=grouped, shared_experts=shared, router=router))


def layer_spec(architecture: Architecture, backend: Backend, moe: bool, tensor_group: Any) -> ModuleSpec:
    """One decoder layer. A norm is its own module only where no linear layer can take it in."""
    latent = architecture.latent_attention is not None
    dense_mlp = partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=backend.norm_column, linear_fc2=backend.row))
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm if latent else IdentityOp,
            self_attention=_latent_attention(backend) if latent else _attention(architecture, backend, tensor_group),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.norm if moe else IdentityOp,
            mlp=_experts(architecture, backend) if moe else dense_mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    architecture: Architecture, config: TransformerConfig, backend: Backend, layers: range, tensor_group: Any
) -> TransformerBlockSubmodules:
    """The decoder layers `layers` of the model, and the final norm."""
    moe_spec = layer_spec(architecture, backend, True, tensor_group) if architecture.is_moe else None
    dense_spec = layer_spec(architecture, backend, False, tensor_group)
    chosen = [moe_spec if architecture.is_moe and architecture.moe_layers[layer] else dense_spec for layer in layers]
    return TransformerBlockSubmodules(layer_specs=chosen, layer_norm=backend.norm)
