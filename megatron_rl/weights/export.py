"""A Hugging Face checkpoint straight from the weights that ranks train, which all write files of it.

The files are those that offline conversion makes of the same weights, byte for byte: plan and encoding are the same. A rank
holds a bucket of tensors at a time besides its own weights.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.config.errors import CheckpointError
from megatron_rl.config.settings import LayoutSettings
from megatron_rl.weights.boxes import Slice, finite, within
from megatron_rl.weights.gather import Round, buckets, gather, plan_gather
from megatron_rl.weights.hf_output import OutputFile, strips, write_strip
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.safetensors_io import TensorFileWriter

BUCKET = 1 << 27  # numbers that a rank gathers at once


@dataclass(frozen=True)
class ExportPlan:
    """Which rank writes which files, and what travels for it."""

    files: Sequence[OutputFile]
    world_size: int
    rounds: Sequence[Round]

    def of_rank(self, rank: int) -> Sequence[OutputFile]:
        return self.files[rank :: self.world_size]


def plan_export(
    weight_map: WeightMap, layout: LayoutSettings, world_size: int, files: Sequence[OutputFile], bucket: int = BUCKET
) -> ExportPlan:
    """Deal files to ranks; each gathers its files' tensors bucket by bucket, all ranks at the same time."""
    plan = ExportPlan(files, world_size, ())
    by_rank = [
        [cut for file in plan.of_rank(rank) for cut in buckets(weight_map, (each.name for each in file.tensors), bucket)]
        for rank in range(world_size)
    ]
    wanted = [{rank: names for rank, names in enumerate(together) if names} for together in zip_longest(*by_rank, fillvalue=())]
    return ExportPlan(files, world_size, plan_gather(weight_map, layout, world_size, wanted))


def write_export(
    plan: ExportPlan,
    rank: int,
    slices: Iterable[Slice],
    weight_map: WeightMap,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
) -> str | None:
    """Write this rank's files; returns what went wrong, if something did. All ranks call it.

    A rank that cannot write still takes part to the end: the others need what it holds.
    """
    failure: str | None = None
    files = _Files(plan.of_rank(rank), folder)
    places = {output.name: place for place, output in enumerate(o for file in plan.of_rank(rank) for o in file.tensors)}
    for tensors in gather(plan.rounds, slices, weight_map, dtype, device):
        for name in sorted(tensors, key=places.__getitem__):  # a round comes in no order, a file is written in one
            if failure is None:
                try:
                    files.add(name, tensors[name].cpu())
                except (CheckpointError, OSError) as error:
                    failure = str(error)
    return failure


class _Files:
    """Writes whole tensors, which come in the order of the plan, into their files."""

    def __init__(self, files: Sequence[OutputFile], folder: Path) -> None:
        self._folder = folder
        self._left = [(file, output) for file in reversed(files) for output in reversed(file.tensors)]
        self._writer: TensorFileWriter | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        file, output = self._left.pop()
        if name != output.name:
            raise ValueError(f"{name} comes where {output.name} was planned")
        if not finite(tensor):
            raise CheckpointError(f"{name} holds numbers that are not finite")
        if self._writer is None:
            self._writer = file.open(self._folder / file.name)
        for box in strips(output.shape):
            write_strip(self._writer, output, box, tensor[within(box, ((0,) * tensor.dim(), output.shape))])
        if not self._left or self._left[-1][0] is not file:
            self._writer.close()
            self._writer = None
