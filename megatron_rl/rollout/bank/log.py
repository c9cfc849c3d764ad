"""The log: an append-only file of frames, recovered when opened, rewritten without its dead records when a step is sealed."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_rl.config.errors import BankError
from megatron_rl.rollout.bank import files
from megatron_rl.rollout.bank.folder import FORMAT, require_format
from megatron_rl.rollout.bank.frames import Frame, Kind, frame, read_frame, read_frames, tail_after


class Log:
    """The writer's hand on the log. `durable` is how much of it is on disk for certain."""

    def __init__(self, path: Path, *, to_disk: bool = True) -> None:
        self.path = path
        self._to_disk = to_disk
        if not path.exists():
            files.write_file(path, _opening())
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.end = self.durable = 0
        self.cut = 0  # bytes of a torn tail that opening removed

    def recover(self, visit: Callable[[Frame], None]) -> None:
        """Show all whole frames, cut the torn tail, make the rest durable."""
        end = 0
        for found in read_frames(self._descriptor):
            if found.offset == 0:
                _require_opening(self.path, found)
            end = found.end
            visit(found)
        if end == 0:
            raise BankError(f"{self.path} is not the log of a bank, or its beginning is damaged. Restore it from a copy.")
        tail = tail_after(self._descriptor, end)
        if tail.lost:
            raise BankError(
                f"{self.path} is damaged at byte {end:,}, in records that had been safely written: the disk lost them. Restore "
                f"the file from a copy, or give up everything behind by cutting it there: truncate -s {end} {self.path}"
            )
        if tail.torn:
            files.truncate(self._descriptor, end)
        self.cut, self.end = tail.torn, end
        self.sync()

    def append(self, records: Sequence[tuple[Kind, bytes]]) -> list[int]:
        """Write frames at the end; returns where each begins. They are finished after `sync`."""
        offsets, frames = [], []
        end = self.end
        for kind, payload in records:
            offsets.append(end)
            frames.append(frame(kind, payload, self.durable))
            end += len(frames[-1])
        os.lseek(self._descriptor, self.end, os.SEEK_SET)
        for data in frames:
            files.write_all(self._descriptor, data)
        self.end = end
        return offsets

    def sync(self) -> None:
        if self._to_disk:
            files.sync(self._descriptor)
        self.durable = self.end

    def read(self, offset: int) -> bytes:
        """The payload of the frame at a place. Raises BankError if the disk does not give back what was written."""
        return _payload(self._descriptor, offset, self.end, self.path)

    def rewrite(self, offsets: Iterable[int]) -> dict[int, int]:
        """Keep these frames alone, in their order: in a new file that takes the name of the old one. New places by old."""
        partial = files.beside(self.path)
        fresh = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        moved: dict[int, int] = {}
        try:
            opening = _opening()
            files.write_all(fresh, opening)
            end = len(opening)
            for offset in offsets:
                kept = read_frame(self._descriptor, offset, self.end)
                if kept is None:
                    raise _damaged(self.path, offset)
                data = frame(kept.kind, kept.payload, end)  # all before it is durable before the file gets its name
                files.write_all(fresh, data)
                moved[offset] = end
                end += len(data)
            files.sync(fresh)
            files.rename(partial, self.path)
        except BaseException:
            os.close(fresh)
            raise
        os.close(self._descriptor)
        self._descriptor, self.end, self.durable = fresh, end, end
        return moved

    def close(self) -> None:
        os.close(self._descriptor)


class LogView:
    """A reader's view of a log that another process may be writing: whole frames, and nothing is changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path.exists() else None

    def frames(self) -> Iterator[Frame]:
        if self._descriptor is not None:
            for found in read_frames(self._descriptor):
                if found.offset == 0:
                    _require_opening(self._path, found)
                yield found

    def read(self, offset: int) -> bytes:
        assert self._descriptor is not None, "an offset was given out, so there is a file"
        return _payload(self._descriptor, offset, os.fstat(self._descriptor).st_size, self._path)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _opening() -> bytes:
    return frame(Kind.OPENING, json.dumps({"format": FORMAT}).encode(), 0)


def _require_opening(path: Path, first: Frame) -> None:
    if first.kind != Kind.OPENING:
        raise BankError(f"{path} does not begin as the log of a bank. Restore it from a copy.")
    require_format(path, json.loads(first.payload).get("format"))


def _payload(descriptor: int, offset: int, size: int, path: Path) -> bytes:
    found = read_frame(descriptor, offset, size)
    if found is None:
        raise _damaged(path, offset)
    return found.payload


def _damaged(path: Path, offset: int) -> BankError:
    return BankError(f"{path}: the record at byte {offset:,} is damaged: the disk does not give back what was written.")
