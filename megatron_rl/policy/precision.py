"""FP8 without FP8 hardware: matrix products whose operands are rounded as Transformer Engine would round them.

The value of each linear layer (attention projections, dense and expert feed-forward) is computed from operands that went
through e4m3 and back; gradients are those of the rounded product, passed straight through the rounding. Router, embedding,
output layer and norms are left alone, as Transformer Engine leaves them. Real FP8 is `transformer_config`'s affair.
"""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_rl.config.settings import PrecisionSettings
from megatron_rl.policy.device import Device
from megatron_rl.policy.modules import DuplicatedLinear, GroupedLinear
from megatron_rl.weights.quantize import ACTIVATION_BLOCKS, WEIGHT_BLOCKS, Blocks, Recipe, round_to_fp8


class _Round(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Blocks) -> Tensor:
        return round_to_fp8(x, blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _rounded_linear(recipe: Recipe, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(_Round.apply(x, ACTIVATION_BLOCKS[recipe]), _Round.apply(weight, WEIGHT_BLOCKS[recipe]))


def _rounded_forward(original: Any, recipe: Recipe, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Megatron's own product, communication included, of rounded operands."""
    rounded = _Round.apply(input, ACTIVATION_BLOCKS[recipe]), _Round.apply(weight, WEIGHT_BLOCKS[recipe])
    return cast(Tensor, original(*rounded, *args, **kwargs))


def quantized_modules(
    chunk: GPTModel, settings: PrecisionSettings, first_layer: int, layers: int
) -> dict[str, torch.nn.Module]:
    """The modules of a chunk whose products are FP8, by name. `first_layer` is the chunk's first global layer."""
    chosen = {}
    for local, layer in enumerate(chunk.decoder.layers):
        index = first_layer + local
        if settings.fp8_skip_first_layers <= index < layers - settings.fp8_skip_last_layers:
            for name, module in layer.named_modules():
                if isinstance(module, ColumnParallelLinear | RowParallelLinear | DuplicatedLinear | GroupedLinear):
                    chosen[f"decoder.layers.{local}.{name}"] = module
    return chosen


def takes_transformer_engine(settings: PrecisionSettings, device: Device) -> bool:
    """Whether layers are Transformer Engine's. Its layers round nothing from outside, so simulated FP8 takes torch's own."""
    return device.transformer_engine and settings.fp8 != "simulated"


def simulate_fp8(chunk: GPTModel, settings: PrecisionSettings, first_layer: int, layers: int) -> None:
    """Round the operands of a chunk's linear layers when the settings ask for simulated FP8."""
    if settings.fp8 != "simulated":
        return
    recipe = cast(Recipe, settings.fp8_recipe)
    for module in quantized_modules(chunk, settings, first_layer, layers).values():
        if isinstance(module, DuplicatedLinear | GroupedLinear):
            module.matmul = partial(_rounded_linear, recipe)
        else:
            module._forward_impl = partial(_rounded_forward, module._forward_impl, recipe)  # type: ignore[assignment]
