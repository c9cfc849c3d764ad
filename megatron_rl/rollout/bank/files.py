"""The few things that the bank does to files, so that what must be durable is, in the order it must be.

A file is written beside its final name and renamed: it is there whole or not at all. The folder is synchronised after a rename
or removal, or a machine that loses power could forget it.
"""

import os
from pathlib import Path

PRIVATE = 0o700  # of folders with what people asked, what a model said, and keys
BESIDE = ".partial"  # the ending of a file that is being written; a crash leaves it, the next opening removes it


def beside(path: Path) -> Path:
    return path.with_name(path.name + BESIDE)


def private_folder(path: Path) -> None:
    """Make a folder that its owner alone opens, and those above it that are missing. One that is there stays as it is."""
    for folder in reversed((path, *path.parents)):
        if not folder.is_dir():
            folder.mkdir(mode=PRIVATE, exist_ok=True)


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """All bytes: the system may take fewer at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """So many bytes at a place; fewer only at the end of the file."""
    parts = []
    while length > 0 and (part := os.pread(descriptor, length, offset)):
        parts.append(part)
        length, offset = length - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def sync(descriptor: int) -> None:
    os.fsync(descriptor)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """`source`, which is durable already, becomes `target`, durably."""
    os.replace(source, target)
    sync_file(target.parent)


def remove(path: Path) -> None:
    os.unlink(path)
    sync_file(path.parent)


def truncate(descriptor: int, length: int) -> None:
    os.ftruncate(descriptor, length)
    sync(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """A small file, whole or not at all."""
    partial = beside(path)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(descriptor, data)
        sync(descriptor)
    finally:
        os.close(descriptor)
    rename(partial, path)
