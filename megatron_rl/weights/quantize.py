"""FP8 (e4m3) rounding: the one quantiser of the project, in plain torch.

A block of numbers shares one scale s = amax / 448 and is stored as e4m3(x / s). Blocks are: the whole tensor (tensorwise);
1×128 for activations and 128×128 for weights (blockwise, the DeepSeek-V3 form); 1×32 with a power-of-two scale (MXFP8).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0  # largest finite float8_e4m3fn
SCALE = "_scale_inv"  # behind a weight's name: the name of its scales, in checkpoints of the DeepSeek-V3 form
Recipe = Literal["tensorwise", "blockwise", "mxfp8"]


@dataclass(frozen=True)
class Blocks:
    """The shape of the blocks that share a scale; None: the whole tensor does."""

    rows: int | None
    columns: int | None
    power_of_two: bool = False


ACTIVATION_BLOCKS: dict[Recipe, Blocks] = {
    "tensorwise": Blocks(None, None),
    "blockwise": Blocks(1, 128),
    "mxfp8": Blocks(1, 32, power_of_two=True),
}
WEIGHT_BLOCKS: dict[Recipe, Blocks] = {
    "tensorwise": Blocks(None, None),
    "blockwise": Blocks(128, 128),
    "mxfp8": Blocks(1, 32, power_of_two=True),
}


def quantize(x: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """x: [rows, columns] -> e4m3 values of the same shape and float32 scales, one a block: x ≈ values · scale.

    Edge blocks may be smaller. A block of zeros has scale 1.
    """
    if x.dim() != 2:
        raise ValueError(f"quantize takes a matrix, not a tensor of shape {tuple(x.shape)}")
    rows, columns = x.shape
    block_rows, block_columns = blocks.rows or max(rows, 1), blocks.columns or max(columns, 1)
    x = x.float()
    padded = F.pad(x, (0, -columns % block_columns, 0, -rows % block_rows))
    tiles = padded.unflatten(0, (-1, block_rows)).unflatten(2, (-1, block_columns))  # [R, block_rows, C, block_columns]
    scales = tiles.abs().amax((1, 3)) / E4M3_MAX  # [R, C]
    if blocks.power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    scales = torch.where(scales > 0, scales, 1.0)
    values = (tiles / scales[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    values = values.flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return values.to(torch.float8_e4m3fn), scales


def dequantize(values: Tensor, scales: Tensor, blocks: Blocks) -> Tensor:
    """The float32 matrix that `quantize` stored."""
    rows, columns = values.shape
    block_rows, block_columns = blocks.rows or max(rows, 1), blocks.columns or max(columns, 1)
    spread = scales.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(block_columns, 1)[:, :columns]
    return values.float() * spread


def round_to_fp8(x: Tensor, blocks: Blocks) -> Tensor:
    """x as it is after a trip through FP8, in its own dtype and shape (leading axes are rows)."""
    if x.numel() == 0:
        return x
    matrix = x.reshape(-1, x.size(-1))
    return dequantize(*quantize(matrix, blocks), blocks).to(x.dtype).view_as(x)
