"""Checkpoints of ranks that train: every rank writes and reads its own part, and all learn of what fails on one.

The format is that of `weights.checkpoint_files`.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config.errors import CheckpointError
from megatron_rl.policy.layout import Layout
from megatron_rl.weights.boxes import Slice
from megatron_rl.weights.checkpoint_files import (
    PARTIAL,
    CheckpointFiles,
    SavedBox,
    complete_checkpoints,
    put_in_place,
    rank_file,
    remove_halves,
    retire,
    set_aside,
    step_folder,
    suffixed,
    write_manifest,
    write_rank_file,
)


def on_main(layout: Layout, action: Callable[[], None], problem: str) -> None:
    """Rank 0 does something to files; all ranks learn whether it went well."""
    failure = None
    if layout.is_main:
        try:
            action()
        except (OSError, ValueError) as error:
            failure = f"{problem}: {error!r}. Earlier checkpoints are untouched."
    found = layout.everyone_has(failure)[0]
    if found:
        raise CheckpointError(found)


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
        on_main(self.layout, lambda: self._prepare(final), f"{final} cannot be written")
        boxes, tensors = _stage(slices)
        written: dict[str, Any] = {}
        failure: list[BaseException] = []
        path = suffixed(final, PARTIAL) / rank_file(self.layout.rank)
        thread = threading.Thread(target=_write, args=(path, boxes, tensors, written, failure), name=f"save {final.name}")
        self._saving = Saving(step, final, {"step": step, **header}, thread, written, failure)
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
        on_main(self.layout, lambda: self._commit(saving, written), f"{saving.folder} was not saved")

    def _prepare(self, final: Path) -> None:
        remove_halves(self.root)
        suffixed(final, PARTIAL).mkdir(parents=True)

    def _commit(self, saving: Saving, written: list[dict[str, Any]]) -> None:
        write_manifest(suffixed(saving.folder, PARTIAL), saving.header, written)
        put_in_place(saving.folder)
        known = complete_checkpoints(self.root)
        place = known.index(saving.folder)
        for later in known[place + 1 :]:
            set_aside(later)
        for old in known[: place + 1][: -self.keep_last]:
            retire(old)


def _stage(slices: Iterable[Slice]) -> tuple[list[SavedBox], list[Tensor]]:
    """Where each tensor that this rank saves belongs, and copies in host memory, so that training may go on."""
    kept = sorted((piece for piece in slices if piece.saved_here), key=lambda piece: -piece.tensor.element_size())
    boxes = [SavedBox(p.name, tuple(p.shape), p.tensor.dtype, tuple(p.offset), tuple(p.size)) for p in kept]
    return boxes, [p.tensor.detach().reshape(p.size).to("cpu", copy=True).contiguous() for p in kept]


def _write(
    path: Path, boxes: list[SavedBox], tensors: list[Tensor], written: dict[str, Any], failure: list[BaseException]
) -> None:
    try:
        written |= write_rank_file(path, boxes, ([tensor] for tensor in tensors))
    except BaseException as error:  # it is raised on every rank by `finish`
        failure.append(error)


# -- loading -----------------------------------------------------------------------------------------------------------


class Checkpoint(CheckpointFiles):
    """A complete checkpoint, to be loaded by ranks together."""

    def verify(self, layout: Layout) -> None:
        """Check every file's size and checksum, the work shared over ranks; all ranks learn of any damage."""
        damage = self.damage(self.manifest["files"][layout.rank :: layout.world_size])
        found = [problem for problems in layout.everyone_has(damage) for problem in problems]
        if found:
            raise CheckpointError(
                f"checkpoint {self.folder} is damaged: {'; '.join(found)}. "
                "Restore the file, or move the folder away: the checkpoint before it is then the latest."
            )

    def fill(self, slices: Iterable[Slice], layout: Layout, *, any_format: bool = False) -> None:
        """Fill live tensors from the saved boxes that cover them: all of them on all ranks, or, with an error, none.

        Number formats must be the same, unless `any_format` takes numbers as first weights, rounded where they must be.
        """
        wanted = []
        for piece in slices:
            dtype = None if any_format else piece.tensor.dtype
            wanted.append((piece, self.sources(piece.name, piece.shape, dtype, (piece.offset, piece.size))))
        problems = [sources for _, sources in wanted if isinstance(sources, str)]
        found = [problem for rank_problems in layout.everyone_has(problems[:3]) for problem in rank_problems]
        if found:
            raise CheckpointError(f"checkpoint {self.folder} does not fit: {'; '.join(dict.fromkeys(found))}")
        with torch.no_grad():
            for piece, sources in wanted:
                assert not isinstance(sources, str)
                self.fill_box(sources, (piece.offset, piece.size), piece.tensor.view(piece.size))
