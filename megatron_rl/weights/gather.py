"""Hugging Face tensors from weights that live on many ranks, a bucket at a time: never a whole model on one rank.

`plan_gather` says, from the settings alone, which rank sends which box of a Megatron tensor to which rank, and which box of
an HF tensor it is there. `gather` carries a plan out over torch.distributed, point to point, and hands over the assembled
tensors round by round; the next round's boxes travel while the present one's tensors are used. Experts are nothing special:
each is sent by a rank that has it, when its bucket comes.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config.layout_map import Coordinates, rank_coordinates
from megatron_rl.config.settings import LayoutSettings
from megatron_rl.weights.boxes import Box, Slice, overlap, within
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.rules import Rule

_ALIGNMENT = 16  # bytes; where each box of a message begins, so that it can be seen as numbers of any format

Wanted = Mapping[int, Sequence[str]]  # rank -> the HF tensors that it shall get


@dataclass(frozen=True)
class Move:
    """A box of a Megatron tensor goes from a rank that holds it to a rank that assembles the HF tensor (perhaps itself)."""

    source: int
    target: int
    megatron: str
    held: Box  # all that the source holds of the Megatron tensor in one piece
    box: Box  # what of it goes
    hf: str
    hf_box: Box


@dataclass(frozen=True)
class Round:
    """What travels at once: a bucket for each rank that gets one."""

    wanted: Wanted
    moves: tuple[Move, ...]


# -- planning ----------------------------------------------------------------------------------------------------------


def buckets(weight_map: WeightMap, names: Iterable[str], numbers: int) -> list[tuple[str, ...]]:
    """Cut a list of HF tensors, in order, into buckets of at most so many numbers; a larger tensor is one by itself."""
    found: list[tuple[str, ...]] = []
    present: list[str] = []
    filled = 0
    for name in names:
        size = weight_map.hf[name].numbers
        if present and filled + size > numbers:
            found.append(tuple(present))
            present, filled = [], 0
        present.append(name)
        filled += size
    return [*found, tuple(present)] if present else found


def plan_gather(
    weight_map: WeightMap, layout: LayoutSettings, world_size: int, rounds: Iterable[Wanted], rank: int | None = None
) -> list[Round]:
    """Which box goes from where to where, so that each rank of each round gets the HF tensors that it wants.

    A rank that holds a box of what it wants sends it to nobody; of several other holders each serves some. With `rank`, only
    the moves that this rank has a part in: all of them would be receivers x tensors many, on each of a thousand ranks.
    """
    holders = _holders(weight_map, layout, world_size)
    planned = []
    for wanted in rounds:
        targets: dict[tuple[str, ...], list[int]] = defaultdict(list)  # those who want the same, mostly all
        for target, names in wanted.items():
            targets[tuple(names)].append(target)
        moves = (
            move
            for names, alike in targets.items()
            for name in names
            for move in _moves(weight_map, holders, name, alike, rank)
        )
        planned.append(Round(wanted, tuple(moves)))
    return planned


@dataclass(frozen=True)
class _Holding:
    """A box, and the ranks that hold it: in order, and to be looked up in."""

    box: Box
    ranks: tuple[int, ...]
    known: frozenset[int]

    def source(self, target: int) -> int:
        """Who sends it to a rank: the rank itself, if it has it."""
        return target if target in self.known else self.ranks[target % len(self.ranks)]


_Holders = Mapping[tuple[str, int], Sequence[_Holding]]


def _section(rule: Rule, box: Box) -> tuple[str, int]:
    """Experts are looked up one by one: a layer may have hundreds."""
    return rule.megatron, box[0][0] if rule.experts is not None else 0


def _holders(weight_map: WeightMap, layout: LayoutSettings, world_size: int) -> _Holders:
    """For each Megatron tensor (or expert of it) the boxes that it is cut into, and the ranks that hold each."""
    ranks: dict[tuple[str, int], dict[Box, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, alike in holding_alike(layout, world_size):
        for held in weight_map.held(layout, place):
            ranks[_section(held.rule, held.box)][held.box].extend(alike)
    return {
        section: [_Holding(box, tuple(sorted(found)), frozenset(found)) for box, found in boxes.items()]
        for section, boxes in ranks.items()
    }


def holding_alike(layout: LayoutSettings, world_size: int) -> Iterator[tuple[Coordinates, list[int]]]:
    """Ranks that hold the same boxes, with the place of one of them: there are far fewer kinds of ranks than ranks."""
    kinds: dict[tuple[int, ...], list[Coordinates]] = defaultdict(list)
    for place in rank_coordinates(layout, world_size):
        kinds[place.pipeline, place.tensor, place.expert_tensor, place.expert].append(place)
    for places in kinds.values():
        yield places[0], [place.rank for place in places]


def _moves(weight_map: WeightMap, holders: _Holders, name: str, targets: Sequence[int], rank: int | None) -> Iterator[Move]:
    """Of one HF tensor to all who want it; of these only the moves that the rank, if one is given, has a part in."""
    rule = weight_map.hf[name].rule
    own = [target for target in targets if target == rank]
    for part in weight_map.parts(name):
        for holding in holders[_section(rule, part.box)]:
            shared = overlap(part.box, holding.box)
            if shared is None:
                continue
            hf_box = part.hf_of(shared)
            for target in targets if rank is None or rank in holding.known else own:
                source = holding.source(target)
                if rank is None or rank in (source, target):
                    yield Move(source, target, rule.megatron, holding.box, shared, name, hf_box)


# -- doing -------------------------------------------------------------------------------------------------------------


def gather(
    rounds: Sequence[Round], slices: Iterable[Slice], weight_map: WeightMap, dtype: torch.dtype, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """For each round the HF tensors that this rank wanted, whole, on `device`, in the live weights' own formats.

    What a rank holds whole, in one piece, is not copied: to be read, not to be written to.

    `slices` are the live weights of this rank, `dtype` the model's format. All ranks of the default process group call this
    with the same rounds and take every round, also those that bring them nothing: a rank that stops leaves the others
    waiting. The weights must not change meanwhile.
    """
    live = {(piece.name, (tuple(piece.offset), tuple(piece.size))): piece.tensor.detach() for piece in slices}
    following = _Transfer(rounds[0], live, weight_map, dtype, device) if rounds else None
    for number in range(len(rounds)):
        present = following
        more = number + 1 < len(rounds)
        # The next round travels while the present one's tensors are used.
        following = _Transfer(rounds[number + 1], live, weight_map, dtype, device) if more else None
        assert present is not None
        yield present.tensors()


class _Transfer:
    """One round under way on one rank. Two ranks exchange at most one message in each direction."""

    def __init__(
        self,
        planned: Round,
        live: Mapping[tuple[str, Box], Tensor],
        weight_map: WeightMap,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._live, self._map, self._dtype, self._device = live, weight_map, dtype, device
        self._rank = dist.get_rank()
        self._wanted = planned.wanted.get(self._rank, ())
        self._own = [move for move in planned.moves if move.source == move.target == self._rank]
        self._coming: dict[int, list[Move]] = defaultdict(list)
        going: dict[int, list[Move]] = defaultdict(list)
        for move in planned.moves:
            if move.source == self._rank != move.target:
                going[move.target].append(move)
            if move.target == self._rank != move.source:
                self._coming[move.source].append(move)
        self._sent = {target: self._packed(moves) for target, moves in going.items()}  # kept until they have gone
        self._received = {
            source: torch.empty(self._places(moves)[-1].stop, dtype=torch.uint8, device=device)
            for source, moves in self._coming.items()
        }
        operations = [dist.P2POp(dist.isend, message, target) for target, message in sorted(self._sent.items())]
        operations += [dist.P2POp(dist.irecv, message, source) for source, message in sorted(self._received.items())]
        self._work = dist.batch_isend_irecv(operations) if operations else []

    def tensors(self) -> dict[str, Tensor]:
        """Wait for what comes, and put it together."""
        for work in self._work:
            work.wait()
        self._sent.clear()
        whole = {move.hf: live for move in self._own if (live := self._whole(move)) is not None}
        copied = [move for move in self._own if move.hf not in whole]
        for name in self._wanted:
            entry = self._map.hf[name]
            if name not in whole:
                whole[name] = torch.empty(entry.shape, dtype=self._format(entry.rule), device=self._device)
        for move in copied:
            _put(whole[move.hf], move, self._box(move))
        for source, moves in self._coming.items():
            message = self._received.pop(source)
            for move, place in zip(moves, self._places(moves), strict=True):
                _put(whole[move.hf], move, message[place].view(self._format(self._map.rules[move.megatron])))
        return whole

    def _whole(self, move: Move) -> Tensor | None:
        """The HF tensor itself, where this rank's memory holds all of it in one piece."""
        shape = self._map.hf[move.hf].shape
        box = self._box(move) if move.hf_box[1] == shape else None
        return box.view(shape) if box is not None and box.is_contiguous() and box.device == self._device else None

    def _format(self, rule: Rule) -> torch.dtype:
        return torch.float32 if rule.float32 else self._dtype

    def _box(self, move: Move) -> Tensor:
        """Numbers of a live tensor."""
        tensor = self._live[move.megatron, move.held].view(move.held[1])
        expected = self._format(self._map.rules[move.megatron])
        if tensor.dtype != expected:
            raise ValueError(f"{move.megatron} is {tensor.dtype} on rank {self._rank}, the other ranks expect {expected}")
        return tensor[within(move.box, move.held)]

    def _packed(self, moves: Sequence[Move]) -> Tensor:
        """Boxes behind one another, each beginning at a multiple of the alignment."""
        places = self._places(moves)
        message = torch.empty(places[-1].stop, dtype=torch.uint8, device=self._device)
        for move, place in zip(moves, places, strict=True):
            values = self._box(move)
            message[place].view(values.dtype).view(values.shape).copy_(values)
        return message

    def _places(self, moves: Sequence[Move]) -> list[slice]:
        """Where in a message each move's bytes are."""
        places, end = [], 0
        for move in moves:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + math.prod(move.box[1]) * self._format(self._map.rules[move.megatron]).itemsize
            places.append(slice(start, end))
        return places


def _put(whole: Tensor, move: Move, values: Tensor) -> None:
    """Leading axes of length 1 are all that a box's shape differs in on the two sides."""
    whole[within(move.hf_box, ((0,) * whole.dim(), tuple(whole.shape)))].copy_(values.reshape(move.hf_box[1]))
