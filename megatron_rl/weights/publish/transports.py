"""Ways that a bucket takes to a server: broadcast, by value, or as handles of shared GPU memory.

A transport knows one bucket and one server; who has which bucket when is the plan's business, and what happens to a server
that fails is the protocol's. Weights that travel as files are in `files.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from megatron_rl.weights.publish.groups import UpdateGroup
from megatron_rl.weights.publish.protocol import UNFINISHED, Delivery
from megatron_rl.weights.publish.waiting import together
from megatron_rl.weights.publish.wire import Parcel, flat_bytes

EveryoneHas = Callable[[Any], list[Any]]


class Transport(Protocol):
    async def open(self, delivery: Delivery) -> None:
        """Get ready for a server, while it still generates."""
        ...

    def load(self, parcel: Parcel, everyone_has: EveryoneHas) -> Any:
        """What is sent of a bucket. All ranks call it for every bucket, with an empty parcel where they got none."""
        ...

    async def send(self, delivery: Delivery, load: Any) -> None: ...

    async def part(self, delivery: Delivery) -> None:
        """Take leave of a server that has everything and generates again."""
        ...

    def close(self) -> None:
        """Let go of all servers, in whatever state they are."""
        ...


class Broadcast:
    """Over a process group with each server: gloo tensor by tensor, NCCL in one flattened bucket.

    On gloo a flattened bucket is up to ten times slower; only FP8, which gloo does not know, is sent so there.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self._device = device
        self._seconds = seconds
        self._groups: dict[str, UpdateGroup] = {}

    async def open(self, delivery: Delivery) -> None:
        async def form() -> None:
            group = await UpdateGroup.form(delivery.server, delivery.tensor_parallel, self._device, self._seconds)
            self._groups[delivery.url] = group

        await delivery.attempt(form)

    def load(self, parcel: Parcel, everyone_has: EveryoneHas) -> Parcel:
        return [(name, tensor.contiguous()) for name, tensor in parcel]

    async def send(self, delivery: Delivery, load: Parcel) -> None:
        if not delivery.well:
            return
        group = self._groups[delivery.url]
        flat = self._device.type == "cuda" or any(tensor.dtype.itemsize == 1 for _, tensor in load)
        announced = (
            [name for name, _ in load],
            [str(tensor.dtype).removeprefix("torch.") for _, tensor in load],
            [list(tensor.shape) for _, tensor in load],
        )
        arrived = await delivery.change(
            lambda: together(
                delivery.server.update_from_distributed(*announced, group.name, UNFINISHED, bucket=flat),
                group.broadcast([flat_bytes(load)] if flat else [tensor for _, tensor in load]),
            )
        )
        if not arrived:
            group.close()  # a server that waits for the rest of the bucket hears of it

    async def part(self, delivery: Delivery) -> None:
        await delivery.prove(lambda: delivery.server.leave_group(self._groups[delivery.url].name))
        delivery.trust()

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
        self._groups.clear()


class ByValue:
    """In the body of an HTTP request: slow, and possible wherever the server can be spoken to."""

    async def open(self, delivery: Delivery) -> None:
        pass

    def load(self, parcel: Parcel, everyone_has: EveryoneHas) -> Parcel:
        return parcel

    async def send(self, delivery: Delivery, load: Parcel) -> None:
        await delivery.change(lambda: delivery.server.update_from_tensors(dict(load), UNFINISHED, delivery.tensor_parallel))

    async def part(self, delivery: Delivery) -> None:
        pass

    def close(self) -> None:
        pass


class Handles:
    """Handles of GPU memory (CUDA IPC) for a server whose ranks share GPUs with ours: nothing is copied but on the GPU.

    Read from SGLang's source and not run here, for want of GPUs. Each tensor-parallel rank of the server gets the handle of the
    rank of ours that shares its GPU. A bucket stays alive until its server has answered: the ranks meet again in `load`.
    """

    def __init__(self, colocated: Mapping[str, Sequence[int]]) -> None:
        self._colocated = colocated

    async def open(self, delivery: Delivery) -> None:
        pass

    def load(self, parcel: Parcel, everyone_has: EveryoneHas) -> tuple[Parcel, list[str | None]]:
        return parcel, everyone_has(gpu_handle(parcel) if parcel else None)

    async def send(self, delivery: Delivery, load: tuple[Parcel, list[str | None]]) -> None:
        handles = [handle for rank in self._colocated[delivery.url] if (handle := load[1][rank]) is not None]
        await delivery.change(lambda: delivery.server.update_from_handles(handles, UNFINISHED))

    async def part(self, delivery: Delivery) -> None:
        pass

    def close(self) -> None:
        pass


def gpu_handle(parcel: Parcel) -> str:
    """A flattened bucket in GPU memory, as SGLang takes it from another process of the machine."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    elsewhere = [name for name, tensor in parcel if not tensor.is_cuda]
    if elsewhere:
        raise ValueError(f"{elsewhere[0]} is not in GPU memory: a handle of it would end the server. Send it by value.")
    monkey_patch_torch_reductions()  # GPUs are named by their ids, as servers may number them otherwise
    bucket = FlattenedTensorBucket(named_tensors=[(name, tensor.contiguous()) for name, tensor in parcel])
    sent = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    return str(MultiprocessingSerializer.serialize(sent, output_str=True))
