"""What is sent of a tensor: its format, and FP8 values with their scales for a server that computes in FP8."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config.errors import SettingsError
from megatron_rl.weights.fp8 import BLOCK, quantize_rows, served_tensors
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.quantize import SCALE

Parcel = list[tuple[str, Tensor]]  # names and tensors of a bucket, as they are sent
Quantizer = Callable[[str, Tensor], Parcel | None]  # None: this tensor stays as it is


@dataclass(frozen=True)
class Wire:
    """Turns assembled tensors into what a server takes."""

    weight_map: WeightMap
    dtype: torch.dtype | None = None  # of unquantised tensors; None: as they are
    quantizer: Quantizer | None = None

    def parcel(self, tensors: Mapping[str, Tensor]) -> Parcel:
        """Wide numbers first, so that each tensor of a flattened bucket begins at a multiple of its own width."""
        found = [entry for name, tensor in tensors.items() for entry in self._sent(name, tensor)]
        return sorted(found, key=lambda entry: -entry[1].dtype.itemsize)

    def _sent(self, name: str, tensor: Tensor) -> Parcel:
        quantized = self.quantizer(name, tensor) if self.quantizer is not None else None
        if quantized is not None:
            return quantized
        keep = self.dtype is None or self.weight_map.hf[name].rule.float32
        return [(name, tensor if keep else tensor.to(self.dtype))]


def flat_bytes(parcel: Parcel) -> Tensor:
    """All tensors of a parcel behind one another: [bytes] uint8, as SGLang's FlattenedTensorBucket lays them out."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in parcel])


def fp8_quantizer(weight_map: WeightMap, quantization: Mapping[str, Any] | None) -> Quantizer | None:
    """What servers of a model with this `quantization_config` take in FP8: exactly what they expect so, with its scales."""
    if quantization is None:
        return None
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or block != [BLOCK, BLOCK] or quantization.get("activation_scheme", "dynamic") != "dynamic":
        raise SettingsError(
            f"the servers' quantization_config is of method {method!r} with weight_block_size {block!r}: weights can be "
            f"published to unquantised servers and to block-scaled FP8 ones ('fp8', [{BLOCK}, {BLOCK}], dynamic activations)."
        )
    served = served_tensors(weight_map, quantization)

    def quantizer(name: str, tensor: Tensor) -> Parcel | None:
        if name not in served:
            return None
        values, scales = quantize_rows(tensor)
        return [(name, values), (name + SCALE, scales)]

    return quantizer
