"""Programs that the doctor runs in processes of their own: what they say, how long they may take, how they end.

They write findings as lines of JSON into a file, since upstream packages print what they like on standard output. What was
written before an end counts, however that end came.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAST_WORDS = 2000  # characters of a process's last words that are worth reading


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it had written."""

    code: int | None  # None: it took too long and was ended
    lines: tuple[dict[str, Any], ...]
    words: str  # the end of its standard output and error
    seconds: float

    @property
    def well(self) -> bool:
        return self.code == 0

    @property
    def how(self) -> str:
        """In words, with the line that tells most."""
        last = [line.strip() for line in self.words.splitlines() if line.strip()][-1:]
        said = f": {last[0][:300]}" if last else ""
        if self.code is None:
            return f"it was not done after {self.seconds:.0f} s{said}"
        if self.code < 0:
            return f"it was killed by {signal.Signals(-self.code).name}{said}"
        return f"it ended with code {self.code}{said}"


class Lines:
    """Where such a program writes to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, line: Mapping[str, Any]) -> None:
        """At once: the next thing done may end this process."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run_apart(module: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], seconds: float) -> list[Ended]:
    """`python -m MODULE FILE ARGUMENTS`, once for each environment and all at the same time."""
    with tempfile.TemporaryDirectory(prefix="megatron-rl-doctor-") as name, ExitStack() as stack:
        started, processes = time.monotonic(), []
        for number, environment in enumerate(environments):
            words = stack.enter_context((Path(name) / f"words{number}").open("wb"))
            command = [sys.executable, "-m", module, str(Path(name) / f"lines{number}"), *arguments]
            processes.append(
                subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=words, stderr=words)
            )
        try:
            codes = [_code(process, started + seconds) for process in processes]
        finally:
            _end(processes)
        took = time.monotonic() - started
        return [
            Ended(code, tuple(_lines(Path(name) / f"lines{number}")), _tail(Path(name) / f"words{number}"), took)
            for number, code in enumerate(codes)
        ]


def _code(process: "subprocess.Popen[bytes]", deadline: float) -> int | None:
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _end(processes: Iterable["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines: the last may have been cut off."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def _tail(path: Path) -> str:
    return path.read_bytes()[-LAST_WORDS:].decode(errors="replace")
