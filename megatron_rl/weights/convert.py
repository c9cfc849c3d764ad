"""Conversion of checkpoints: Hugging Face to Megatron under any layout, back, and Hugging Face to another number format.

Files of the target are dealt to processes, and each is streamed: strips of tensors are read from the source, encoded and
written, so that memory does not grow with the model. A file gets its name when it is whole. All of it happens in
`TARGET.partial`, which is renamed at the end; if it is found when the same conversion is started again, what is whole in it
is kept. Which process wrote what leaves no trace: the files are the same bytes.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_rl.config.checks import require_valid_layout
from megatron_rl.config.errors import CheckpointError
from megatron_rl.config.layout_map import rank_coordinates, smallest_world_size
from megatron_rl.config.settings import LayoutSettings
from megatron_rl.weights.boxes import Box
from megatron_rl.weights.checkpoint_files import (
    MANIFEST,
    PARTIAL,
    SavedBox,
    put_in_place,
    rank_file,
    suffixed,
    versions,
    write_manifest,
    write_rank_file,
)
from megatron_rl.weights.conversion_state import ConversionState, write_whole
from megatron_rl.weights.fp8 import audit, fp8_tensors, served_tensors
from megatron_rl.weights.hf_output import (
    DTYPES,
    SHARD_SIZE,
    Format,
    OutputFile,
    exported_config,
    plan_files,
    strips,
    write_rest,
    write_strip,
)
from megatron_rl.weights.processes import deal, run_shares
from megatron_rl.weights.rules import Rule
from megatron_rl.weights.sources import Source, open_source

Told = Callable[[str], None]  # a line for the user
Moved = Callable[[int], None]  # so many bytes have been written


@dataclass(frozen=True)
class Conversion:
    """What becomes what."""

    source: Path
    target: Path
    format: Literal["hf", "megatron"]
    layout: LayoutSettings = field(default_factory=LayoutSettings)  # of a Megatron checkpoint
    dtype: Format | None = None  # None: float32 where the source is, else bfloat16
    shard_size: int = SHARD_SIZE  # bytes of a file of a Hugging Face checkpoint
    like: Path | None = None  # whose config.json and tokenizer a Megatron checkpoint without its own gets

    def open(self) -> "Plan":
        return Plan(self, open_source(self.source, self.like))


@dataclass(frozen=True)
class RankFile:
    """One rank's file of a Megatron checkpoint."""

    name: str
    boxes: tuple[SavedBox, ...]

    @property
    def bytes(self) -> int:
        return sum(_numbers(box.size) * box.dtype.itemsize for box in self.boxes)


class Plan:
    """A conversion with its source open: what there is to write, and the writing of each file."""

    def __init__(self, conversion: Conversion, source: Source) -> None:
        self.conversion = conversion
        self.source = source
        self.format = conversion.dtype or ("float32" if torch.float32 in source.formats() else "bfloat16")
        self.quantized = fp8_tensors(source.weight_map) if self.format == "fp8" else frozenset[str]()
        self.files: Sequence[OutputFile | RankFile] = (
            plan_files(source.weight_map, self.format, self.quantized, conversion.shard_size)
            if conversion.format == "hf"
            else list(self._rank_files())
        )

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def check(self) -> None:
        """Everything that can be known before work."""
        self.source.check()
        if self.conversion.format == "megatron" and self.format == "fp8":
            raise CheckpointError("a Megatron checkpoint is bfloat16 or float32; FP8 is a format of Hugging Face checkpoints")
        if self.format == "fp8":
            served = served_tensors(self.source.weight_map, self.config()["quantization_config"])
            audit({"the exported files": self.quantized, "a server that reads the exported config.json": served})

    def config(self) -> dict[str, Any]:
        return exported_config(self.source.config(), self.source.weight_map, self.format, self.quantized)

    def description(self) -> dict[str, Any]:
        """What must not have changed for a conversion that was interrupted to go on."""
        conversion = self.conversion
        return {
            "source": str(conversion.source.resolve()),
            "files": self.source.identity(),
            "format": conversion.format,
            "layout": conversion.layout.model_dump(mode="json"),
            "shard_size": conversion.shard_size,
            "dtype": self.format,
            "versions": versions(),
        }

    def write(self, number: int, path: Path, moved: Moved) -> dict[str, Any]:
        """Write a file; returns what the end of the conversion wants to know of it."""
        file = self.files[number]
        if isinstance(file, RankFile):
            written = write_rank_file(path, file.boxes, (self._runs(box, moved) for box in file.boxes))
            return {**written, "file": file.name}
        with file.open(path) as writer:
            for output in file.tensors:
                for box in strips(output.shape):
                    write_strip(writer, output, box, self.source.hf(output.name, box))
                    moved(_numbers(box[1]) * output.dtype.itemsize)
        return {}

    def finish(self, folder: Path, written: list[dict[str, Any]]) -> None:
        """Write everything but weights."""
        if self.conversion.format == "hf":
            write_rest(
                folder, [file for file in self.files if isinstance(file, OutputFile)], self.config(), self.source.others()
            )
            return
        write_rest(folder, [], self.config(), self.source.others())
        header = {
            "step": 0,
            "steps": 0,
            "skipped": 0,
            "weights_only": True,  # no optimizer state: whoever loads it starts one from the weights
            "architecture": asdict(self.source.architecture),
            "dtype": self.format,
            "world_size": len(self.files),
            "layout": self.conversion.layout.model_dump(mode="json"),
            "versions": versions(),
        }
        write_manifest(folder, header, written)

    def _rank_files(self) -> Iterator[RankFile]:
        layout = self.conversion.layout
        world_size = layout.world_size or smallest_world_size(layout)
        require_valid_layout(layout, self.source.architecture, self.source.description, world_size)
        for place in rank_coordinates(layout, world_size):
            boxes = [
                SavedBox(held.rule.megatron, held.rule.shape, self._dtype(held.rule), *held.box)
                for held in self.source.weight_map.held(layout, place)
                if held.keeper
            ]
            yield RankFile(rank_file(place.rank), tuple(sorted(boxes, key=lambda box: -box.dtype.itemsize)))

    def _dtype(self, rule: Rule) -> torch.dtype:
        return torch.float32 if rule.float32 else DTYPES[self.format]

    def _runs(self, box: SavedBox, moved: Moved) -> Iterator[Tensor]:
        for offset, size in strips(box.size):
            place: Box = (tuple(low + inner for low, inner in zip(box.offset, offset, strict=True)), size)
            yield self.source.megatron(box.name, place).to(box.dtype)
            moved(_numbers(size) * box.dtype.itemsize)


def _numbers(size: tuple[int, ...]) -> int:
    return torch.Size(size).numel()


def write_share(conversion: Conversion, numbers: list[int], moved: Moved) -> None:
    """Write some of the files. It runs in a process of its own when there are several."""
    plan = conversion.open()
    for number in numbers:
        write = partial(plan.write, number, moved=moved)
        write_whole(suffixed(conversion.target, PARTIAL), plan.files[number].name, write)
    plan.source.close()


def convert(
    conversion: Conversion,
    *,
    processes: int = 1,
    overwrite: bool = False,
    tell: Told = print,
    begun: Moved = lambda _: None,
    moved: Moved = lambda _: None,
    proof: Callable[[Plan, Path], None] = lambda plan, folder: None,
) -> Path:
    """Convert; returns the folder. Errors of the source, the target and the disk come before anything is written.

    An error, or a number that is not finite, leaves nothing behind; a conversion that was killed leaves `TARGET.partial`, and
    goes on from it when it is started again. `begun` hears how many bytes there are to write, `moved` of each part of them;
    `proof` may raise before the folder gets its name.
    """
    target = conversion.target
    unfinished = suffixed(target, PARTIAL)
    plan = conversion.open()
    _require_new(conversion, overwrite)
    plan.check()
    if plan.source.config().get("num_nextn_predict_layers"):
        tell("multi-token prediction layers are not trained and not carried: num_nextn_predict_layers is set to 0")
    with ConversionState(unfinished, plan.description()) as state:
        missing = [number for number, file in enumerate(plan.files) if not state.is_whole(file.name)]
        _tell_of_earlier(state, len(plan.files) - len(missing), tell)
        try:
            costs = [plan.files[number].bytes for number in missing]
            _require_space(unfinished, sum(costs))
            begun(sum(costs))
            run_shares(write_share, [(conversion, share) for share in deal(missing, costs, processes)], moved)
            plan.finish(unfinished, [state.record(file.name) for file in plan.files])
            proof(plan, unfinished)
        except InterruptedError as error:
            raise CheckpointError(f"{error}. Start it again: it goes on from the files that are whole.") from error
        except (CheckpointError, OSError) as error:
            shutil.rmtree(unfinished)
            raise CheckpointError(f"{target} was not written, and nothing is left of it: {error}") from error
        state.end()
        put_in_place(target)
    plan.source.close()
    return target


def _require_new(conversion: Conversion, overwrite: bool) -> None:
    source, target = conversion.source.resolve(), conversion.target.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise CheckpointError(f"{target} is what is converted, lies in it or holds it. Name another folder.")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists already. Name another folder, or replace it with --overwrite.")
    if target.exists() and not ((target / "config.json").is_file() or (target / MANIFEST).is_file()):
        raise CheckpointError(f"{target} is no checkpoint: it is not overwritten. Name another folder.")


def _tell_of_earlier(state: ConversionState, whole: int, tell: Told) -> None:
    if state.found:
        tell(f"going on: {whole} files are whole already")
    if state.found is False:
        tell(f"{state.partial} was of another conversion, or of another state of the source: starting afresh")


def _require_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise CheckpointError(f"{wanted / 1e9:.1f} GB are to be written, and the disk has {free / 1e9:.1f} GB left")
