"""Run a program behind walls, from an event loop."""

import asyncio
import json
import os
import secrets
import sys
import sysconfig
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from megatron_rl.rewards.sandbox.new_root import SCRATCH

Ended = Literal["exit", "signal", "cpu", "wall", "output", "stopped", "fault"]

HERE = Path(__file__).parent
START = "import sys; sys.path.append(sys.argv[1]); from megatron_rl.rewards.sandbox.keeper import main; main(int(sys.argv[2]))"
GRACE = 20.0  # seconds beyond a run's own limit in which its keeper must have reported, on a machine however busy
LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo")
LOADER_CACHE = "/etc/ld.so.cache"


class SandboxError(RuntimeError):
    """The sandbox itself failed: no fault of the program."""


@dataclass(frozen=True)
class Walls:
    """Which of the kernel's means stand around a program."""

    namespaces: Literal["root", "user", "none"]  # made by root, made by anyone, none
    other_user: bool  # the program is nobody that the machine knows; root alone can arrange it
    seccomp: bool
    landlock: bool

    def __str__(self) -> str:
        means = {
            {"root": "namespaces", "user": "user namespaces", "none": ""}[self.namespaces]: True,
            "a user of its own": self.other_user,
            "seccomp": self.seccomp,
            "Landlock": self.landlock,
            "resource limits": True,
        }
        return ", ".join(name for name, there in means.items() if name and there)


@dataclass(frozen=True)
class Limits:
    """What a run may use."""

    cpu: int = 10  # seconds of each process
    wall: float = 10.0  # seconds
    memory: int = 512 << 20  # bytes of address space, over all processes
    processes: int = 1
    scratch: int = 0  # bytes in the one folder that can be written
    output: int = 1 << 20  # bytes, over all that it says


@dataclass(frozen=True)
class Program:
    """A Python program with what it reads, or with tests to run in its own interpreter."""

    text: str
    stdin: str = ""
    tests: tuple[str, ...] | None = None
    packages: bool = False  # may it import what is installed beside us?


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    ended: Ended
    code: int | None  # its exit code, where it ended by itself
    signal: int | None
    stdout: str
    stderr: str
    passed: frozenset[int]  # tests by number
    notes: str  # of tests
    cpu: float  # seconds
    wall: float
    memory: int  # peak, bytes resident

    @property
    def well(self) -> bool:
        return self.ended == "exit" and self.code == 0


async def run(program: Program, limits: Limits, walls: Walls) -> Outcome:
    """Run it to its end or to its limits. When this returns or is cancelled no process of it is left."""
    secret = secrets.token_hex(16)
    request = _request(program, limits, walls, secret)
    keeper = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", START, str(HERE.parents[2]), str(os.getpid())),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # an interrupt at the keyboard is the sampler's to handle
    )
    try:
        async with asyncio.timeout(limits.wall + GRACE):
            told, complaint = await keeper.communicate(json.dumps(request).encode())
    except TimeoutError:
        raise SandboxError(f"the sandbox did not report within {limits.wall + GRACE:g} s") from None
    finally:
        await asyncio.shield(_stop(keeper))
    if keeper.returncode != 0 or not told:
        raise SandboxError(f"the sandbox ended with {keeper.returncode}: {complaint.decode(errors='replace')[-500:].strip()}")
    report = json.loads(told)
    if report["fault"] is not None:
        raise SandboxError(f"the sandbox could not be built: {report['fault']}")
    return _outcome(report, secret)


async def _stop(keeper: asyncio.subprocess.Process) -> None:
    """Ask the keeper to end its run and itself; make it, if it does not: then the run dies with it."""
    for end in (keeper.terminate, keeper.kill):
        if keeper.returncode is not None:
            return
        with suppress(ProcessLookupError):
            end()
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE):
                await keeper.wait()


def _request(program: Program, limits: Limits, walls: Walls, secret: str) -> dict[str, Any]:
    executable, paths, packages = _interpreter(program.packages)
    home = SCRATCH if walls.namespaces != "none" else "/"
    environment = {"LANG": "C.UTF-8", "HOME": home, "TMPDIR": home, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        environment["LD_LIBRARY_PATH"] = ":".join(_own_libraries())
    return {
        **asdict(limits),
        "walls": asdict(walls),
        "program": program.text,
        "stdin": program.stdin,
        "tests": None if program.tests is None else list(program.tests),
        "secret": secret,
        "packages": packages,
        "command": [executable, "-I", "-S", "-B", "-X", "utf8", "-c", _harness()],
        "environment": environment,
        "paths": paths,
        "foundation": tempfile.gettempdir(),
    }


def _outcome(report: dict[str, Any], secret: str) -> Outcome:
    lines = [line.removeprefix(f"{secret} ") for line in report["notes"].splitlines() if line.startswith(f"{secret} ")]
    passed = frozenset(int(line.split()[1]) for line in lines if line.startswith("passed "))
    kept = {name: report[name] for name in ("ended", "code", "signal", "stdout", "stderr", "cpu", "wall", "memory")}
    return Outcome(**kept, passed=passed, notes="\n".join(line for line in lines if not line.startswith("passed ")))


def _own_libraries() -> list[str]:
    """Where the interpreter's own libraries are: beside it, also when it was moved, and where it was built to be."""
    return list(dict.fromkeys((os.path.join(sys.base_prefix, "lib"), sysconfig.get_config_var("LIBDIR") or "/usr/lib")))


@cache
def _harness() -> str:
    return (HERE / "harness.py").read_text(encoding="utf-8")


@cache
def _interpreter(with_packages: bool) -> tuple[str, list[str], list[str]]:
    """This interpreter without its environment, what it needs to read, and where packages are. Outer folders come first."""
    executable = os.path.realpath(sys.executable)
    here = sysconfig.get_paths()
    packages = sorted({here["purelib"], here["platlib"]}) if with_packages else []
    needed = (executable, here["stdlib"], *_own_libraries(), *LIBRARIES, LOADER_CACHE, *packages)
    asked = [path for path in needed if os.path.exists(path)]
    real = sorted({os.path.realpath(path) for path in asked}, key=lambda path: (path.count("/"), path))
    return executable, [*real, *(path for path in asked if path not in real)], packages
