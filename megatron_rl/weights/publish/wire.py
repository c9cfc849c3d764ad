"""What is sent of a tensor: its format, and FP8 values with their scales for a server that computes in FP8."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.weights.map import WeightMap

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
