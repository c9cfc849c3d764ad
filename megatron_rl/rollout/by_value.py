"""Tensors in the body of a request, as a pickle that SGLang's restricted unpickler opens.

torch's own pickle of a tensor will not do: it names the function that reads its storage, and Megatron-core replaces that one by
a function of its own in every process that imports it. A server that meets a name that it does not know ends.
"""

import base64
import functools
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def by_value(tensors: Mapping[str, Tensor]) -> str:
    """base64 of a pickled list of names and tensors, in which nothing but torch is named."""
    pairs = [(name, _Tensor(tensor.detach().cpu().contiguous())) for name, tensor in tensors.items()]
    return base64.b64encode(pickle.dumps(pairs, protocol=5)).decode("ascii")


class _Tensor:
    """Becomes a tensor where it is unpickled."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.Tensor.reshape, (_Numbers(self._tensor), tuple(self._tensor.shape))


class _Numbers:
    """The same, flat."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        numbers = bytearray(self._tensor.view(-1).view(torch.uint8).numpy())
        return functools.partial(torch.frombuffer, dtype=self._tensor.dtype), (numbers,)
