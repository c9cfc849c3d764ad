"""Parts one after another, each in a process of its own that has its time and no more."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tools.gpu_acceptance.child import ROOT, child_command
from tools.gpu_acceptance.parts import Part
from tools.gpu_acceptance.results import Outcome, Results, State

LOG = "log.txt"
GRACE = 20.0  # seconds that a part which is told to end gets for its servers


def todo(parts: Sequence[Part], folder: Path, again: bool) -> list[Part]:
    """Those that are not done, or whose file is gone. What was skipped or failed is tried anew: the machine may be another."""
    done = {name for name, outcome in Results(folder).read().items() if outcome.state == "done"}
    read = {part.reads for part in parts if part.reads is not None}
    return [
        part
        for part in parts
        if part.name not in done
        or (part.writes is not None and not (folder / part.writes).exists())
        or (again and part.writes not in read)
    ]


def run_part(part: Part, folder: Path, smoke: bool, seconds: float | None = None) -> Outcome:
    """Start the part and see it end, by itself or at its limit (or after so many seconds, if that is sooner)."""
    results = Results(folder)
    results.begin(part.name, smoke)  # it may be ended before it can say so itself
    allowed = part.limit if seconds is None else min(part.limit, seconds)
    began = time.monotonic()
    command = child_command(part, folder, smoke)
    with open(folder / LOG, "ab") as log:
        log.write(f"\n==== {part.name}\n".encode())
        log.flush()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **part.environment}
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = child.wait(allowed)
        except subprocess.TimeoutExpired:
            _end(child)
            why = f"it took longer than {allowed:.0f} s and was ended"
            state: State = "failed" if allowed >= part.limit else "interrupted"
            results.end(part.name, state, reason=why, seconds=time.monotonic() - began, smoke=smoke)
        except BaseException:
            _end(child)
            raise
        else:
            if results.read()[part.name].state == "interrupted":
                why = f"its process ended with {code} and without a word; {LOG} has what it printed"
                results.end(part.name, "failed", reason=why, seconds=time.monotonic() - began, smoke=smoke)
    return results.read()[part.name]


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the part with all that it started."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    child.wait()
