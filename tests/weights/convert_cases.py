"""What tests of conversion share: checkpoints that can be FP8, folders compared, and conversions killed at chosen instants."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.weights.convert import Conversion, convert

# A DeepSeek-V3 whose widths blocks of 128 fit, but for its last rows and columns.
WIDE: Mapping[str, Any] = {
    "hidden_size": 320,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "num_hidden_layers": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, by the library."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def require_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def quietly(conversion: Conversion, **options: Any) -> list[str]:
    """Convert; what was told."""
    told: list[str] = []
    convert(conversion, tell=told.append, **options)
    return told


class Events:
    """Counts what a conversion does to the disk, and kills the process with -9 at one of these instants."""

    def __init__(self, fatal: int | None) -> None:
        self.fatal = fatal
        self.count = 0

    def happens(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def instrumented(*arguments: Any, **options: Any) -> Any:
            self.happens()
            result = function(*arguments, **options)
            self.happens()
            return result

        return instrumented


def convert_and_die(conversion: Conversion, overwrite: bool, fatal: int | None, report: Any) -> None:
    """In a process of its own: a conversion that is killed at an instant, or counts them."""
    events = Events(fatal)
    os.pwrite = events.around(os.pwrite)
    os.fsync = events.around(os.fsync)
    Path.rename = events.around(Path.rename)  # type: ignore[method-assign]
    Path.unlink = events.around(Path.unlink)  # type: ignore[method-assign]
    shutil.rmtree = events.around(shutil.rmtree)  # type: ignore[assignment]
    convert(conversion, overwrite=overwrite, tell=lambda _: None)
    report.send(events.count)


def convert_in_two_and_die(conversion: Conversion, overwrite: bool, fatal: int | None, report: Any) -> None:
    """The same with a second process, which has begun a file when the first is killed."""
    partial = conversion.target.with_name(conversion.target.name + ".partial")

    def moved(_: int) -> None:
        (other,) = multiprocessing.active_children()
        while not (list(partial.glob(f".*.{other.pid}")) or list(partial.glob("model*"))):
            time.sleep(0.01)
        report.send(other.pid)
        os.kill(os.getpid(), signal.SIGKILL)

    convert(conversion, processes=2, tell=lambda _: None, moved=moved)


def _heard(pipe: Any) -> int | None:
    try:
        number: int = pipe.recv()
    except EOFError:
        return None
    return number


class Victims:
    """Processes that are forked from one that has imported everything, so that each costs little."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.weights.convert_cases"])

    def run(self, conversion: Conversion, fatal: int | None, *, overwrite: bool = False) -> int | None:
        """How many instants there were, or None when the process was killed at one."""
        code, said = self._start(convert_and_die, conversion, overwrite, fatal)
        assert code == (0 if said else -signal.SIGKILL)
        return said

    def run_two(self, conversion: Conversion) -> int:
        """The process that was left when the one that had started it was killed."""
        code, said = self._start(convert_in_two_and_die, conversion, False, None)
        assert code == -signal.SIGKILL and said is not None
        return said

    def _start(self, function: Callable[..., None], *arguments: Any) -> tuple[int | None, int | None]:
        """The exit code of a process, and the number that it said."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=function, args=(*arguments, theirs))
        process.start()
        theirs.close()
        process.join(120)
        return process.exitcode, _heard(ours)
