"""The weight map: every tensor of a Hugging Face checkpoint and every tensor of the Megatron model, and what holds what.

One table a family, read in both directions. Conversion, loading, live publishing and FP8 export all ask here and nowhere
else. The map is made from the architecture alone: neither weights nor a model need to exist.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.layout_map import Coordinates, local_experts, stage_layers
from megatron_rl.config.settings import LayoutSettings
from megatron_rl.weights.boxes import Box, overlap
from megatron_rl.weights.families import table_of
from megatron_rl.weights.families.table import Form
from megatron_rl.weights.rules import Piece, Rule, Shape, tensor_boxes

_COMPUTED = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")  # tables that old checkpoints carry
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class HfEntry:
    """An HF tensor: the rule that names it, its shape, and the expert that it belongs to if it belongs to one."""

    rule: Rule
    shape: Shape
    expert: int | None

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Part:
    """What one HF tensor is made of: a box of it is a box of a Megatron tensor. A `Piece`, seen from the other side."""

    hf_box: Box
    megatron: str
    box: Box

    def hf_of(self, box: Box) -> Box:
        """Where a smaller box of the Megatron tensor is in the HF tensor. Leading axes of length 1 may differ."""
        axes = min(len(self.box[0]), len(self.hf_box[0]))
        ends = zip(self.hf_box[0][-axes:], box[0][-axes:], self.box[0][-axes:], strict=True)
        offset = tuple(hf + low - begin for hf, low, begin in ends)
        return (*self.hf_box[0][:-axes], *offset), (*self.hf_box[1][:-axes], *box[1][-axes:])

    def inside(self, hf_box: Box) -> "Part | None":
        """What of it lies in a box of the HF tensor."""
        shared = overlap(self.hf_box, hf_box)
        if shared is None:
            return None
        there = Part(self.box, "", self.hf_box)  # the same statement, with its sides changed
        return Part(shared, self.megatron, there.hf_of(shared))


@dataclass(frozen=True)
class Held:
    """A box of a Megatron tensor on a rank. Of all ranks that hold it, one is its `keeper`, who saves it."""

    rule: Rule
    box: Box
    keeper: bool


class WeightMap:
    """All rules of one model, its layers filled in."""

    def __init__(self, architecture: Architecture, form: Form = "published") -> None:
        table = table_of(architecture, form)
        self.architecture = architecture
        self.form = form
        self.first = table.first
        self.last = table.last
        self.layers: list[tuple[Rule, ...]] = []
        for layer, moe in enumerate(architecture.moe_layers):
            rules = table.every_layer + (table.moe_layers if moe else table.dense_layers)
            self.layers.append(tuple(rule.at(layer) for rule in rules))
        self.rules: Mapping[str, Rule] = {rule.megatron: rule for rule in self._in_order()}
        self.hf: Mapping[str, HfEntry] = {
            tensor.name: HfEntry(rule, tensor.shape, expert)
            for rule in self.rules.values()
            for tensor, expert in rule.hf_tensors()
        }

    def _in_order(self) -> Iterator[Rule]:
        yield from self.first
        for rules in self.layers:
            yield from rules
        yield from self.last

    def pieces(self, megatron: str, box: Box | None = None) -> Iterator[Piece]:
        """What a Megatron tensor, or a box of it, is made of. What no piece covers is padding: zeros."""
        return self.rules[megatron].pieces(box)

    def parts(self, hf: str) -> Iterator[Part]:
        """What an HF tensor is made of, whole."""
        entry = self.hf[hf]
        for piece in entry.rule.pieces(entry.rule.box_of(entry.expert)):
            if piece.hf == hf:
                yield Part(piece.hf_box, entry.rule.megatron, piece.box)

    def is_extra(self, name: str, names: Collection[str]) -> bool:
        """May a checkpoint with these tensors hold this one although no rule names it?

        Multi-token prediction layers stand behind the decoder's own and are not trained; rotary tables are computed; the
        output layer of a tied model is the embedding. A decoder's layer that the config does not count is no extra.
        """
        layer = _LAYER.match(name)
        predicts = (
            layer is not None
            and int(layer[1]) >= self.architecture.layers
            and f"{layer[0]}eh_proj.weight" in names  # which joins the next token's embedding to the hidden state
        )
        tied = self.architecture.tied_embeddings and name == "lm_head.weight"
        return predicts or tied or _COMPUTED.fullmatch(name) is not None

    # -- where things lie on ranks -------------------------------------------------------------------------------------

    def held(self, layout: LayoutSettings, place: Coordinates) -> Iterator[Held]:
        """Every box of every Megatron tensor that a rank holds under a layout."""
        stages = stage_layers(layout, self.architecture)
        chunks = stages[place.pipeline]
        for index, layers in enumerate(chunks):
            first = place.pipeline == 0 and index == 0
            last = place.pipeline == layout.pipeline - 1 and index == len(chunks) - 1
            if first:
                yield from _on_rank(self.first, self.architecture, layout, place)
            for layer in layers:
                yield from _on_rank(self.layers[layer], self.architecture, layout, place)
            if last:
                yield from _on_rank(self.last, self.architecture, layout, place)
            if last and not first and self.architecture.tied_embeddings:  # a copy of the embedding computes the logits
                for copy in _on_rank(self.first, self.architecture, layout, place):
                    yield replace(copy, keeper=False)


def _on_rank(rules: Collection[Rule], architecture: Architecture, layout: LayoutSettings, place: Coordinates) -> Iterator[Held]:
    for rule in rules:
        if rule.experts is None:
            whole = rule.cut == "whole" or layout.tensor == 1
            keeper = place.data == 0 and place.context == 0 and (not whole or place.tensor == 0)
            for box in tensor_boxes(rule.shape, rule.cut, place.tensor, layout.tensor):
                yield Held(rule, box, keeper)
            continue
        for offset, size in tensor_boxes(rule.shape[1:], rule.cut, place.expert_tensor, layout.expert_tensor):
            for expert in local_experts(layout, architecture, place.expert):
                yield Held(rule, ((expert, *offset), (1, *size)), keeper=place.expert_data == 0)


def form_of(names: Collection[str]) -> Form:
    """In which of the two forms a checkpoint with these tensors writes its experts."""
    return "stacked" if any(name.endswith(".mlp.experts.gate_up_proj") for name in names) else "published"
