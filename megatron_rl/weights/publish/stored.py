"""The weights of a checkpoint, Hugging Face's or Megatron's, published by one process that builds no model."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_rl.weights.sources import Source

RANK = 0
CPU = torch.device("cpu")


class StoredWeights:
    """Tensors are read when their bucket comes: memory holds buckets alone. FP8 numbers come multiplied by their scales."""

    device = CPU

    def __init__(self, source: Source) -> None:
        self.weight_map = source.weight_map
        self._source = source
        wide = max(source.formats(), key=lambda dtype: dtype.itemsize)
        self.dtype = torch.bfloat16 if wide == torch.float8_e4m3fn else wide

    def shares(self) -> Mapping[str, Mapping[int, int]]:
        return {name: {RANK: entry.numbers} for name, entry in self.weight_map.hf.items()}

    def rounds(self, wanted: Sequence[Mapping[int, Sequence[str]]]) -> Iterator[dict[str, Tensor]]:
        for each in wanted:
            yield {name: self._read(name) for name in each.get(RANK, ())}

    def _read(self, name: str) -> Tensor:
        entry = self.weight_map.hf[name]
        values = self._source.hf(name, ((0,) * len(entry.shape), entry.shape))
        return values.to(torch.float32 if entry.rule.float32 else self.dtype)
