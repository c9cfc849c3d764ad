"""A pack as tensors: this rank's tokens, what each predicts, and the numbers that go with it.

Position p predicts token p+1 of its sequence, so everything per token is moved one to the left here, once, on whole
sequences and before context parallelism cuts them; from here on all [tokens] vectors are aligned with predictions.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from megatron_rl.policy.attention import zigzag_positions
from megatron_rl.policy.layout import Layout
from megatron_rl.types import Pack

NO_LABEL = -1


@dataclass(frozen=True)
class PackTensors:
    """What a rank needs of one pack. `local` counts this context rank's positions, padding included."""

    tokens: Tensor  # [1, local]
    positions: Tensor  # [1, local] restarting at 0 for each sequence
    labels: Tensor  # [local] the next token, or NO_LABEL
    mask: Tensor  # [local] bool: predictions that count
    real: Tensor  # [1, local] bool: False on padding
    segments: Tensor  # [local]
    segment_sizes: Tensor  # [sequences (+1)] local positions of each sequence; the last is an empty pack's padding
    lengths: Tensor  # [sequences] float32, L_i of the whole sequence
    columns: Mapping[str, Tensor]  # [local] each
    scalars: Mapping[str, Tensor]  # [sequences] each
    packed: PackedSeqParams

    def sum_sequences(self, values: Tensor, sum_over_context: Callable[[Tensor], Tensor]) -> Tensor:
        """Masked sum over each sequence: [local] -> [sequences]. Values outside the mask are never looked at."""
        masked = torch.where(self.mask, values, 0.0)
        sums = torch.segment_reduce(masked, "sum", lengths=self.segment_sizes, initial=0.0, unsafe=True)
        return sum_over_context(sums[: self.lengths.size(0)])


def _flatten(pack: Pack, values: list[NDArray[Any]], empty: float | int, dtype: type) -> NDArray[Any]:
    """Per-sequence arrays laid out as the pack is, `empty` on padding."""
    flat: NDArray[Any] = np.full(pack.tokens, empty, dtype=dtype)
    start = 0
    for array, padded in zip(values, pack.padded_lengths, strict=False):
        flat[start : start + len(array)] = array
        start += padded
    return flat


def local_indices(pack: Pack, layout: Layout) -> NDArray[np.int64]:
    """Which positions of the pack this context rank holds, sequence by sequence, zig-zag."""
    context, rank = layout.settings.context, layout.context_rank
    pieces, start = [], 0
    for padded in pack.padded_lengths:
        pieces.append(start + zigzag_positions(padded, rank, context).numpy())
        start += padded
    return np.concatenate(pieces)


def pack_tensors(pack: Pack, layout: Layout, columns: Iterable[str] = (), scalars: Iterable[str] = ()) -> PackTensors:
    """Lay a pack out for this rank, with the named columns and scalars of its sequences (an empty pack has them too)."""
    device = layout.device.torch_device
    index = local_indices(pack, layout)
    sequences = pack.sequences

    def local(values: list[NDArray[Any]], empty: float | int, dtype: type) -> Tensor:
        return torch.from_numpy(_flatten(pack, values, empty, dtype)[index]).to(device)

    boundaries = torch.tensor(np.concatenate([[0], np.cumsum(pack.padded_lengths)]), dtype=torch.int32, device=device)
    longest = max(pack.padded_lengths)
    context = layout.settings.context
    return PackTensors(
        tokens=local([s.tokens for s in sequences], 0, np.int64)[None],
        positions=local([np.arange(padded) for padded in pack.padded_lengths], 0, np.int64)[None],
        labels=local([s.tokens[1:] for s in sequences], NO_LABEL, np.int64),
        mask=local([s.loss_mask[1:] for s in sequences], False, np.bool_),
        real=local([np.ones(s.length, np.bool_) for s in sequences], False, np.bool_)[None],
        segments=local([np.full(padded, i) for i, padded in enumerate(pack.padded_lengths)], 0, np.int64),
        segment_sizes=torch.tensor([padded // context for padded in pack.padded_lengths], device=device),
        lengths=torch.tensor([s.loss_tokens for s in sequences], dtype=torch.float32, device=device),
        columns={name: local([s.columns[name][1:] for s in sequences], 0.0, np.float32) for name in columns},
        scalars={
            name: torch.tensor([s.scalars[name] for s in sequences], dtype=torch.float32, device=device) for name in scalars
        },
        packed=PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=longest, max_seqlen_kv=longest
        ),
    )
