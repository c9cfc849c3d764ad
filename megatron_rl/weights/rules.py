"""The algebra of the weight map: how one Megatron tensor and some Hugging Face tensors hold the same numbers.

A rule is a statement about boxes: *this box of the Megatron tensor is that box of an HF tensor, in the same order*. Such a
statement has no direction, so every rule is its own inverse; a layout cuts Megatron's boxes, and what is left of each
statement says which part of which HF tensor a rank owns. Everything a family needs is made of a few of them:

    Same                 one tensor, as it is
    Interleaved(groups)  rows of several tensors, a share of each in turn: fused query-key-value is Interleaved(key heads)
                         of q, k, v; gate above up is Interleaved(1) of the two
    Padded(rows)         rows beyond the HF tensor's are padding: zeros in Megatron, nothing in HF

and each may stand once, or for every expert: a leading axis in Megatron, and in HF one tensor an expert or an axis as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_rl.weights.boxes import Box, overlap

Shape = tuple[int, ...]
Cut = Literal["whole", "rows", "gated_rows", "columns"]  # among tensor-parallel ranks; gated: each half's rows on its own


@dataclass(frozen=True)
class HfTensor:
    """A tensor of a Hugging Face checkpoint. In a rule, the name may hold {layer} and {expert}."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Piece:
    """The numbers of `box` of a Megatron tensor are those of `hf_box` of an HF tensor, in the same order.

    Both sizes are equal, except that axes of length 1 may lead one of them.
    """

    box: Box
    hf: str
    hf_box: Box


@dataclass(frozen=True)
class Same:
    """One tensor, as it is."""

    def shape(self, parts: tuple[HfTensor, ...]) -> Shape:
        (part,) = parts
        return part.shape

    def pieces(self, parts: tuple[HfTensor, ...]) -> Iterator[Piece]:
        (part,) = parts
        whole = (0,) * len(part.shape), part.shape
        yield Piece(whole, part.name, whole)


@dataclass(frozen=True)
class Interleaved:
    """Rows of several tensors by turns: the first of `groups` equal shares of each, the second of each, and so on."""

    groups: int = 1

    def shape(self, parts: tuple[HfTensor, ...]) -> Shape:
        return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def pieces(self, parts: tuple[HfTensor, ...]) -> Iterator[Piece]:
        inner = parts[0].shape[1:]
        zeros = (0,) * len(inner)
        row = 0
        for group in range(self.groups):
            for part in parts:
                rows, odd = divmod(part.shape[0], self.groups)
                if odd or part.shape[1:] != inner:
                    raise ValueError(f"{part.name}: {part.shape} cannot be dealt to {self.groups} groups of {parts}")
                yield Piece(((row, *zeros), (rows, *inner)), part.name, ((group * rows, *zeros), (rows, *inner)))
                row += rows


@dataclass(frozen=True)
class Padded:
    """One tensor with rows of zeros below it in Megatron."""

    rows: int

    def shape(self, parts: tuple[HfTensor, ...]) -> Shape:
        (part,) = parts
        return (self.rows, *part.shape[1:])

    def pieces(self, parts: tuple[HfTensor, ...]) -> Iterator[Piece]:
        yield from Same().pieces(parts)


Transform = Same | Interleaved | Padded


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor, made of HF tensors by a transform, and how tensor-parallel ranks cut it.

    With `experts`, the rule stands for so many experts at once: Megatron's tensor has a leading expert axis, and the parts'
    names hold {expert}, or, when they do not, the parts have that axis too.
    """

    megatron: str
    parts: tuple[HfTensor, ...]
    transform: Transform = Same()
    cut: Cut = "whole"
    experts: int | None = None
    float32: bool = False  # kept in float32 whatever the model's format (choice biases)

    @property
    def shape(self) -> Shape:
        """Of the Megatron tensor, whole."""
        one = self.transform.shape(self.parts)
        return one if self.experts is None else (self.experts, *one)

    @property
    def rows(self) -> int:
        """Of the HF tensors together: rows beyond them are padding."""
        return sum(part.shape[0] for part in self.parts)

    @property
    def stacked(self) -> bool:
        """Do the HF tensors have an expert axis?"""
        return self.experts is not None and "{expert}" not in self.parts[0].name

    def hf_tensors(self) -> Iterator[tuple[HfTensor, int | None]]:
        """The HF tensors it speaks of, each once, and the expert that each belongs to if it belongs to one."""
        for part in self.parts:
            if self.experts is None:
                yield part, None
            elif self.stacked:
                yield HfTensor(part.name, (self.experts, *part.shape)), None
            else:
                for expert in range(self.experts):
                    yield HfTensor(part.name.format(expert=expert), part.shape), expert

    def pieces(self, box: Box | None = None) -> Iterator[Piece]:
        """What the tensor, or a box of it, is made of. Padding is in no piece."""
        if self.experts is None:
            yield from _clipped(self.transform.pieces(self.parts), box)
            return
        first, count = (0, self.experts) if box is None else (box[0][0], box[1][0])
        inner = None if box is None else (box[0][1:], box[1][1:])
        for expert in range(first, first + count):
            for piece in _clipped(self.transform.pieces(self.parts), inner):
                yield self._of_expert(piece, expert)

    def box_of(self, expert: int | None) -> Box:
        """The whole Megatron tensor, or one expert's part of it."""
        if expert is None:
            return (0,) * len(self.shape), self.shape
        return (expert, *(0,) * (len(self.shape) - 1)), (1, *self.shape[1:])

    def _of_expert(self, piece: Piece, expert: int) -> Piece:
        lead = (expert, *piece.box[0]), (1, *piece.box[1])
        if self.stacked:
            return Piece(lead, piece.hf, ((expert, *piece.hf_box[0]), (1, *piece.hf_box[1])))
        return Piece(lead, piece.hf.format(expert=expert), piece.hf_box)

    def at(self, layer: int) -> "Rule":
        """The rule of one layer."""
        parts = tuple(HfTensor(part.name.replace("{layer}", str(layer)), part.shape) for part in self.parts)
        return replace(self, megatron=self.megatron.replace("{layer}", str(layer)), parts=parts)


def _clipped(pieces: Iterator[Piece], box: Box | None) -> Iterator[Piece]:
    """What is left of pieces inside a box of the Megatron tensor."""
    for piece in pieces:
        shared = piece.box if box is None else overlap(piece.box, box)
        if shared is not None:
            start = tuple(hf + low - begin for hf, low, begin in zip(piece.hf_box[0], shared[0], piece.box[0], strict=True))
            yield Piece(shared, piece.hf, (start, shared[1]))


def tensor_boxes(shape: Shape, cut: Cut, rank: int, ranks: int) -> list[Box]:
    """What one of `ranks` tensor-parallel ranks holds of a matrix (or vector) of this shape.

    Gated rows are two boxes also on a single rank: so Megatron describes them, however they are cut.
    """
    if cut == "whole" or (ranks == 1 and cut != "gated_rows"):
        return [((0,) * len(shape), shape)]
    axis = 1 if cut == "columns" else 0
    runs = 2 if cut == "gated_rows" else 1
    length = shape[axis] // runs
    if shape[axis] % (runs * ranks):
        raise ValueError(f"{shape} cannot be cut along axis {axis} into {ranks} equal parts of {runs} runs")
    boxes = []
    for run in range(runs):
        offset, size = [0] * len(shape), list(shape)
        offset[axis], size[axis] = run * length + rank * (length // ranks), length // ranks
        boxes.append((tuple(offset), tuple(size)))
    return boxes
