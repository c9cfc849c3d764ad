"""The one thread that changes the log: it gathers what has come in, writes it, synchronises once, reports all of it finished.

While one batch is being synchronised the next gathers, so a slow disk makes batches larger, not sampling slower.
"""

import queue
import threading
import time
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from megatron_rl.config.errors import BankError
from megatron_rl.rollout.bank.codec import peek
from megatron_rl.rollout.bank.frames import Kind
from megatron_rl.rollout.bank.index import Entry, Index
from megatron_rl.rollout.bank.log import Log

BATCH_BYTES = 64 << 20  # of payload that wait for one synchronisation


@dataclass(frozen=True)
class Record:
    """Something to write. `encode` runs in the thread, so that an event loop does not wait for it."""

    kind: Kind
    key: str
    encode: Callable[[], bytes]
    future: "Future[None]"


@dataclass(frozen=True)
class Call:
    """Something to run between batches."""

    function: Callable[[], Any]
    future: "Future[Any]"


class Committer:
    """`refuse(record)` says why a record may not be written, given the index, or nothing."""

    def __init__(
        self, log: Log, index: Index, lock: threading.RLock, refuse: Callable[[Record], str | None], gather_seconds: float
    ) -> None:
        self._log, self._index, self._lock, self._refuse = log, index, lock, refuse
        self._gather_seconds = gather_seconds
        self._inbox: queue.SimpleQueue[Record | Call | None] = queue.SimpleQueue()
        self._broken: BankError | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="bank", daemon=True)
        self._thread.start()

    def record(self, kind: Kind, key: str, encode: Callable[[], bytes]) -> "Future[None]":
        future: Future[None] = Future()
        self._put(Record(kind, key, encode, future))
        return future

    def call[Result](self, function: Callable[[], Result]) -> Result:
        """Run something between batches, and wait for it."""
        future: Future[Result] = Future()
        self._put(Call(function, future))
        return future.result()

    def close(self) -> None:
        """Write what has come in, and end."""
        if not self._closed:
            self._closed = True
            self._inbox.put(None)
        self._thread.join()

    def _put(self, job: Record | Call) -> None:
        if self._closed:
            raise BankError("the bank is closed: nothing can be kept in it any more.")
        self._inbox.put(job)

    def _work(self) -> None:
        going = True
        while going:
            *records, last = self._gather()
            self._commit([*records, last] if isinstance(last, Record) else records)
            if isinstance(last, Call):
                self._run(last)
            going = last is not None

    def _gather(self) -> list[Any]:
        """What is there, or comes in within the time for it: records, the last job perhaps a call or the end."""
        jobs: list[Any] = [self._inbox.get()]
        deadline = time.monotonic() + self._gather_seconds
        while isinstance(jobs[-1], Record):
            try:
                jobs.append(self._inbox.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
        return jobs

    def _commit(self, records: Sequence[Record]) -> None:
        """Write in batches that fit in memory. A record that cannot be kept is told so; the others go on."""
        batch: list[tuple[Record, bytes]] = []
        finishing: set[str] = set()  # keys of the batch's groups
        size = 0
        for record in records:
            if record.future.set_running_or_notify_cancel():  # nobody waits for what was cancelled before it was written
                payload = self._encoded(record, finishing)
                if payload is not None:
                    batch.append((record, payload))
                    finishing |= {record.key} if record.kind == Kind.GROUP else set()
                    size += len(payload)
            if size >= BATCH_BYTES:
                self._write(batch)
                batch, finishing, size = [], set(), 0
        if batch:
            self._write(batch)

    def _encoded(self, record: Record, finishing: Container[str]) -> bytes | None:
        try:
            if self._broken is not None:
                raise self._broken
            with self._lock:
                reason = f"group {record.key} is being finished already." if record.key in finishing else self._refuse(record)
            if reason is not None:
                raise BankError(reason)
            return record.encode()
        except Exception as error:
            record.future.set_exception(error)
            return None

    def _write(self, batch: Sequence[tuple[Record, bytes]]) -> None:
        try:
            offsets = self._log.append([(record.kind, payload) for record, payload in batch])
            self._log.sync()
            with self._lock:
                for (record, payload), offset in zip(batch, offsets, strict=True):
                    self._enter(record, payload, offset)
        except Exception as error:
            self._broken = _broken(self._log, error)
            for record, _ in batch:
                record.future.set_exception(self._broken)
            return
        for record, _ in batch:
            record.future.set_result(None)

    def _enter(self, record: Record, payload: bytes, offset: int) -> None:
        if record.kind == Kind.DISCARD:
            self._index.discard(record.key)
        else:
            _, step, rewards = peek(payload)
            self._index.put(record.kind, record.key, Entry(offset, step, rewards))

    def _run(self, call: Call) -> None:
        try:
            if self._broken is not None:
                raise self._broken
            call.future.set_result(call.function())
        except OSError as error:
            self._broken = _broken(self._log, error)
            call.future.set_exception(self._broken)
        except Exception as error:
            call.future.set_exception(error)


def _broken(log: Log, error: Exception) -> BankError:
    """After a failed write or synchronisation nobody knows what is on the disk: only opening the log again tells."""
    return BankError(
        f"{log.path} cannot be written: {error}. What was reported as finished is safe. Make room or mend the disk, "
        "and start again."
    )
