"""Building blocks of the CPU layer spec, under Transformer Engine's parameter names.

Transformer Engine fuses a norm into the linear layer after it (`layer_norm_weight` beside `weight`) and keeps the experts of
a layer in one grouped linear (`weight0` … `weightN-1`). The modules here are plain torch under the same names and sharding,
so that a checkpoint written on a GPU loads on a laptop and back.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_rl.policy.collectives import sum_over_ranks


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight says that its gradient is partial under sequence parallelism, as Megatron expects."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class FullWidthRMSNorm(torch.nn.Module):
    """RMSNorm over all heads of a projection together (OLMoE), with heads split over tensor ranks.

    The weight is whole on every rank although each rank uses only its heads' part: Megatron sums the gradients of
    parameters named q_layernorm and k_layernorm over tensor ranks, and the sum of the parts is then the whole gradient.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int, group: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(heads * hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., heads/tp, head_dim], normalised over heads and head_dim of all tensor ranks."""
        local = x.flatten(-2).float()  # [..., heads/tp * head_dim]
        square_sum = sum_over_ranks(local.square().sum(-1, keepdim=True), self.group)
        normed = local * torch.rsqrt(square_sum / self.weight.numel() + self.eps)
        start = self.group.rank() * local.size(-1)
        return (normed.to(x.dtype) * self.weight[start : start + local.size(-1)]).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Any] = (), metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        state = self.state_dict(prefix="", keep_vars=True)
        dp_cp = (metadata or {}).get("dp_cp_group")
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets, tp_group=self.group, dp_cp_group=dp_cp)


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm then a column-parallel linear layer, in one module under Transformer Engine's names."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = config.layernorm_epsilon

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = F.rms_norm(input_, (input_.size(-1),), self.layer_norm_weight, self.eps)
        return super().forward(normed, *args, **kwargs)


class DuplicatedLinear(torch.nn.Module):
    """A linear layer that is whole on every tensor rank: each applies it to its own part of the sequence."""

    def __init__(self, input_size: int, output_size: int, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.matmul: Callable[[Tensor, Tensor], Tensor] = F.linear
        if config.perform_initialization:
            config.init_method(self.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.matmul(x, self.weight), None


class LatentSelfAttention(MLASelfAttention):
    """Megatron's multi-latent attention with bottleneck projections as Transformer Engine has them: not split.

    Without Transformer Engine upstream splits them over tensor ranks and gathers their outputs; the gradient of the rotary
    part of the keys, which every rank's heads use, is then not summed over ranks.
    """

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = DuplicatedLinear(config.hidden_size, config.q_lora_rank, config)
        rotated = config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = DuplicatedLinear(config.hidden_size, config.kv_lora_rank + rotated, config)


class GroupedLinear(torch.nn.Module):
    """The linear layers of a rank's experts, one weight each, applied to tokens sorted by expert.

    Under expert tensor parallelism a rank holds a column (or row) slice of each weight; the token dispatcher gathers the
    inputs and sums the partial outputs, so nothing is communicated here.
    """

    sliced_axis: int  # 0: outputs are sliced over expert-tensor ranks, 1: inputs

    def __init__(
        self,
        num_local_experts: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        pg_collection: ProcessGroupCollection,
        bias: bool,
        **_: Any,
    ) -> None:
        super().__init__()
        if bias:
            raise ValueError("experts with biases are not supported")
        self.count = num_local_experts
        self.groups = pg_collection
        shape = [output_size, input_size]
        shape[self.sliced_axis] //= pg_collection.expt_tp.size()
        self.matmul: Callable[[Tensor, Tensor], Tensor] = F.linear
        for index in range(num_local_experts):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))  # [output(/etp), input(/etp)]
            if config.perform_initialization:
                init_method(weight)
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=self.sliced_axis, stride=1)
            self.register_parameter(f"weight{index}", weight)

    def forward(self, x: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        """x: [tokens of all local experts, input], sorted by expert."""
        parts = x.split(list(tokens_per_expert))
        return torch.cat([self.matmul(part, self.get_parameter(f"weight{i}")) for i, part in enumerate(parts)]), None

    def backward_dw(self) -> None:
        """Weight gradients are never delayed here."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Any] = (), metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """All experts of all ranks form one tensor with an experts axis in front, as Transformer Engine lays them out."""
        ep, etp, expert_data = self.groups.ep, self.groups.expt_tp, self.groups.expt_dp
        result: dict[str, Any] = {}
        for index in range(self.count):
            offsets = (*sharded_offsets, (len(sharded_offsets), ep.rank() * self.count + index, ep.size() * self.count))
            shard = make_sharded_tensors_for_checkpoint(
                {"weight": self.get_parameter(f"weight{index}")},
                "",
                {"weight": self.sliced_axis},
                offsets,
                tp_group=etp,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )["weight"]
            shard.key = f"{prefix}weight"
            shard.replica_id = (*shard.replica_id[:2], expert_data.rank())
            result[f"{prefix}weight{index}"] = shard
        return result


class ColumnGroupedLinear(GroupedLinear):
    """The first layer of each expert: outputs are sliced."""

    sliced_axis = 0


class RowGroupedLinear(GroupedLinear):
    """The second layer of each expert: inputs are sliced."""

    sliced_axis = 1


class Router(TopKRouter):
    """Megatron's router, counting only real tokens when it measures the experts' load.

    Upstream combines a [tokens] padding mask with a [tokens, experts] routing map without the missing axis, which fails
    (or, with as many experts as tokens, is silently wrong) as soon as a padding mask meets the expert bias.
    """

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        mask = None if padding_mask is None else padding_mask.unsqueeze(-1)  # [tokens, 1]
        super()._apply_expert_bias(routing_map, padding_mask=mask)


def without_extra_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A sharded state dict without Transformer Engine's `_extra_state` objects, which hold no trained number."""
    return {name: value for name, value in state.items() if not (isinstance(value, ShardedObject) and "_extra_state" in name)}
