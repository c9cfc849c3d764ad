"""Causal attention over packed sequences in plain torch, with context parallelism.

The CPU counterpart of Transformer Engine's fused attention: each sequence of a pack attends to itself alone. Under context
parallelism a sequence is cut into 2·cp pieces and rank r holds pieces r and 2·cp−1−r (zig-zag), so that every rank has the
same amount of causal work; keys and values are gathered from the group, queries stay.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rl.policy.collectives import GatherRanks


def gather_zigzag(x: Tensor, boundaries: list[int], group: Any) -> list[Tensor]:
    """The whole of each sequence, in order, from every rank's two pieces of it. x: [tokens/cp, ...]."""
    ranks = group.size()
    gathered = GatherRanks.apply(x, group)  # [cp, tokens/cp, ...]
    wholes = []
    for start, end in pairwise(boundaries):
        pieces = gathered[:, start // ranks : end // ranks].unflatten(1, (2, -1))  # [cp, 2, length/2cp, ...]
        wholes.append(torch.cat([pieces[:, 0].flatten(0, 1), pieces[:, 1].flip(0).flatten(0, 1)]))
    return wholes


def zigzag_positions(length: int, rank: int, ranks: int, device: torch.device | None = None) -> Tensor:
    """Which positions of a sequence of `length` a context rank holds, in the order it holds them."""
    if ranks == 1:
        return torch.arange(length, device=device)
    piece = length // (2 * ranks)
    first = torch.arange(rank * piece, (rank + 1) * piece, device=device)
    last = torch.arange((2 * ranks - 1 - rank) * piece, (2 * ranks - rank) * piece, device=device)
    return torch.cat([first, last])


class PackedAttention(torch.nn.Module):
    """Softmax attention of each packed sequence over itself, causal, by torch's scaled_dot_product_attention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert pg_collection is not None
        self.scale = softmax_scale
        self.group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """query: [tokens/cp, heads/tp, dim], key and value: [tokens/cp, kv_heads/tp, dim] -> [tokens/cp, heads/tp * dim]."""
        assert packed_seq_params is not None, "this policy feeds packed sequences only"
        boundaries = packed_seq_params.cu_seqlens_q.tolist()
        ranks = self.group.size()
        if ranks > 1:
            keys, values = gather_zigzag(key, boundaries, self.group), gather_zigzag(value, boundaries, self.group)
        outputs = []
        for index, (start, end) in enumerate(pairwise(boundaries)):
            here = slice(start // ranks, end // ranks)
            if ranks > 1:
                outputs.append(self._attend(query[here], keys[index], values[index], end - start))
            else:
                outputs.append(self._attend(query[here], key[here], value[here], end - start))
        return torch.cat(outputs).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        ranks = self.group.size()
        mask = None
        if ranks > 1:
            positions = zigzag_positions(length, self.group.rank(), ranks, query.device)
            mask = positions[:, None] >= torch.arange(length, device=query.device)  # [length/cp, length]
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # [1, heads, length, dim]
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=q.size(1) != k.size(1)
        )
        return output[0].transpose(0, 1)
