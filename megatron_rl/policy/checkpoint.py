"""Checkpoints: sharded, layout-free, never half-loaded, and plain data.

A checkpoint is a folder `step_N` with one safetensors file a rank and a manifest. Each file holds the slices that its rank
is the one to save; the manifest, written last, says where every box of every global tensor lies and what the files' sizes
and checksums are. Everything is written into `step_N.partial` and renamed when it is whole, so a folder that has the final
name is complete whatever was killed when. Nothing in it is pickled.
"""

import hashlib
import json
import math
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl import __version__
from megatron_rl.config.errors import CheckpointError
from megatron_rl.policy.layout import Layout
from megatron_rl.weights.boxes import Box, Slice, overlap, within

FORMAT = 1
MANIFEST = "manifest.json"
# What a folder step_N is called while it is not, or no longer, the checkpoint of step N. None of these is loaded, but for
# one that was being replaced when the process died.
PARTIAL, REPLACED, DELETED, ABANDONED = ".partial", ".replaced", ".deleted", ".abandoned"


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


def _suffixed(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.stem + suffix)


def _retire(folder: Path) -> None:
    """Delete a checkpoint, never leaving half of it under a name that is loaded."""
    gone = _suffixed(folder, DELETED)
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def _set_aside(folder: Path) -> None:
    """A checkpoint of a later step, from a history that was gone back on: kept, no longer the latest."""
    shutil.rmtree(_suffixed(folder, ABANDONED), ignore_errors=True)
    folder.rename(_suffixed(folder, ABANDONED))


# -- saving ------------------------------------------------------------------------------------------------------------


@dataclass
class Saving:
    """A save under way: this rank's file is being written, the manifest is not there yet."""

    step: int
    folder: Path
    header: dict[str, Any]
    thread: threading.Thread
    written: dict[str, Any]
    failure: list[BaseException]


class CheckpointWriter:
    """Writes checkpoints under a folder, at most one at a time, and keeps the newest few. All ranks call it alike."""

    def __init__(self, root: Path, layout: Layout, keep_last: int) -> None:
        self.root = root
        self.layout = layout
        self.keep_last = keep_last
        self._saving: Saving | None = None

    def save(self, step: int, slices: Iterable[Slice], header: Mapping[str, Any], *, asynchronous: bool = False) -> Path:
        """Save. With `asynchronous` the files are written while training goes on: call `poll` after each step."""
        self.finish()
        final = step_folder(self.root, step)
        partial = _suffixed(final, PARTIAL)
        self._on_main(lambda: self._prepare(final), f"{final} cannot be written")
        tensors, boxes = _stage([piece for piece in slices if piece.saved_here])
        written: dict[str, Any] = {"boxes": boxes}
        failure: list[BaseException] = []
        path = partial / f"rank_{self.layout.rank:05d}.safetensors"
        thread = threading.Thread(target=_write_file, args=(path, tensors, written, failure), name=f"save {final.name}")
        self._saving = Saving(step, final, {"format": FORMAT, "step": step, **header}, thread, written, failure)
        thread.start()
        if not asynchronous:
            self.finish()
        return final

    def poll(self) -> None:
        """Complete the save under way if every rank's file is written. Cheap when nothing is."""
        if self._saving is not None and not self.layout.agree(self._saving.thread.is_alive()):
            self.finish()

    def finish(self) -> None:
        """Complete the save under way, if there is one: wait for every rank's file, write the manifest, rename."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        saving.thread.join()
        failures = self.layout.everyone_has(repr(saving.failure[0]) if saving.failure else None)
        if any(failures):
            rank = next(i for i, failure in enumerate(failures) if failure)
            raise CheckpointError(
                f"{saving.folder} was not saved: rank {rank} could not write its file: {failures[rank]}. Earlier checkpoints "
                "are untouched. The folder must be shared by all machines, have space left, and be writable."
            )
        written = self.layout.main_has(saving.written)
        self._on_main(lambda: self._commit(saving, written), f"{saving.folder} was not saved")

    def _on_main(self, action: Callable[[], None], problem: str) -> None:
        """Rank 0 does something to the folder; all ranks learn whether it went well."""
        failure = None
        if self.layout.is_main:
            try:
                action()
            except (OSError, ValueError) as error:
                failure = f"{problem}: {error!r}. Earlier checkpoints are untouched."
        found = self.layout.everyone_has(failure)[0]
        if found:
            raise CheckpointError(found)

    def _prepare(self, final: Path) -> None:
        for suffix in (PARTIAL, DELETED):  # left behind by processes that died
            for leftover in self.root.glob(f"step_*{suffix}"):
                shutil.rmtree(leftover)
        _suffixed(final, PARTIAL).mkdir(parents=True)

    def _commit(self, saving: Saving, written: list[dict[str, Any]]) -> None:
        manifest = {**saving.header, **_index(written)}
        partial = _suffixed(saving.folder, PARTIAL)
        with open(partial / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(manifest, file)
            _flush(file)
        _flush_folder(partial)
        if saving.folder.exists():
            saving.folder.rename(_suffixed(saving.folder, REPLACED))
        partial.rename(saving.folder)
        _flush_folder(self.root)
        shutil.rmtree(_suffixed(saving.folder, REPLACED), ignore_errors=True)
        known = complete_checkpoints(self.root)
        place = known.index(saving.folder)
        for later in known[place + 1 :]:
            _set_aside(later)
        for old in known[: place + 1][: -self.keep_last]:
            _retire(old)


def _stage(slices: list[Slice]) -> tuple[dict[str, Tensor], list[Any]]:
    """Copies in host memory, so that training may go on, and where each belongs."""
    tensors: dict[str, Tensor] = {}
    boxes = []
    for number, piece in enumerate(slices):
        key = f"{number:06d}:{piece.name}"
        tensors[key] = piece.tensor.detach().reshape(piece.size).to("cpu", copy=True).contiguous()
        boxes.append([piece.name, list(piece.shape), str(piece.tensor.dtype), key, list(piece.offset), list(piece.size)])
    return tensors, boxes


def _write_file(path: Path, tensors: dict[str, Tensor], written: dict[str, Any], failure: list[BaseException]) -> None:
    try:
        save_file(tensors, path)
        with open(path, "rb+") as file:
            _flush(file)
            written["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        _flush_folder(path.parent)
        written["file"], written["bytes"] = path.name, path.stat().st_size
    except BaseException as error:  # it is raised on every rank by `finish`
        failure.append(error)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _index(written: list[dict[str, Any]]) -> dict[str, Any]:
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


# -- loading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A saved box, and what of it a slice wants."""

    file: int
    key: str
    box: Box
    shared: Box


class Checkpoint:
    """A complete checkpoint on disk, opened for reading."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self._files: dict[int, Any] = {}

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def verify(self, layout: Layout) -> None:
        """Check every file's size and checksum, the work shared over ranks; all ranks learn of any damage."""
        damage = []
        for file in self.manifest["files"][layout.rank :: layout.world_size]:
            problem = _damage(self.folder / file["name"], file)
            if problem:
                damage.append(problem)
        found = [problem for problems in layout.everyone_has(damage) for problem in problems]
        if found:
            raise CheckpointError(
                f"checkpoint {self.folder} is damaged: {'; '.join(found)}. "
                "Restore the file, or move the folder away: the checkpoint before it is then the latest."
            )

    def fill(self, slices: Iterable[Slice], layout: Layout) -> None:
        """Fill live tensors from the saved boxes that cover them: all of them on all ranks, or, with an error, none."""
        wanted = [(piece, self._sources(piece)) for piece in slices]
        problems = [sources for _, sources in wanted if isinstance(sources, str)]
        found = [problem for rank_problems in layout.everyone_has(problems[:3]) for problem in rank_problems]
        if found:
            raise CheckpointError(f"checkpoint {self.folder} does not fit: {'; '.join(dict.fromkeys(found))}")
        with torch.no_grad():
            for piece, sources in wanted:
                target = piece.tensor.view(piece.size)
                for source in sources:
                    assert isinstance(source, Source)
                    saved = self._open(source.file).get_slice(source.key)[within(source.shared, source.box)]
                    target[within(source.shared, (piece.offset, piece.size))].copy_(saved)

    def _sources(self, piece: Slice) -> "list[Source] | str":
        """Where a slice's numbers lie, or what is wrong."""
        entry = self.manifest["tensors"].get(piece.name)
        if entry is None:
            return f"it has no tensor {piece.name}"
        if tuple(entry["shape"]) != tuple(piece.shape):
            return f"{piece.name} has shape {entry['shape']}, the model wants {list(piece.shape)}"
        if entry["dtype"] != str(piece.tensor.dtype):
            return f"{piece.name} is {entry['dtype']}, the model wants {piece.tensor.dtype}"
        sources = []
        for file, key, offset, size in entry["boxes"]:
            box = (tuple(offset), tuple(size))
            shared = overlap((piece.offset, piece.size), box)
            if shared is not None:
                sources.append(Source(file, key, box, shared))
        held, numbers = (sum(math.prod(size) for size in sizes) for sizes in ([s.shared[1] for s in sources], [piece.size]))
        return sources if held == numbers else f"it holds {held} of the {numbers} numbers wanted of {piece.name}"

    def _open(self, number: int) -> Any:
        if number not in self._files:
            path = self.folder / self.manifest["files"][number]["name"]
            try:
                self._files[number] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"checkpoint {self.folder}: {path.name} cannot be read: {error}") from error
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
