"""Files of JSON lines that one process appends to and any number read meanwhile.

A line is written at once and ends in a newline: a kill leaves at most a last line without one, which readers pass over and the
next writer cuts. Numbers that are not finite are null, since JSON has none.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_rl.rollout.bank import files

type Line = dict[str, Any]


def append(path: Path, line: Line) -> None:
    """Add a line."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        files.write_all(descriptor, encode(line))
    finally:
        os.close(descriptor)


def read(path: Path) -> Iterator[Line]:
    """Whole lines, in order; none of a file that is not there yet."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for data in file:
            if data.endswith(b"\n"):
                yield json.loads(data)


def keep(path: Path, wanted: Callable[[Line], bool]) -> None:
    """Remove the lines that are not wanted, and a torn end. The file is replaced as a whole, or left as it is."""
    if not path.exists():
        return
    before = path.read_bytes()
    kept = b"".join(data for data in before.splitlines(keepends=True) if data.endswith(b"\n") and wanted(json.loads(data)))
    if kept != before:
        files.write_file(path, kept)


def encode(line: Line) -> bytes:
    """A line as it stands in the file."""
    return (json.dumps(strict(line), allow_nan=False, separators=(",", ":")) + "\n").encode()


def strict(value: Any) -> Any:
    """The same in values that JSON knows."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: strict(inner) for name, inner in value.items()}
        case list() | tuple():
            return [strict(inner) for inner in value]
        case _:
            return value
