"""First weights straight from a Hugging Face checkpoint: every rank reads exactly the boxes it owns, and nothing else."""

from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import CheckpointError
from megatron_rl.weights.boxes import Slice, finite, within
from megatron_rl.weights.hf_files import HfFolder
from megatron_rl.weights.map import WeightMap


def load_hf(slices: Iterable[Slice], architecture: Architecture, folder: Path) -> int:
    """Fill live tensors from an HF folder; returns how many bytes of it were read.

    Names and shapes are checked before anything is filled, numbers as they come: one that is not finite is an error.
    """
    wanted = list(slices)
    with HfFolder(folder) as source:
        weight_map = source.weight_map(architecture)
        for name in dict.fromkeys(piece.hf for each in wanted for piece in weight_map.pieces(each.name, _box(each))):
            source.require_shape(name, weight_map.hf[name].shape)
        with torch.no_grad():
            for each in wanted:
                _fill(each, source, weight_map)
        return source.bytes_read


def _box(piece: Slice) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return piece.offset, piece.size


def _fill(target: Slice, source: HfFolder, weight_map: WeightMap) -> None:
    tensor = target.tensor.view(target.size)
    rule = weight_map.rules[target.name]
    if not rule.stacked and rule.rows < rule.shape[0] and rule.experts is None:
        tensor.zero_()  # padding: what is not filled below
    for piece in weight_map.pieces(target.name, _box(target)):
        values = source.values(piece.hf, piece.hf_box)
        if not finite(values):
            raise CheckpointError(f"{source.folder}: {piece.hf} holds numbers that are not finite. The checkpoint is damaged.")
        tensor[within(piece.box, _box(target))].copy_(values.view(piece.box[1]))
