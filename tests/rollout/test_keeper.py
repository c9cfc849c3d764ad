"""The keeper ends a server with all its children: when told, when its parent is killed, when it is killed itself."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.rollout.server import KEEPER

# A server with a child, which says who it is and then waits; it heeds SIGINT or not.
SERVER = """
import os, signal, subprocess, sys, time
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
open(sys.argv[1] + ".new", "w").write(f"{os.getppid()} {os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
try:
    time.sleep(600)
except KeyboardInterrupt:
    sys.exit(7)
"""
# A parent that starts a keeper and waits.
PARENT = """
import os, subprocess, sys
subprocess.run([sys.executable, sys.argv[1], str(os.getpid()), *sys.argv[2:]], start_new_session=True)
"""
SECONDS = 20.0


def running(pid: int) -> bool:
    """Whether the process is there and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids(told: Path) -> tuple[int, int, int]:
    """Keeper, server and the server's child, once the server has said."""
    wait_for(told.exists)
    keeper, server, child = map(int, told.read_text().split())
    return keeper, server, child


def server_command(told: Path, manner: str = "polite") -> list[str]:
    return [sys.executable, "-c", SERVER, str(told), manner]


def test_told_to_end_it_asks_the_server_and_ends_its_children(tmp_path: Path) -> None:
    told = tmp_path / "pids"
    keeper = subprocess.Popen([sys.executable, str(KEEPER), str(os.getpid()), *server_command(told)])
    _, server, child = pids(told)
    keeper.terminate()
    assert keeper.wait(SECONDS) == 7
    wait_for(lambda: not running(server) and not running(child))


def test_a_server_that_will_not_end_is_killed(tmp_path: Path) -> None:
    told, impatient = tmp_path / "pids", tmp_path / "keeper.py"
    source = KEEPER.read_text()
    assert "PATIENCE = 10.0" in source
    impatient.write_text(source.replace("PATIENCE = 10.0", "PATIENCE = 1.5"))
    keeper = subprocess.Popen([sys.executable, str(impatient), str(os.getpid()), *server_command(told, "stubborn")])
    _, server, child = pids(told)
    keeper.terminate()
    assert keeper.wait(SECONDS) == 128 + signal.SIGKILL
    wait_for(lambda: not running(server) and not running(child))


def test_a_server_that_ends_by_itself_takes_its_children_along(tmp_path: Path) -> None:
    told = tmp_path / "pids"
    keeper = subprocess.Popen([sys.executable, str(KEEPER), str(os.getpid()), *server_command(told)])
    _, server, child = pids(told)
    os.kill(server, signal.SIGTERM)
    assert keeper.wait(SECONDS) == 128 + signal.SIGTERM
    wait_for(lambda: not running(child))


@pytest.mark.parametrize("killed", ["parent", "keeper"])
def test_nothing_is_left_of_the_killed(tmp_path: Path, killed: str) -> None:
    told = tmp_path / "pids"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(KEEPER), *server_command(told)])
    keeper, server, child = pids(told)
    os.kill({"parent": parent.pid, "keeper": keeper}[killed], signal.SIGKILL)
    parent.wait(SECONDS)
    wait_for(lambda: not running(keeper) and not running(server))
    if killed == "keeper":  # SGLang's processes end with the server by themselves; this child does not
        os.kill(child, signal.SIGKILL)
    wait_for(lambda: not running(child))
