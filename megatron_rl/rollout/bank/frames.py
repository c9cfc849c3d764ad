"""Frames: how the log tells whole records from torn ones.

    frame = "mRLb" | kind u8 | 3 zero bytes | durable u64 | payload length u64 | CRC-32 of it and the payload u32 | payload

Little-endian. `durable` is how much of the file was synchronised when the frame was written. After a crash the file may end in
anything: what follows the last whole frame was never reported as finished and is cut. A broken frame that lies *before* the
`durable` of a later one is another thing: it was reported, and the disk lost it. That is never cut silently.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from megatron_rl.rollout.bank.files import read_at

MARK = b"mRLb"
HEAD = struct.Struct("<4sB3xQQ")
SUM = struct.Struct("<I")
OVERHEAD = HEAD.size + SUM.size
BLOCK = 1 << 20  # bytes searched at a time for a frame behind a broken one


class Kind(IntEnum):
    """What a frame holds."""

    OPENING = 0  # first in the file: the version of the format
    GROUP = 1  # a finished group
    CARRY = 2  # a group with responses that go on in a later step; the last of a key counts
    DISCARD = 3  # a key that is given up, and why


class Frame(NamedTuple):
    """Where a whole frame lies, and what is in it."""

    kind: int
    offset: int
    length: int  # of the whole frame
    durable: int
    payload: bytes

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True)
class Tail:
    """How a log ends: where whole frames end, how much follows, and whether some of that had been durable."""

    end: int
    torn: int
    lost: bool


def frame(kind: int, payload: bytes, durable: int) -> bytes:
    head = HEAD.pack(MARK, kind, durable, len(payload))
    return b"".join((head, SUM.pack(zlib.crc32(payload, zlib.crc32(head))), payload))


def read_frame(descriptor: int, offset: int, size: int) -> Frame | None:
    """The frame at a place of a file of so many bytes; None if there is no whole one."""
    head = read_at(descriptor, OVERHEAD, offset)
    if len(head) < OVERHEAD:
        return None
    mark, kind, durable, length = HEAD.unpack_from(head)
    if mark != MARK or length > size - offset - OVERHEAD:
        return None
    payload = read_at(descriptor, length, offset + OVERHEAD)
    (checksum,) = SUM.unpack_from(head, HEAD.size)
    if len(payload) < length or zlib.crc32(payload, zlib.crc32(head[: HEAD.size])) != checksum:
        return None
    return Frame(kind, offset, OVERHEAD + length, durable, payload)


def read_frames(descriptor: int, start: int = 0) -> Iterator[Frame]:
    """Whole frames from a place on, up to the first that is not."""
    size = os.fstat(descriptor).st_size
    while (found := read_frame(descriptor, start, size)) is not None:
        yield found
        start = found.end


def tail_after(descriptor: int, end: int) -> Tail:
    """What follows the last whole frame, which ends at `end`."""
    size = os.fstat(descriptor).st_size
    lost = any(later.durable > end for later in _frames_behind(descriptor, end, size))
    return Tail(end, size - end, lost)


def _frames_behind(descriptor: int, start: int, size: int) -> Iterator[Frame]:
    """Whole frames anywhere behind a broken one."""
    while start < size:
        block = read_at(descriptor, BLOCK + len(MARK) - 1, start)
        found = -1
        while (found := block.find(MARK, found + 1)) >= 0:
            whole = read_frame(descriptor, start + found, size)
            if whole is not None:
                yield whole
        start += BLOCK
