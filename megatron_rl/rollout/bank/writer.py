"""The bank as its one writer sees it."""

import asyncio
import json
import logging
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from megatron_rl.config.data_settings import BankSettings
from megatron_rl.config.errors import BankError
from megatron_rl.rollout.bank import files
from megatron_rl.rollout.bank.codec import decode_group, encode_group, to_json
from megatron_rl.rollout.bank.committer import Committer, Record
from megatron_rl.rollout.bank.folder import Folder
from megatron_rl.rollout.bank.frames import Kind
from megatron_rl.rollout.bank.index import Index
from megatron_rl.rollout.bank.lock import WriterLock
from megatron_rl.rollout.bank.log import Log
from megatron_rl.rollout.bank.schema import Decode
from megatron_rl.rollout.bank.sealed import SealedStep, write_step
from megatron_rl.types import Group

logger = logging.getLogger(__name__)


class Bank:
    """Open it in one process at a time; any thread of that process may use it.

    `add` (asyncio), `append` (waits) and `submit` (a future) keep a finished group. When they are done the group is durable:
    neither a kill nor a loss of power takes it away. A group's key is unique; keeping one twice is an error.
    """

    def __init__(self, path: Path, settings: BankSettings | None = None, *, tokenizer: str | None = None) -> None:
        """Open or make the bank. What a crash left is mended here: a torn tail is cut, a sealing is ended or undone.

        `tokenizer` is noted in a new bank, for commands that decode it.
        """
        settings = settings or BankSettings()
        self.path, self._settings, self._folder = path, settings, Folder(path)
        files.private_folder(path)
        self._writer_lock = WriterLock(self._folder.lock)
        try:
            self.tokenizer = self._folder.create(tokenizer).get("tokenizer")
            self._folder.remove_partial_files()
            self._index, self._lock, self._sealing = Index(), threading.RLock(), threading.Lock()
            self._log = Log(self._folder.log, to_disk=settings.durable_against == "power_loss")
            self._log.recover(self._index.take)
            if self.torn_bytes:
                logger.warning("%s: a crash left %d bytes of an unfinished record, now cut", self._folder.log, self.torn_bytes)
            self._sealed = _sealed_keys(self._folder)
            self._index.drop_groups(self._sealed)
            self._compact()
            self._retain()
            self._committer = Committer(self._log, self._index, self._lock, self._refusal, settings.gather_seconds)
        except BaseException:
            self._writer_lock.release()
            raise

    # -- keeping -------------------------------------------------------------------------------------------------------

    def submit(self, group: Group) -> "Future[None]":
        """Keep a finished group; the future is done when it is durable."""
        if not group.samples:
            raise BankError(f"group {group.key} cannot be kept: it has no samples.")
        return self._committer.record(Kind.GROUP, group.key, partial(encode_group, group))

    async def add(self, group: Group) -> None:
        """Keep a finished group; returns when it is durable."""
        await asyncio.wrap_future(self.submit(group))

    def append(self, group: Group) -> None:
        """Keep a finished group; returns when it is durable."""
        self.submit(group).result()

    def carry(self, group: Group) -> "Future[None]":
        """Keep a group with unfinished responses, which go on in a later step. The last of a key counts, until finished."""
        return self._committer.record(Kind.CARRY, group.key, partial(encode_group, group))

    def discard(self, key: str, reason: str) -> "Future[None]":
        """Give up a waiting or carried group, which nobody will learn from."""
        return self._committer.record(Kind.DISCARD, key, lambda: to_json({"key": key, "reason": reason}, key).encode())

    # -- looking -------------------------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        """Is this group finished, sealed or not?"""
        with self._lock:
            return key in self._index.groups or key in self._sealed

    @property
    def torn_bytes(self) -> int:
        """What opening cut off the log: responses that nobody had been told are finished."""
        return self._log.cut

    def waiting(self, step: int | None = None) -> list[str]:
        """Keys of groups that are finished and not sealed, of a step or of all, in the order in which they were finished."""
        with self._lock:
            return [key for key, entry in self._index.groups.items() if step in (None, entry.step)]

    def carried(self) -> list[str]:
        """Keys of groups that go on."""
        with self._lock:
            return list(self._index.carries)

    def read(self, key: str) -> Group:
        """A waiting or carried group."""
        with self._lock:
            entry = self._index.groups.get(key) or self._index.carries.get(key)
            if entry is None:
                raise BankError(f"{self.path} has no waiting and no carried group {key}.")
            return decode_group(self._log.read(entry.offset))

    def sealed_steps(self) -> list[int]:
        return list(self._folder.sealed())

    def sealed(self, step: int) -> SealedStep:
        """A step to read from. Close it after use."""
        return open_step(self._folder, step)

    # -- sealing -------------------------------------------------------------------------------------------------------

    def seal(self, step: int, keys: Iterable[str] | None = None, *, decode: Decode | None = None) -> None:
        """Seal a training step: its groups go from the log into a Parquet file, all or none.

        By default those that were sampled for it; with `keys`, exactly those, whatever they were sampled for. Steps are sealed
        in rising order. `decode` turns token ids into text, for the columns of texts. Groups go on being kept meanwhile.
        """
        with self._sealing:
            last = max(self.sealed_steps(), default=-1)
            if step <= last:
                raise BankError(f"{self.path}: step {step} cannot be sealed: step {last} is. Steps are sealed in rising order.")
            chosen = self.waiting(step) if keys is None else list(dict.fromkeys(keys))
            with self._lock:
                absent = [key for key in chosen if key not in self._index.groups]
                if absent or not chosen:
                    what = f"group {absent[0]} is not waiting" if absent else "no finished group is waiting for it"
                    raise BankError(f"{self.path}: step {step} cannot be sealed: {what}.")
                rewards = {name for key in chosen for name in self._index.groups[key].rewards}
            path = self._folder.step(step)
            write_step(files.beside(path), step, self._groups(chosen), rewards, decode)
            self._committer.call(partial(self._finish_sealing, path, chosen))

    def _groups(self, keys: Iterable[str]) -> Iterator[Group]:
        """One at a time. Only a sealing moves records, and this is one."""
        for key in keys:
            yield self.read(key)

    def _finish_sealing(self, path: Path, keys: list[str]) -> None:
        """From the rename on the step is sealed. A crash before it leaves the log, one after it both, and opening knows."""
        files.rename(files.beside(path), path)
        with self._lock:
            self._sealed.update(keys)
            self._index.drop_groups(set(keys))
            self._compact()
        self._retain()

    def _compact(self) -> None:
        if self._index.dead:
            self._index.move(self._log.rewrite(self._index.offsets()))

    def _retain(self) -> None:
        """Remove the oldest steps beyond the limits. The newest always stays."""
        steps = list(self._folder.sealed().values())
        sizes = {path: path.stat().st_size for path in steps}
        while len(steps) > 1 and self._too_much(len(steps), sum(sizes[path] for path in steps)):
            files.remove(steps.pop(0))

    def _too_much(self, steps: int, size: int) -> bool:
        most_steps, most_bytes = self._settings.keep_steps, self._settings.keep_bytes
        return (most_steps is not None and steps > most_steps) or (most_bytes is not None and size > most_bytes)

    def _refusal(self, record: Record) -> str | None:
        """Why a record may not be written."""
        if record.kind == Kind.DISCARD:
            known = record.key in self._index.groups or record.key in self._index.carries
            return None if known else f"group {record.key} cannot be discarded: it is neither waiting nor carried."
        return f"group {record.key} is finished already: keys are unique." if record.key in self else None

    # -- ending --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Keep what was submitted, and let go."""
        with self._sealing:
            self._committer.close()
            self._log.close()
            self._writer_lock.release()

    def __enter__(self) -> "Bank":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_step(folder: Folder, step: int) -> SealedStep:
    """A sealed step, or the error that says which there are."""
    steps = folder.sealed()
    if step not in steps:
        there = f"It has {json.dumps(sorted(steps))[1:-1]}." if steps else "No step is sealed yet."
        raise BankError(f"{folder.path} has no sealed step {step}. {there}")
    return SealedStep(steps[step])


def _sealed_keys(folder: Folder) -> set[str]:
    keys: set[str] = set()
    for path in folder.sealed().values():
        with SealedStep(path) as sealed:
            keys.update(sealed.keys())
    return keys
