"""What goes where and in which order, worked out from the map alone, alike on every rank.

HF tensors come in *units* that must arrive together: the projections that a server fuses into one matrix, a scale with its
values, an expert's three matrices. Units fill *buckets* up to a size in bytes, in the model's order: embedding, layers, head.
A *round* is a bucket for each rank that gets one: the same bucket for all that stream to servers, or a bucket of its own for
each rank where ranks write files side by side.

The next round is assembled while the present one travels, so a rank holds at most two rounds beyond its own weights: twice
the larger of the bucket size and the largest unit. No rank ever holds the model.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_rl.weights.map import WeightMap

_LAYER = re.compile(r"model\.layers\.(\d+)\.(\w+)\.")

Round = Mapping[int, tuple[str, ...]]  # rank -> the HF tensors that it gets


@dataclass(frozen=True)
class Unit:
    """HF tensors that must reach a server in one call."""

    names: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The rounds of one publish."""

    rounds: tuple[Round, ...]
    bytes: int  # of all tensors, each counted once
    largest: int  # bytes of the largest bucket


def tensor_bytes(weight_map: WeightMap, name: str, dtype: torch.dtype) -> int:
    entry = weight_map.hf[name]
    return math.prod(entry.shape) * (torch.float32 if entry.rule.float32 else dtype).itemsize


def units(weight_map: WeightMap, dtype: torch.dtype, names: Iterable[str] | None = None) -> list[Unit]:
    """All tensors, or those named, in the model's order.

    A unit is a block of a layer (its attention, its router with the shared experts) or one expert of it. SGLang fuses queries
    with keys and values, gate with up, and the two down-projections of latent attention when it has seen both parts of one
    call; none of them crosses a block.
    """
    wanted = None if names is None else set(names)
    blocks: dict[tuple[object, ...], list[str]] = {}
    for name, entry in weight_map.hf.items():
        if wanted is None or name in wanted:
            layer = _LAYER.match(name)
            blocks.setdefault((layer.groups() if layer else name, entry.expert), []).append(name)
    return [Unit(tuple(block), sum(tensor_bytes(weight_map, name, dtype) for name in block)) for block in blocks.values()]


def fill_buckets(units: Iterable[Unit], bucket_bytes: int) -> list[Unit]:
    """Units joined, in order, while they fit; a unit larger than a bucket is one by itself."""
    buckets: list[Unit] = []
    for unit in units:
        if buckets and buckets[-1].bytes + unit.bytes <= bucket_bytes:
            buckets[-1] = Unit(buckets[-1].names + unit.names, buckets[-1].bytes + unit.bytes)
        else:
            buckets.append(unit)
    return buckets


def plan_stream(units: Sequence[Unit], bucket_bytes: int, receivers: Iterable[int]) -> Plan:
    """Every receiver (a rank that sends to servers) gets every bucket, in the model's order."""
    buckets, ranks = fill_buckets(units, bucket_bytes), sorted(set(receivers))
    return Plan(
        rounds=tuple(dict.fromkeys(ranks, bucket.names) for bucket in buckets),
        bytes=sum(bucket.bytes for bucket in buckets),
        largest=max((bucket.bytes for bucket in buckets), default=0),
    )


def plan_files(units: Sequence[Unit], bucket_bytes: int, shares: Mapping[str, Mapping[int, int]], world_size: int) -> Plan:
    """Every unit goes to one rank, which writes it: one that has most of it at hand, and of those the least busy."""
    busy = [0] * world_size
    queues: list[list[Unit]] = [[] for _ in range(world_size)]
    for unit in units:
        at_hand: dict[int, int] = {}  # only of ranks that have any: a tensor is on few of a thousand
        for name in unit.names:
            for rank, numbers in shares[name].items():
                at_hand[rank] = at_hand.get(rank, 0) + numbers
        most = max(at_hand.values())
        rank = min((rank for rank, numbers in at_hand.items() if numbers == most), key=lambda rank: (busy[rank], rank))
        busy[rank] += unit.bytes
        queues[rank].append(unit)
    buckets = [fill_buckets(queue, bucket_bytes) for queue in queues]
    count = max((len(own) for own in buckets), default=0)
    return Plan(
        rounds=tuple({rank: own[k].names for rank, own in enumerate(buckets) if k < len(own)} for k in range(count)),
        bytes=sum(busy),
        largest=max((bucket.bytes for own in buckets for bucket in own), default=0),
    )


def senders(servers: int, world_size: int, most: int) -> list[int]:
    """For each server the rank that sends to it: at most so many different ones, spread evenly over all ranks."""
    count = max(1, min(servers, world_size, most))
    ranks = [i * world_size // count for i in range(count)]
    return [ranks[server % count] for server in range(servers)]


def families(weight_map: WeightMap) -> dict[str, tuple[str, ...]]:
    """HF tensors by kind, in the model's order: all layers' queries, all experts' gates.

    The two down-projections of latent attention are of one kind, being fused from one call.
    """
    kinds: dict[str, list[str]] = {}
    for name in weight_map.hf:
        kind = re.sub(r"\.\d+\.", ".*.", name)
        kind = re.sub(r"\.(q_a_proj|kv_a_proj_with_mqa)\.", ".{q_a_proj,kv_a_proj_with_mqa}.", kind)
        kinds.setdefault(kind, []).append(name)
    return {kind: tuple(names) for kind, names in kinds.items()}
