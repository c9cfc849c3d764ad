"""Sequences into packs: which sequence goes to which data-parallel rank and micro-batch.

A plan is made on every rank from the lengths alone, without communication, so it depends on nothing else. It minimises, in
this order: the number of micro-batches (each has a fixed price: kernel launches, pipeline bubbles, collectives), the work of
the busiest rank (all others wait for it), and the heaviest micro-batch of each rank (a pipeline waits for that).
"""

import math
from bisect import bisect_left, insort
from collections import abc
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from itertools import batched

import numpy as np
from numpy.typing import NDArray

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.layout_map import Alignment
from megatron_rl.types import Pack, Sequence

type Plan = list[list[tuple[int, ...]]]  # [data-parallel rank][micro-batch] -> positions of sequences

# Trading stops once the heaviest group is this close to the mean: less than the noise of a step's time.
BALANCED = 1e-3
# Lightest groups that the heaviest one tries to trade with before it counts as stuck.
TRADE_PARTNERS = 4
# Trades per group, so that the work stays near-linear.
ROUNDS = 2


@dataclass(frozen=True)
class CostModel:
    """Work of a sequence: linear x length + quadratic x length^2. Only ratios matter, so the unit is free."""

    linear: float
    quadratic: float

    @classmethod
    def of(cls, architecture: Architecture) -> "CostModel":
        """FLOPs of one forward pass (the backward pass doubles both terms, so their ratio stands).

        Linear: 2 FLOPs a weight that a token meets, active experts only. Quadratic: a (query, key) pair takes a product of
        the query-key width and one of the value width in every head of every layer; causality halves the pairs.
        """
        weights = architecture.hidden * architecture.vocab + sum(
            _attention_weights(architecture) + _feed_forward_weights(architecture, is_moe)
            for is_moe in architecture.moe_layers or (False,) * architecture.layers
        )
        latent = architecture.latent_attention
        pair_width = latent.qk_head_dim + latent.qk_rope_head_dim + latent.v_head_dim if latent else 2 * architecture.head_dim
        return cls(linear=2.0 * weights, quadratic=float(architecture.layers * architecture.heads * pair_width))

    def cost(self, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Work of each sequence."""
        tokens = lengths.astype(np.float64)
        return self.linear * tokens + self.quadratic * tokens**2


def _attention_weights(architecture: Architecture) -> int:
    """Entries of one layer's attention projections."""
    hidden, heads, latent = architecture.hidden, architecture.heads, architecture.latent_attention
    if latent is None:
        return 2 * hidden * (heads + architecture.kv_heads) * architecture.head_dim
    query_width = heads * (latent.qk_head_dim + latent.qk_rope_head_dim)
    query = hidden * query_width if latent.q_lora_rank is None else latent.q_lora_rank * (hidden + query_width)
    key_value_down = hidden * (latent.kv_lora_rank + latent.qk_rope_head_dim)
    key_value_up = latent.kv_lora_rank * heads * (latent.qk_head_dim + latent.v_head_dim)
    return query + key_value_down + key_value_up + heads * latent.v_head_dim * hidden


def _feed_forward_weights(architecture: Architecture, is_moe: bool) -> int:
    """Entries that one token meets in one layer's gated feed-forward block, its router included."""
    experts = architecture.experts
    if experts is None or not is_moe:
        return 3 * architecture.hidden * architecture.ffn_hidden
    return architecture.hidden * (3 * (experts.top_k * experts.hidden + experts.shared_hidden) + experts.count)


def plan_packs(
    lengths: abc.Sequence[int],
    *,
    data_parallel: int,
    max_tokens: int,
    alignment: Alignment,
    cost: CostModel,
    multiple_of: int = 1,
) -> Plan:
    """Deal sequences, named by their position in `lengths`, to data-parallel ranks and micro-batches.

    Every rank gets the same number of micro-batches, a multiple of `multiple_of` (an interleaved pipeline needs that), some
    of them empty where sequences do not suffice; no sequence at all makes no micro-batch. Every pack, padded by `alignment`,
    holds at most `max_tokens`. Lengths alone decide: equal lengths in another order give the same packs of lengths.

    A rank's packs run heaviest first. The n-th packs of all ranks then weigh nearly the same, which is what ranks that meet
    in expert-parallel collectives wait for, and a batch that does not fit in memory fails in its first micro-batch.
    """
    padded, capacity = _padded_lengths(lengths, alignment, max_tokens)
    if len(padded) == 0:
        return [[] for _ in range(data_parallel)]
    costs = cost.cost(padded)
    longest_first = np.argsort(-np.asarray(lengths), kind="stable").tolist()

    tightest = _best_fit(longest_first, padded.tolist(), capacity)
    micro_batches = _round_up(math.ceil(len(tightest) / data_parallel), multiple_of)
    count = data_parallel * micro_batches
    packs = _lightest_first(longest_first, costs.tolist(), padded.tolist(), capacity, data_parallel, micro_batches)
    if packs is None:  # no slack to balance while packing: deal out the tightest packing
        packing = _Packing(tightest + [[] for _ in range(count - len(tightest))], costs, padded, capacity)
        ranks = _deal(packing.pack_costs(), data_parallel)
    else:
        packing = _Packing(packs, costs, padded, capacity)
        ranks = [list(rank) for rank in batched(range(count), micro_batches)]
    packing.even_out(ranks)
    for rank in ranks:
        packing.even_out([[pack] for pack in rank])

    heaviest_first = np.argsort(-packing.pack_costs(), kind="stable").tolist()
    place = {pack: place for place, pack in enumerate(heaviest_first)}
    return [[tuple(sorted(packing.packs[pack])) for pack in sorted(rank, key=place.__getitem__)] for rank in ranks]


def build_packs(sequences: abc.Sequence[Sequence], plan: Plan, alignment: Alignment) -> list[list[Pack]]:
    """The plan's packs, [data-parallel rank][micro-batch], with the lengths that their sequences are padded to."""
    return [[build_pack([sequences[position] for position in pack], alignment) for pack in rank] for rank in plan]


def build_pack(sequences: abc.Sequence[Sequence], alignment: Alignment) -> Pack:
    """One pack: each sequence padded to `alignment.sequence`, the last one further, so that the total fits `alignment.pack`."""
    padded = [_round_up(sequence.length, alignment.sequence) for sequence in sequences]
    total = max(_round_up(sum(padded), _pack_multiple(alignment)), _pack_multiple(alignment))
    if not padded:
        return Pack((), (total,))
    padded[-1] += total - sum(padded)
    return Pack(tuple(sequences), tuple(padded))


def level_packs(packs: list[list[Pack]]) -> list[list[Pack]]:
    """The n-th packs of all ranks brought to one length with padding at the end, for a dispatcher that gathers equal parts."""
    totals = [max(pack.tokens for pack in column) for column in zip(*packs, strict=True)]
    return [
        [
            pack if pack.tokens == total else Pack(pack.sequences, (*pack.padded_lengths, total - pack.tokens))
            for pack, total in zip(rank, totals, strict=True)
        ]
        for rank in packs
    ]


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def _pack_multiple(alignment: Alignment) -> int:
    """What a pack's total must be a multiple of: `alignment.pack`, and since padding belongs to the last sequence, its own."""
    return math.lcm(alignment.sequence, alignment.pack)


def _padded_lengths(lengths: abc.Sequence[int], alignment: Alignment, max_tokens: int) -> tuple[NDArray[np.int64], int]:
    """Each sequence's padded length, and the sum of those that a pack can hold; errors for what cannot fit."""
    multiple = _pack_multiple(alignment)
    capacity = max_tokens // multiple * multiple
    true = np.asarray(lengths, dtype=np.int64)
    if len(true) and true.min() < 1:
        raise ValueError(f"sequence {true.argmin()} has length {true.min()}; every sequence needs at least one token")
    padded = -(-true // alignment.sequence) * alignment.sequence
    too_long = np.flatnonzero(padded > capacity)
    if len(too_long):
        first = int(too_long[0])
        raise SettingsError(
            f"sequence {first} has {true[first]} tokens ({padded[first]} padded to a multiple of {alignment.sequence}), "
            f"but a pack holds {capacity}: batch.max_tokens={max_tokens} rounded down to a multiple of {multiple}. "
            f"Raise batch.max_tokens or shorten the sequence ({len(too_long)} of {len(true)} are too long)."
        )
    return padded, capacity


def _best_fit(longest_first: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    """As few packs as best-fit decreasing finds, at most 11/9 of the optimum + 1 (Johnson et al., 1974)."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, pack), ascending
    for item in longest_first:
        found = bisect_left(rooms, (sizes[item], -1))
        if found < len(rooms):
            room, pack = rooms.pop(found)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(item)
        insort(rooms, (room - sizes[item], pack))
    return packs


class _Bins:
    """Equal bins, and the lightest one with room for sizes that never grow.

    The lightest bin by cost need not be the emptiest. One that is too full for the size at hand is parked until sizes have
    become small enough for it, so that asking stays O(log bins), amortised.
    """

    def __init__(self, rooms: list[int]) -> None:
        self.rooms = rooms
        self.costs = [0.0] * len(rooms)
        self.open = [(0.0, slot) for slot in range(len(rooms))]  # heap of (cost, bin)
        self.parked: list[tuple[int, int]] = []  # heap of (-room, bin)

    def lightest(self, size: int) -> int | None:
        while self.parked and -self.parked[0][0] >= size:
            slot = heappop(self.parked)[1]
            heappush(self.open, (self.costs[slot], slot))
        while self.open and self.rooms[self.open[0][1]] < size:
            self.park(self.rooms[self.open[0][1]])
        return self.open[0][1] if self.open else None

    def park(self, room: int) -> None:
        """Set the lightest bin aside, which has only this much room."""
        heappush(self.parked, (-room, heappop(self.open)[1]))

    def put(self, size: int, cost: float) -> None:
        """Into the lightest bin."""
        slot = self.open[0][1]
        self.rooms[slot] -= size
        self.costs[slot] += cost
        heapreplace(self.open, (self.costs[slot], slot))


def _lightest_first(
    longest_first: list[int], costs: list[float], sizes: list[int], capacity: int, ranks: int, micro_batches: int
) -> list[list[int]] | None:
    """Each sequence, longest first, to the lightest rank with room, there into the lightest pack with room (Graham's LPT).

    Ranks weigh more than packs: a sequence of many times the mean cost makes its pack heavy for good, and its rank gets
    lighter packs in return. None when a sequence finds no room, which a tighter packing would have given it.
    """
    packs: list[list[int]] = [[] for _ in range(ranks * micro_batches)]
    bins_of_rank = [_Bins([capacity] * micro_batches) for _ in range(ranks)]
    # A rank's room is that of its emptiest pack. It is looked up where a rank turns out to be full, so none is kept here.
    rank_bins = _Bins([capacity] * ranks)
    for item in longest_first:
        size = sizes[item]
        while (rank := rank_bins.lightest(size)) is not None:
            pack = bins_of_rank[rank].lightest(size)
            if pack is not None:
                break
            rank_bins.park(-bins_of_rank[rank].parked[0][0])
        else:
            return None
        packs[rank * micro_batches + pack].append(item)
        bins_of_rank[rank].put(size, costs[item])
        rank_bins.put(0, costs[item])
    return packs


def _deal(costs: NDArray[np.float64], ranks: int) -> list[list[int]]:
    """Equally many packs to each rank: in rounds of one each, the round's heaviest to the rank that is lightest so far.

    The heaviest rank then exceeds the lightest by at most the difference between the heaviest and the lightest pack.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    totals = np.zeros(ranks)
    for hand in batched(np.argsort(-costs, kind="stable").tolist(), ranks):
        for pack, rank in zip(hand, np.argsort(totals, kind="stable").tolist(), strict=True):
            dealt[rank].append(pack)
            totals[rank] += costs[pack]
    return dealt


class _Packing:
    """Packs that sequences can be traded between."""

    def __init__(self, packs: list[list[int]], costs: NDArray[np.float64], sizes: NDArray[np.int64], capacity: int) -> None:
        self.packs = packs
        self.costs = costs
        self.sizes = sizes
        self.rooms = np.array([capacity - sizes[pack].sum() for pack in packs])

    def pack_costs(self) -> NDArray[np.float64]:
        return np.array([self.costs[pack].sum() for pack in self.packs])

    def even_out(self, groups: list[list[int]]) -> None:
        """Lower the cost of the heaviest group of packs by trades with the lightest groups, until near the mean or stuck."""
        totals = np.array([sum(self.costs[self.packs[pack]].sum() for pack in group) for group in groups])
        enough = totals.mean() * (1 + BALANCED)
        for _ in range(ROUNDS * len(groups)):
            heavy = int(totals.argmax())
            if totals[heavy] <= enough:
                return
            for light in np.argsort(totals, kind="stable")[:TRADE_PARTNERS].tolist():
                moved = self._trade(groups[heavy], groups[light], totals[heavy] - totals[light])
                if moved:
                    totals[heavy] -= moved
                    totals[light] += moved
                    break
            else:
                return

    def _trade(self, heavy: list[int], light: list[int], gap: float) -> float:
        """Move a sequence from `heavy` to `light`, or swap two, so that they end closest together; the cost that moved."""
        given, given_packs = self._offers(heavy)
        taken, taken_packs = self._offers(light)
        emptiest = max(light, key=lambda pack: self.rooms[pack])
        taken_packs = np.append(taken_packs, emptiest)  # the last offer is to take nothing back
        moved = self.costs[given][:, None] - np.append(self.costs[taken], 0.0)  # [given, taken + 1]
        grown = self.sizes[given][:, None] - np.append(self.sizes[taken], 0)  # [given, taken + 1]
        # What costs more is also longer, so only `light` can run out of room.
        helps = (moved > 0) & (moved < gap) & (grown <= self.rooms[taken_packs])
        if not helps.any():
            return 0.0
        row, column = np.unravel_index(np.where(helps, np.abs(moved - gap / 2), np.inf).argmin(), helps.shape)
        source, target = int(given_packs[row]), int(taken_packs[column])
        self._move(int(given[row]), source, target)
        if column < len(taken):
            self._move(int(taken[column]), target, source)
        return float(moved[row, column])

    def _offers(self, group: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """One sequence of each cost (thousands of short ones offer few different trades), and the packs that they lie in."""
        roomiest_first = sorted(group, key=lambda pack: -self.rooms[pack])
        items = np.array([item for pack in roomiest_first for item in self.packs[pack]], dtype=np.int64)
        packs = np.repeat(roomiest_first, [len(self.packs[pack]) for pack in roomiest_first])
        first_of_each_cost = np.unique(self.costs[items], return_index=True)[1]
        return items[first_of_each_cost], packs[first_of_each_cost]

    def _move(self, item: int, source: int, target: int) -> None:
        self.packs[source].remove(item)
        self.packs[target].append(item)
        self.rooms[source] += self.sizes[item]
        self.rooms[target] -= self.sizes[item]
