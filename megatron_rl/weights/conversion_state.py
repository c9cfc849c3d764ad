"""What a conversion knows of itself between one start and the next: its description, and which of its files are whole.

It lies inside the folder that is being written, in a folder of its own that is gone when the conversion ends.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from megatron_rl.config.errors import CheckpointError
from megatron_rl.weights.checkpoint_files import flush, flush_folder

FOLDER, DESCRIPTION = ".conversion", "conversion.json"


class ConversionState:
    """The partial folder of a conversion, held by one process as long as it is entered.

    What an earlier start left there is kept when its description was the same, and removed when it was another.
    """

    def __init__(self, partial: Path, description: Mapping[str, Any]) -> None:
        self.partial = partial
        self.description = json.loads(json.dumps(description))
        self.found: bool | None = None  # an earlier start's work: kept (True), removed (False), or none was there

    def __enter__(self) -> Self:
        try:
            (self.partial / FOLDER).mkdir(parents=True, exist_ok=True)
            self._lock = open(self.partial / FOLDER / "lock", "w")  # open as long as this is entered
        except OSError as error:
            raise CheckpointError(f"{self.partial} cannot be made: {error.strerror}. Name another folder with --to.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise CheckpointError(f"{self.partial} is being written by another conversion. Wait for it, or end it.") from error
        self._take_up()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _take_up(self) -> None:
        path = self.partial / FOLDER / DESCRIPTION
        leftovers = [each for each in self.partial.iterdir() if each.name != FOLDER]
        known = path.is_file() and json.loads(path.read_text(encoding="utf-8")) == self.description
        if path.is_file() or leftovers:
            self.found = known
        for each in leftovers:
            if not (known and self.is_whole(each.name)):
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        if not known:
            for record in (self.partial / FOLDER).glob("*.json"):
                record.unlink()
            _write_json(path, self.description)

    def is_whole(self, name: str) -> bool:
        """Was this file written to its end?"""
        return (self.partial / name).is_file() and _record(self.partial, name).is_file()

    def record(self, name: str) -> dict[str, Any]:
        """What its writer said of a file."""
        found: dict[str, Any] = json.loads(_record(self.partial, name).read_text(encoding="utf-8"))
        return found

    def end(self) -> None:
        """All is written: from here on the folder is what it shall become."""
        shutil.rmtree(self.partial / FOLDER)


def write_whole(partial: Path, name: str, write: Callable[[Path], Mapping[str, Any]]) -> None:
    """Write a file of the folder under another name, and give it its own when it is whole."""
    unfinished = partial / f".{name}.{os.getpid()}"
    record = write(unfinished)
    unfinished.rename(partial / name)
    _write_json(_record(partial, name), record)


def _record(partial: Path, name: str) -> Path:
    return partial / FOLDER / f"{name}.json"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump(content, file)
        flush(file)
    unfinished.rename(path)
    flush_folder(path.parent)
