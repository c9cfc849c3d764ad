"""Carrying a plan out: buckets are assembled on ranks and sent on while the next ones come."""

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_rl.weights.publish.crew import Crew
from megatron_rl.weights.publish.errors import PublishError
from megatron_rl.weights.publish.files import write_bucket
from megatron_rl.weights.publish.gate import Gate
from megatron_rl.weights.publish.plan import Plan
from megatron_rl.weights.publish.protocol import UNFINISHED, Delivery
from megatron_rl.weights.publish.transports import Transport
from megatron_rl.weights.publish.waiting import in_thread


async def send_stream(crew: Crew, plan: Plan, transport: Transport, deliveries: Sequence[Delivery], gate: Gate) -> None:
    """Every bucket to every server. Servers pause when the first bucket is ready, and each waits for its own sender alone."""
    try:
        await asyncio.gather(*(transport.open(delivery) for delivery in deliveries))
        rounds, count = crew.assembled(plan), len(plan.rounds)
        tensors = await crew.alone(next, rounds)
        await gate.shut(deliveries)
        for number in range(count):
            load = await crew.alone(transport.load, crew.wire.parcel(tensors), crew.ranks.everyone_has)
            coming = asyncio.ensure_future(crew.alone(next, rounds, {}))
            try:
                await asyncio.gather(*(transport.send(delivery, load) for delivery in deliveries))
            finally:
                tensors = await coming  # never given up: the other ranks count on it
            crew.tell(number + 1, count)
        await gate.open(deliveries)
        await asyncio.gather(*(transport.part(delivery) for delivery in deliveries))
    finally:
        transport.close()


async def send_files(crew: Crew, plan: Plan, folder: Path, deliveries: Sequence[Delivery], gate: Gate) -> None:
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
    await gate.shut(deliveries)
    loads = (delivery.change(partial(delivery.server.update_from_disk, str(folder), UNFINISHED)) for delivery in deliveries)
    await asyncio.gather(*loads)
    await gate.open(deliveries)
