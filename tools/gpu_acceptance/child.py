"""One part, in this process: are its needs met, what does it find, how does it end. The program starts it for each part.

python -m tools.gpu_acceptance.child "ratio bfloat16" --out FOLDER [--smoke]
"""

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_acceptance.parts import PARTS, Part
from tools.gpu_acceptance.results import Finding, Results

ROOT = Path(__file__).parents[2]
TAIL = 6  # lines of an error's trace that are kept beside its message
REASON = 2000  # characters of it


def child_command(part: Part, folder: Path, smoke: bool, launcher: Sequence[str] = ()) -> list[str]:
    """What starts a part in a process of its own, or by a launcher in several."""
    words = ["-m", "tools.gpu_acceptance.child", part.name, f"--out={folder}", *(["--smoke"] if smoke else [])]
    return [sys.executable, *launcher, *words]


class Skip(Exception):
    """A part that cannot be tried here, and why."""


@dataclass(frozen=True)
class Task:
    """What a part is asked."""

    variant: str  # what is behind the first word of its name
    smoke: bool  # at a tiny size
    folder: Path  # what it leaves for other parts
    scratch: Path  # what is gone after it


type Work = Callable[[Task], Iterator[Finding]]


def perform(part: Part, folder: Path, smoke: bool) -> None:
    """Try the part; whatever happens is written down, beginning and end."""
    results, began = Results(folder), time.monotonic()
    results.begin(part.name, smoke)
    try:
        where = require(part, folder, smoke)
    except Skip as reason:
        results.end(part.name, "skipped", reason=str(reason), seconds=time.monotonic() - began, smoke=smoke)
        return
    try:
        if part.ranks > 1:
            _on_ranks(part, folder, smoke)
        else:
            _try(part, folder, smoke, results)
    except Skip as reason:
        results.end(part.name, "skipped", reason=str(reason), seconds=time.monotonic() - began, where=where, smoke=smoke)
    except Exception as error:  # the part's own affair: it is told, and other parts go on
        traceback.print_exc()
        told = f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-TAIL:])}"
        results.end(part.name, "failed", reason=told[:REASON], seconds=time.monotonic() - began, where=where, smoke=smoke)
    else:
        results.end(part.name, "done", seconds=time.monotonic() - began, where=where, smoke=smoke)


def require(part: Part, folder: Path, smoke: bool) -> str:
    """Where the part runs: the GPU's name, or CPU. Skip, if something that it needs is not there."""
    missing = [name for name in part.packages if not _installed(name)]
    if missing:
        raise Skip(f"not installed here: {', '.join(missing)}")
    if part.reads is not None and not (folder / part.reads).exists():
        raise Skip(f"{part.reads} is not in {folder}: the part `reference` has to be done there first")
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_cpu = there == 0 and smoke and "transformer_engine" not in part.packages
    if there < part.gpus and not on_cpu:
        told = f"it takes {part.gpus} GPUs, and there is one" if there else "there is no GPU here: torch sees none"
        raise Skip(told)
    return torch.cuda.get_device_name(0) if there else "CPU"


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _try(part: Part, folder: Path, smoke: bool, results: Results | None) -> None:
    module, _, function = part.work.partition(":")
    work: Work = getattr(importlib.import_module(f"tools.gpu_acceptance.{module}"), function)
    with tempfile.TemporaryDirectory(prefix="gpu-acceptance-") as scratch:
        for finding in work(Task(part.variant, smoke, folder, Path(scratch))):
            if results is not None:
                results.add(part.name, finding)


def _on_ranks(part: Part, folder: Path, smoke: bool) -> None:
    """The part on several ranks, by torchrun; the first writes down what is found."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={part.ranks}")
    command = child_command(part, folder, smoke, launcher)
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        raise RuntimeError(f"torchrun ended with {code}; the log says why")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS, metavar="PART")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    part = PARTS[options.part]
    rank = os.environ.get("RANK")
    if rank is None:
        perform(part, options.out, options.smoke)
    else:  # one of a part's ranks: the process that started torchrun tells how it ended
        _try(part, options.out, options.smoke, Results(options.out) if rank == "0" else None)


if __name__ == "__main__":
    main()
