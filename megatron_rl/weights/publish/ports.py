"""What publishing asks of its surroundings: a server to speak to, the other ranks, the weights.

Publishing stands below the rooms that have these (`rollout.client.Client` is a `Server`, `policy.layout.Layout` is `Ranks`),
so it says here what it needs and takes whatever can do it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_rl.weights.map import WeightMap

PauseMode = Literal["abort", "retract", "in_place"]
Backend = Literal["gloo", "nccl"]


class Facts(Protocol):
    """What a server says of itself."""

    @property
    def version(self) -> int | None: ...

    @property
    def tensor_parallel(self) -> int: ...


class Server(Protocol):
    """A server under control. Calls raise when the server did not do what it was asked; none of them can kill it."""

    @property
    def url(self) -> str: ...

    async def server_info(self) -> Facts: ...

    async def pause(self, mode: PauseMode) -> None: ...

    async def resume(self) -> None: ...

    async def abort_all(self) -> None: ...

    async def flush_cache(self) -> None: ...

    async def update_from_disk(self, path: str, version: int) -> None: ...

    async def update_from_tensors(self, tensors: Mapping[str, Tensor], version: int, tensor_parallel: int = 1) -> None: ...

    async def update_from_handles(self, handles: Sequence[str], version: int) -> None: ...

    async def update_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group: str,
        version: int,
        bucket: bool = False,
    ) -> None: ...

    async def join_group(self, group: str, address: str, port: int, rank: int, world_size: int, backend: Backend) -> None: ...

    async def leave_group(self, group: str) -> None: ...

    async def set_version(self, version: int) -> None: ...

    async def score(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]: ...

    async def checksums(self) -> Sequence[Mapping[str, str]] | None: ...


Connect = Callable[[str], AbstractAsyncContextManager[Server]]  # by URL; a client's own constructor will do


@dataclass(frozen=True)
class Held:
    """Servers that somebody else has paused, and lets go on afterwards; those that failed are named to him with a reason."""

    urls: tuple[str, ...]
    drop: Callable[[str, str], None]


Halt = Callable[[], AbstractAsyncContextManager[Held]]


class Ranks(Protocol):
    """The processes that publish together. All call alike, in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def everyone_has(self, value: Any) -> list[Any]: ...

    def from_main(self, value: Any) -> Any: ...


class Weights(Protocol):
    """Where the tensors come from."""

    @property
    def weight_map(self) -> WeightMap: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def shares(self) -> Mapping[str, Mapping[int, int]]:
        """For each HF tensor, how many numbers of it each rank has at hand."""
        ...

    def rounds(self, wanted: Sequence[Mapping[int, Sequence[str]]]) -> Iterator[dict[str, Tensor]]:
        """For each round the whole tensors that this rank wanted. Every rank takes every round."""
        ...


@dataclass(frozen=True)
class Target:
    """A server to publish to. `colocated`: the ranks whose GPUs its tensor-parallel ranks share, in their order."""

    url: str
    colocated: tuple[int, ...] = ()
    anew: bool = False  # it needs everything, whatever version it says it has


class Alone:
    """The ranks of a program that has only one."""

    rank = 0
    world_size = 1

    def everyone_has(self, value: Any) -> list[Any]:
        return [value]

    def from_main(self, value: Any) -> Any:
        return value
