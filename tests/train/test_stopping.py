"""Told to stop: noted, and bounded, whatever the main thread waits for."""

import signal
import subprocess
import sys

import pytest

# A mutex of the C library that is taken twice: no signal is heard inside it, as in a call that waits for another rank.
STUCK = "lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64); lock(mutex); lock(mutex)"
ATTENTIVE = "while not stopper.asked: time.sleep(0.01)"
SLOW = f"{ATTENTIVE}\n    print('heard', flush=True)\n    time.sleep(0.5)"
PROGRAM = """
import ctypes, time
from megatron_rl.train.stopping import Stopper
with Stopper(grace={grace}) as stopper:
    stopper.learns = {learns}
    print("ready", flush=True)
    {work}
print("saved")
"""
LONG, SHORT = 1e6, 0.3  # seconds


def told_to_stop(work: str, grace: float, learns: bool, *, again: bool = False) -> tuple[int, str, str]:
    """Exit code and words of a program that is sent SIGTERM at its work."""
    program = PROGRAM.format(work=work, grace=grace, learns=learns)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    if again:
        assert process.stdout.readline() == "heard\n"
        process.send_signal(signal.SIGTERM)
    said, complained = process.communicate(timeout=60)
    return process.returncode, said, complained


@pytest.mark.parametrize("learns", [False, True])
def test_who_is_stuck_is_ended(learns: bool) -> None:
    code, said, complained = told_to_stop(STUCK, SHORT, learns)
    assert (code, said) == (143, "") and "checkpoint.grace_seconds" in complained
    assert ("there was nothing to save yet" in complained) is not learns


def test_who_hears_it_ends_by_itself() -> None:
    assert told_to_stop(ATTENTIVE, LONG, learns=True) == (0, "saved\n", "")


def test_being_told_again_changes_nothing() -> None:
    """As ranks are whose launcher passes on what they have heard themselves."""
    assert told_to_stop(SLOW, LONG, learns=True, again=True) == (0, "saved\n", "")
