"""Carrying a plan out: buckets are assembled on ranks and sent on while the next ones come."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rl.weights.publish.errors import PublishError
from megatron_rl.weights.publish.files import write_bucket
from megatron_rl.weights.publish.plan import Plan
from megatron_rl.weights.publish.ports import Ranks, Weights
from megatron_rl.weights.publish.protocol import UNFINISHED, Delivery
from megatron_rl.weights.publish.transports import Transport
from megatron_rl.weights.publish.waiting import in_thread
from megatron_rl.weights.publish.wire import Wire

Tell = Callable[[int, int], None]  # rounds done, rounds in all


@dataclass(frozen=True)
class Crew:
    """What every carrying out needs: the weights, what is sent of them, the other ranks, who wants to know how far we are."""

    weights: Weights
    wire: Wire
    ranks: Ranks
    tell: Tell

    async def alone(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A blocking call among ranks. One at a time and in the same order on all of them."""
        return await in_thread(self.weights.device, function, *arguments)

    def assembled(self, plan: Plan) -> Iterator[dict[str, Tensor]]:
        return self.weights.rounds(plan.rounds)


async def send_stream(crew: Crew, plan: Plan, transport: Transport, deliveries: Sequence[Delivery], version: int) -> None:
    """Every bucket to every server. Servers pause when the first bucket is ready, and each waits for its own sender alone."""
    try:
        await asyncio.gather(*(transport.open(delivery) for delivery in deliveries))
        rounds, count = crew.assembled(plan), len(plan.rounds)
        tensors = await crew.alone(next, rounds)
        await asyncio.gather(*(delivery.pause() for delivery in deliveries))
        for number in range(count):
            load = await crew.alone(transport.load, crew.wire.parcel(tensors), crew.ranks.everyone_has)
            coming = asyncio.ensure_future(crew.alone(next, rounds, {}))
            try:
                await asyncio.gather(*(transport.send(delivery, load) for delivery in deliveries))
            finally:
                tensors = await coming  # never given up: the other ranks count on it
            crew.tell(number + 1, count)
        await asyncio.gather(*(delivery.complete(version) for delivery in deliveries))
        await asyncio.gather(*(transport.part(delivery) for delivery in deliveries))
    finally:
        transport.close()


async def send_files(crew: Crew, plan: Plan, folder: Path, deliveries: Sequence[Delivery], version: int) -> None:
    """Every rank writes its buckets while servers generate; then they pause and load the folder."""
    rank, rounds, count = crew.ranks.rank, crew.assembled(plan), len(plan.rounds)
    failure = None
    tensors = await crew.alone(next, rounds)
    for number in range(count):
        coming = asyncio.ensure_future(crew.alone(next, rounds, {}))
        try:
            if tensors and failure is None:
                parcel = crew.wire.parcel(tensors)
                await in_thread(crew.weights.device, write_bucket, folder, rank, number, parcel)
        except OSError as error:  # told when all ranks are there to hear it
            failure = f"rank {rank} could not write to {folder}: {error}"
        finally:
            tensors = await coming
        crew.tell(number + 1, count)
    failures = [found for found in await crew.alone(crew.ranks.everyone_has, failure) if found]
    if failures:
        raise PublishError(f"{failures[0]}. No server was touched. publish.folder names another folder.")
    await asyncio.gather(*(delivery.pause() for delivery in deliveries))
    loads = (delivery.change(partial(delivery.server.update_from_disk, str(folder), UNFINISHED)) for delivery in deliveries)
    await asyncio.gather(*loads)
    await asyncio.gather(*(delivery.complete(version) for delivery in deliveries))
