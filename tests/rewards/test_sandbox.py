"""Programs that do harm are stopped within their limits, leave nothing behind, and nobody else notices.

The attacks run behind every kind of walls that can be built here: those that root builds, those that anyone builds with
namespaces, and those for kernels and containers that allow none.
"""

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.rewards.sandbox import kernel
from megatron_rl.rewards.sandbox.probe import ESSENTIAL, Standing, attack, candidates, stand
from megatron_rl.rewards.sandbox.runner import Limits, Outcome, Program, SandboxError, Walls, run
from tests.rewards.attacks import ATTACKS, LONG, Attack

ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER
AT_ONCE = 6
ASLEEP = "import time\ntime.sleep(1e6)"


@pytest.fixture(autouse=True)
def _orphans_come_to_us() -> Iterator[None]:
    """So that a process which outlives its run is found among our descendants, wherever it hid."""
    kernel.prctl(ADOPT_ORPHANS, 1)
    before = set(parents())
    yield
    kernel.prctl(ADOPT_ORPHANS, 0)
    for pid, (parent, state) in parents().items():
        if (parent, state) == (os.getpid(), "Z") and pid not in before:
            os.waitpid(pid, 0)


def parents() -> dict[int, tuple[int, str]]:
    """Every process of the machine with its parent and state."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[int(folder.name)] = (int(parent), state)
    return found


def left_behind(ours: frozenset[int] = frozenset()) -> set[int]:
    """Our living descendants, less those that were there before."""
    table = parents()
    family = {os.getpid()}
    while more := {pid for pid, (parent, _) in table.items() if parent in family} - family:
        family |= more
    return {pid for pid in family - {os.getpid()} - ours if table[pid][1] != "Z"}


async def usable() -> list[tuple[Walls, frozenset[str]]]:
    """The strongest walls of each kind behind which all that is essential holds here."""
    found: list[tuple[Walls, frozenset[str]]] = []
    for walls in candidates():
        if walls.seccomp and walls.namespaces not in {known.namespaces for known, _ in found}:
            try:
                held = await attack(walls)
            except SandboxError:
                continue
            if held >= set(ESSENTIAL):
                found.append((walls, held))
    return found


async def strike(attempt: Attack, walls: Walls, folder: Path, port: int) -> Outcome:
    words = {"folder": str(folder), "own": str(folder / "own"), "port": port, "sampler": os.getpid()}
    text = attempt.text
    if "{" in text:
        text = text.format(**words, apart=walls.namespaces != "none")
    return await run(Program(text), attempt.limits, walls)


async def check(name: str, walls: Walls, folder: Path, port: int, turn: asyncio.Semaphore) -> list[str]:
    """What went wrong, in words."""
    attempt = ATTACKS[name]
    async with turn:
        outcome = await strike(attempt, walls, folder, port)
    told = outcome.stdout + outcome.stderr
    problems = []
    if outcome.ended not in attempt.ended:
        problems.append(f"ended with {outcome.ended}")
    if "FREE" in told:
        problems.append("was not held")
    if attempt.said not in told:
        problems.append("did not say what it should")
    if len(told.encode()) > attempt.limits.output:
        problems.append(f"said {len(told)}")
    if outcome.memory > attempt.limits.memory:
        problems.append(f"had {outcome.memory} bytes")
    return [f"{name} behind {walls}: {problem}: {outcome}" for problem in problems]


def test_every_attack_is_stopped_behind_every_kind_of_walls(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "own").write_text("of the run")
    (folder / "own").chmod(0o666)
    before, limits = frozenset(left_behind()), resource.getrlimit(resource.RLIMIT_NOFILE)

    async def everything(port: int) -> tuple[list[str], int]:
        turn = asyncio.Semaphore(AT_ONCE)
        walls = await usable()
        assert walls, "nothing here can hold a program"
        checks = [
            check(name, kind, folder, port, turn)
            for kind, held in walls
            for name, attempt in ATTACKS.items()
            if attempt.needs <= held and (kind == walls[0][0] or not attempt.once)
        ]
        honest = [run(Program("print(6 * 7)"), LONG, kind) for kind, _ in walls]
        results, answers = await asyncio.gather(asyncio.gather(*checks), asyncio.gather(*honest))
        assert [answer.stdout for answer in answers] == ["42\n"] * len(walls)
        return [problem for problems in results for problem in problems], len(checks)

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        problems, count = asyncio.run(everything(server.getsockname()[1]))
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody came
    assert problems == []
    assert count >= len([attempt for attempt in ATTACKS.values() if not attempt.needs])
    assert left_behind(before) == set()
    assert (folder / "own").read_text() == "of the run" and [path.name for path in folder.iterdir()] == ["own"]
    assert (folder / "own").stat().st_mode & 0o777 == 0o666
    assert not list(Path("/tmp").glob("megatron_rl_escape")) + list(Path("/dev/shm").glob("megatron_rl_escape"))
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


# -- what the sampler sees ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standing() -> Standing:
    return asyncio.run(stand())


def outcome(standing: Standing, text: str, limits: Limits = LONG, **others: Any) -> Outcome:
    return asyncio.run(run(Program(text, **others), limits, standing.walls))


def test_here_everything_essential_holds(standing: Standing) -> None:
    assert standing.missing(processes=1, scratch=0) == []
    if standing.walls.namespaces == "root":
        assert standing.missing(processes=2, scratch=1) == []


def test_a_program_gets_its_input_and_its_ending_is_told(standing: Standing) -> None:
    text = "import sys\nread = sys.stdin.read()\nprint(len(read), read[:3])\nprint('ü', file=sys.stderr)\nsys.exit(5)"
    ending = outcome(standing, text, stdin="äbc" + "x" * (1 << 20))
    assert (ending.ended, ending.code, ending.signal, ending.well) == ("exit", 5, None, False)
    assert (ending.stdout, ending.stderr) == (f"{3 + (1 << 20)} äbc\n", "ü\n")
    assert 0 < ending.cpu < 60 and 1 << 20 < ending.memory < LONG.memory
    ending = outcome(standing, "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert (ending.ended, ending.code, ending.signal, ending.well) == ("signal", None, signal.SIGSEGV, False)
    assert outcome(standing, "print('done')\nraise SystemExit").well


def test_a_program_is_a_main_module_and_finds_nothing_of_ours(standing: Standing) -> None:
    text = "assert __name__ == '__main__'\nprint(sorted(n for n in globals() if n[0] != '_'))\n"
    text += "import sys\nprint(sys.argv, sys.path)"
    first, second = outcome(standing, text).stdout.splitlines()
    assert first == "[]" and second.startswith("['program.py']") and "site-packages" not in second


def test_packages_are_there_when_asked_for(standing: Standing) -> None:
    assert outcome(standing, "import numpy\nprint(numpy.arange(4).sum())", packages=True).stdout == "6\n"
    assert "No module named 'numpy'" in outcome(standing, "import numpy").stderr


def test_event_loops_and_threads_work_inside(standing: Standing) -> None:
    text = "import asyncio\nprint(asyncio.run(asyncio.to_thread(lambda: 7)))"
    assert outcome(standing, text).stdout == "7\n"


@pytest.mark.parametrize(
    "program, passed",
    [
        ("def f(x): return x + 1", {0, 1, 2}),
        ("def f(x): return 2", {0}),
        ("def f(x):\n    if x == 2: exit(0)\n    return x + 1", {0, 2}),
        ("import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return x + 1", {0}),
        ("def f(x):\n    if x == 3:\n        while True: pass\n    return x + 1", {0, 1}),
        ("exit(0)", set()),
        ("import os; os._exit(0)", set()),
        ("print('passed 0\\npassed 1\\npassed 2')", set()),
        ("import os\nos.write(4, b'passed 0\\n' * 3)", set()),
        ("import atexit, os\natexit.register(os._exit, 0)", set()),
        ("def f(x", set()),
        ("import builtins\nbuiltins.compile = lambda *a: None\ndef f(x): return 0", set()),
    ],
)
def test_only_tests_that_passed_count_however_the_program_ends(standing: Standing, program: str, passed: set[int]) -> None:
    tests = ("assert f(1) == 2", "assert f(2) == 3", "x = 3\nassert f(x) == 4")
    assert outcome(standing, program, tests=tests).passed == passed


def test_a_cancelled_run_leaves_nothing(standing: Standing) -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(run(Program(ASLEEP), LONG, standing.walls))
        while len(left_behind(before)) < 3:  # the keeper, the first process of the namespace, the program
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = frozenset(left_behind())
    asyncio.run(cancelled())
    assert left_behind(before) == set()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_sampler_that_dies_takes_its_runs_along(standing: Standing, end: signal.Signals) -> None:
    script = (
        "import asyncio\nfrom megatron_rl.rewards.sandbox.runner import *\n"
        f"asyncio.run(run(Program({ASLEEP!r}), Limits(wall=60), {standing.walls!r}))"
    )
    before = frozenset(left_behind())
    root = str(Path(__file__).parents[2])
    sampler = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": root})
    wait_for(lambda: len(left_behind(before)) >= 4)
    os.kill(sampler.pid, end)
    sampler.wait()
    wait_for(lambda: left_behind(before) == set())


def test_a_keeper_that_dies_takes_its_run_along_and_is_told_of(standing: Standing) -> None:
    async def killed() -> None:
        task = asyncio.create_task(run(Program(ASLEEP), LONG, standing.walls))
        while len(left_behind(before)) < 3:
            await asyncio.sleep(0.02)
        [keeper] = [pid for pid in left_behind(before) if parents()[pid][0] == os.getpid()]
        os.kill(keeper, signal.SIGKILL)
        with pytest.raises(SandboxError, match="the sandbox ended with -9"):
            await task

    before = frozenset(left_behind())
    asyncio.run(killed())
    wait_for(lambda: left_behind(before) == set())


def test_walls_that_are_missing_are_noticed() -> None:
    """The probe is no formality: with a wall left out it says what got through."""
    without = asyncio.run(attack(Walls("none", False, seccomp=False, landlock=False)))
    assert not without & {"network", "writing", "reading", "processes", "signals", "scratch", "many_processes"}
    assert without >= {"cpu", "memory"}
    unhidden = asyncio.run(attack(Walls("none", False, seccomp=True, landlock=False)))
    assert unhidden >= {"network", "processes", "signals"} and not unhidden & {"writing", "reading"}
