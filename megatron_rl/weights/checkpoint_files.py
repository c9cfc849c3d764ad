"""The format of Megatron checkpoints: sharded, layout-free, never half-loaded, and plain data.

A checkpoint is a folder `step_N` with one safetensors file a rank and a manifest. Each file holds the boxes that its rank
is the one to save; the manifest, written last, says where every box of every global tensor lies and what the files' sizes
and checksums are. Everything is written into `step_N.partial` and renamed when it is whole, so a folder that has the final
name is complete whatever was killed when. Nothing in it is pickled.

Here it is files alone: who writes them, ranks that train or a conversion without any, is not its business.
"""

import hashlib
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl import __version__
from megatron_rl.config.errors import CheckpointError
from megatron_rl.weights.boxes import Box, overlap, within
from megatron_rl.weights.rules import Shape
from megatron_rl.weights.safetensors_io import DTYPES, Planned, TensorFile, TensorFileWriter

FORMAT = 1
MANIFEST = "manifest.json"
# What a folder step_N is called while it is not, or no longer, the checkpoint of step N. None of these is loaded, but for
# one that was being replaced when the process died.
PARTIAL, REPLACED, DELETED, ABANDONED = ".partial", ".replaced", ".deleted", ".abandoned"
_NAMED_DTYPES: Mapping[str, torch.dtype] = {str(dtype): dtype for dtype in DTYPES.values()}  # as manifests write them


# -- folders -----------------------------------------------------------------------------------------------------------


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    found = {path.name: path for path in root.glob("step_*") if (path / MANIFEST).is_file()}
    whole = [path for path in found.values() if not path.suffix]
    rescued = [path for path in found.values() if path.suffix == REPLACED and path.stem not in found]
    return sorted(whole + rescued, key=lambda path: path.stem)


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = complete_checkpoints(root)
    return found[-1] if found else None


def suffixed(folder: Path, suffix: str) -> Path:
    """The same checkpoint under a name that says what has become of it."""
    return folder.with_name(folder.name.removesuffix(REPLACED) + suffix)


def retire(folder: Path) -> None:
    """Delete a checkpoint, never leaving half of it under a name that is loaded."""
    gone = suffixed(folder, DELETED)
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def set_aside(folder: Path) -> None:
    """A checkpoint of a later step, from a history that was gone back on: kept, no longer the latest."""
    shutil.rmtree(suffixed(folder, ABANDONED), ignore_errors=True)
    folder.rename(suffixed(folder, ABANDONED))


def remove_halves(root: Path) -> None:
    """Remove what processes that died have left half-written, or half-deleted."""
    for suffix in (PARTIAL, DELETED):
        for leftover in root.glob(f"step_*{suffix}"):
            shutil.rmtree(leftover)


def put_in_place(folder: Path) -> None:
    """What is whole in the partial folder gets the final name; a folder of that name goes once the new one is there."""
    flush_folder(suffixed(folder, PARTIAL))
    if folder.exists():
        shutil.rmtree(suffixed(folder, REPLACED), ignore_errors=True)  # of a process that died between the last two lines
        folder.rename(suffixed(folder, REPLACED))
    suffixed(folder, PARTIAL).rename(folder)
    flush_folder(folder.parent)
    shutil.rmtree(suffixed(folder, REPLACED), ignore_errors=True)


def flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedBox:
    """A box of a global tensor that a rank's file holds."""

    name: str
    shape: Shape  # of the global tensor
    dtype: torch.dtype
    offset: Shape
    size: Shape


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def write_rank_file(path: Path, boxes: Sequence[SavedBox], values: Iterable[Iterable[Tensor]]) -> dict[str, Any]:
    """Write a rank's boxes as a stream, each given as consecutive runs of its numbers in order.

    Returns what the manifest wants to know of the file.
    """
    planned = [Planned(f"{number:06d}:{box.name}", box.dtype, box.size) for number, box in enumerate(boxes)]
    digest = hashlib.sha256()
    with TensorFileWriter(path, planned, digest=digest) as file:
        for tensor, runs in zip(planned, values, strict=True):
            start = 0
            for run in runs:
                file.put(tensor.name, start, run)
                start += run.numel()
    flush_folder(path.parent)
    rows = [
        [box.name, list(box.shape), str(box.dtype), tensor.name, list(box.offset), list(box.size)]
        for box, tensor in zip(boxes, planned, strict=True)
    ]
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest(), "boxes": rows}


def write_manifest(folder: Path, header: Mapping[str, Any], written: Sequence[Mapping[str, Any]]) -> None:
    """The last file of a checkpoint; `written` is what `write_rank_file` returned for each rank."""
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **header, **_index(written)}, file)
        flush(file)


def _index(written: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest's tables, checked: the boxes of each tensor must fill it exactly."""
    files = [{"name": w["file"], "bytes": w["bytes"], "sha256": w["sha256"]} for w in written]
    tensors: dict[str, Any] = {}
    filled: dict[str, int] = defaultdict(int)
    for number, rank_written in enumerate(written):
        for name, shape, dtype, key, offset, size in rank_written["boxes"]:
            entry = tensors.setdefault(name, {"shape": shape, "dtype": dtype, "boxes": []})
            entry["boxes"].append([number, key, offset, size])
            filled[name] += math.prod(size)
    for name, entry in tensors.items():
        if filled[name] != math.prod(entry["shape"]):
            raise ValueError(f"{name} is saved as {filled[name]} numbers but has {math.prod(entry['shape'])}")
    return {"files": files, "tensors": tensors}


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    return {"megatron-rl": __version__, **{name: version(name) for name in ("megatron-core", "torch")}}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Fields that differ between what a manifest says and what would be written into it now, in words."""
    now = json.loads(json.dumps(current))
    return [
        f"{name}: {saved.get(name)!r} in the checkpoint, {now.get(name)!r} in the settings"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A saved box, and what of it is wanted."""

    file: int
    key: str
    box: Box
    shared: Box


class CheckpointFiles:
    """A complete checkpoint on disk, opened for reading."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self._files: dict[int, TensorFile] = {}

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._files.values())

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def damage(self, files: Iterable[Mapping[str, Any]]) -> list[str]:
        """What is wrong with files of the manifest: sizes and checksums are compared."""
        return [problem for file in files if (problem := _damage(self.folder / file["name"], file))]

    def dtype(self, name: str) -> torch.dtype:
        """Of a global tensor."""
        return _NAMED_DTYPES[self.manifest["tensors"][name]["dtype"]]

    def sources(self, name: str, shape: Shape, dtype: torch.dtype | None, box: Box) -> list[Source] | str:
        """Where the numbers of a box lie, or what is wrong."""
        entry = self.manifest["tensors"].get(name)
        if entry is None:
            return f"it has no tensor {name}"
        if tuple(entry["shape"]) != tuple(shape):
            return f"{name} has shape {entry['shape']}, the model wants {list(shape)}"
        if dtype is not None and entry["dtype"] != str(dtype):
            return f"{name} is {entry['dtype']}, the model wants {dtype}"
        sources = []
        for file, key, offset, size in entry["boxes"]:
            if offset and (offset[0] >= box[0][0] + box[1][0] or offset[0] + size[0] <= box[0][0]):
                continue  # the quick answer for most of many experts
            saved = (tuple(offset), tuple(size))
            shared = overlap(box, saved)
            if shared is not None:
                sources.append(Source(file, key, saved, shared))
        held, numbers = sum(math.prod(source.shared[1]) for source in sources), math.prod(box[1])
        return sources if held == numbers else f"it holds {held} of the {numbers} numbers wanted of {name}"

    def read(self, source: Source) -> Tensor:
        """What is wanted of a saved box."""
        inner = tuple(low - begin for low, begin in zip(source.shared[0], source.box[0], strict=True))
        return self._open(source.file).read(source.key, (inner, source.shared[1]))

    def fill_box(self, sources: Iterable[Source], box: Box, target: Tensor) -> None:
        """Fill a tensor, which is `box` of a global one, from the saved boxes that cover it."""
        for source in sources:
            target[within(source.shared, box)].copy_(self.read(source))

    def _open(self, number: int) -> TensorFile:
        if number not in self._files:
            path = self.folder / self.manifest["files"][number]["name"]
            try:
                self._files[number] = TensorFile(path)
            except CheckpointError as error:
                raise CheckpointError(f"checkpoint {self.folder}: {error}") from error
        return self._files[number]


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint at {folder}")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: the save was interrupted, or this is not a checkpoint. Use a complete one."
        )
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is not a checkpoint manifest: {error!r}") from error
    if found != FORMAT:
        raise CheckpointError(f"{folder} is of checkpoint format {found}; this version of megatron_rl reads format {FORMAT}")
    return manifest


def _damage(path: Path, expected: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            return f"{path.name} does not match its checksum"
    return None
