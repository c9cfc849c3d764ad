"""A bank survives whatever ends its writer: what was reported as finished is there, once, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.config.data_settings import BankSettings
from megatron_rl.config.errors import BankError
from megatron_rl.rollout.bank.frames import OVERHEAD, Kind, frame
from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.rollout.bank.writer import Bank
from megatron_rl.types import Group
from tests.rollout.banks import contents, exact, made, random_moments

ROOT = Path(__file__).parents[2]
KILLS = 20


class Lives:
    """The process that forks writers, and what they say."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.rollout.bank_child"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *command: object) -> int:
        """The pid of a new life."""
        assert self.process.stdin is not None
        print(*command, file=self.process.stdin, flush=True)
        said, pid = self.line().split()
        assert said == "pid"
        return int(pid)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def rest(self) -> list[str]:
        """What a life said until it died."""
        return list(iter(self.line, "dead"))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    server = Lives()
    yield server
    server.close()


def told(lines: list[str], what: str) -> list[str]:
    return [line.split()[1] for line in lines if line.startswith(what)]


def test_killed_at_twenty_random_moments_it_has_all_that_was_reported(lives: Lives, tmp_path: Path) -> None:
    reported: dict[str, int] = {}
    sealed = 0
    for life, moment in enumerate(random_moments(KILLS, 0.25)):
        path = tmp_path / str(life % 5)  # every bank lives through several kills
        pid = lives.start("sample", path, life)
        lines = [lives.line()]  # the first group: from here on it lives
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        lines += lives.rest()
        reported |= dict.fromkeys(told(lines, "finished"), life)
        before = contents(path)  # as a reader sees it before anybody mends it
        with Bank(path) as bank:
            sealed += len(bank.sealed_steps())
        found = contents(path)
        assert before.keys() == found.keys()
        assert {key for key, of in reported.items() if of % 5 == life % 5} <= found.keys()
        for key, group in found.items():
            step = int(key.split("/")[0])
            count = int(key.split("/")[2])
            assert exact(group) == exact(made(key, step=step, length=400 if count % 5 == 0 else 40))
    assert set(reported.values()) == set(range(KILLS))
    assert sealed > 0  # some of it was sealed while the killing went on


def test_a_crash_between_any_two_file_operations_loses_and_doubles_nothing(lives: Lives, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    lives.start("crash", whole, 10**9)
    assert "done" in lives.rest()
    expected = contents(whole)
    assert set(expected) == {f"{step}/{name}" for step in (1, 2) for name in ("a", "b", "carried")} | {
        f"{i}/left" for i in range(3)
    }

    operations = 0
    while True:
        path = tmp_path / str(operations)
        lives.start("crash", path, operations)
        lines = lives.rest()
        if "done" in lines:
            break
        check_and_go_on(lives, path, lines, expected)
        operations += 1
    assert operations > 50


def check_and_go_on(lives: Lives, path: Path, lines: list[str], expected: dict[str, Group]) -> None:
    """After a crash: what was told is there, a crash while mending changes nothing, the script ends as if uninterrupted."""
    if (path / "bank.json").exists():
        assert set(told(lines, "finished")) - set(contents(path)) <= {"0/a", "0/b", "0/carried"}  # a reader mends nothing
    for again in (int(path.name) % 4, 10**9):
        copy = path.with_name(f"{path.name}_{again}")
        if path.exists():
            shutil.copytree(path, copy)
        lives.start("crash", copy, again)
        lines_again = lives.rest()
        with Bank(copy, BankSettings(keep_steps=2)) as bank:
            steps = bank.sealed_steps()
            assert not list(copy.rglob("*.partial"))
            gone = {f"{step}/{name}" for step in range(max(steps, default=0) - 1) for name in ("a", "b", "carried")}
            for key in told(lines, "carried") + told(lines_again, "carried"):
                assert key in bank.carried() or key in bank or key in gone
                assert not (key in bank.carried() and key in bank)
        found = contents(copy)
        assert set(told(lines, "finished") + told(lines_again, "finished")) - gone <= found.keys()
        for key, group in found.items():
            assert exact(group) == exact(made(key, step=9 if key.endswith("left") else int(key[0])))
        if again == 10**9:
            assert found.keys() == expected.keys()
        shutil.rmtree(copy)


def test_a_log_cut_anywhere_in_its_last_record_keeps_the_others(tmp_path: Path) -> None:
    with Bank(tmp_path / "bank") as bank:
        bank.append(made("a"))
        size = (tmp_path / "bank/log").stat().st_size
        bank.append(made("b", samples=1, length=3))
    whole = (tmp_path / "bank/log").read_bytes()
    for end in range(size, len(whole)):
        (tmp_path / "bank/log").write_bytes(whole[:end])
        assert contents(tmp_path / "bank").keys() == {"a"}
        with Bank(tmp_path / "bank", BankSettings(durable_against="kill")) as bank:
            assert bank.torn_bytes == end - size
            assert bank.waiting() == ["a"]
            assert (tmp_path / "bank/log").stat().st_size == size
            if end % 50 == 0:
                bank.append(made("c"))
                assert exact(bank.read("c")) == exact(made("c"))


@pytest.mark.parametrize("garbage", [b"\0" * 5000, b"mRLb" * 100, frame(Kind.GROUP, b"x" * 50, 0)[:-1], os.urandom(100_000)])
def test_garbage_behind_the_last_record_is_cut(tmp_path: Path, garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with Bank(tmp_path) as bank:
        bank.append(made("a"))
    with (tmp_path / "log").open("ab") as log:
        log.write(garbage)
    with Bank(tmp_path) as bank:
        assert bank.torn_bytes == len(garbage)
        assert f"left {len(garbage)} bytes" in caplog.text
        bank.append(made("b"))
    assert contents(tmp_path).keys() == {"a", "b"}


def test_damage_among_reported_records_is_never_cut_silently(tmp_path: Path) -> None:
    with Bank(tmp_path) as bank:
        for key in "abc":
            bank.append(made(key))
    log = tmp_path / "log"
    whole = bytearray(log.read_bytes())
    place = whole.index(b"ask b")
    whole[place] ^= 1
    log.write_bytes(whole)
    with pytest.raises(BankError, match=r"damaged at byte [\d,]+, in records that had been safely written.*truncate -s \d+"):
        Bank(tmp_path)
    assert log.read_bytes() == whole
    # The same damage in the last record cannot be told from a torn write of one that was never reported.
    log.write_bytes(whole[: whole.index(b"mRLb", place)])
    with Bank(tmp_path) as bank:
        assert bank.waiting() == ["a"] and bank.torn_bytes > OVERHEAD


def test_damage_is_found_behind_a_rewritten_log_too(tmp_path: Path) -> None:
    with Bank(tmp_path) as bank:
        for key in "abcd":
            bank.append(made(key, step=1 if key != "a" else 0))
        bank.seal(0)
    whole = bytearray((tmp_path / "log").read_bytes())
    whole[whole.index(b"ask c")] ^= 1
    (tmp_path / "log").write_bytes(whole)
    with pytest.raises(BankError, match="safely written"):
        Bank(tmp_path)


def test_one_writer_at_a_time_and_the_dead_hold_nothing(lives: Lives, tmp_path: Path) -> None:
    pid = lives.start("hold", tmp_path)
    assert lives.line() == "holding"
    try:
        with pytest.raises(BankError, match=f"is being written by process {pid} on .* since .*End it first"):
            Bank(tmp_path)
        with BankReader(tmp_path) as reader:
            assert reader.steps() == []  # readers need no lock
    finally:
        os.kill(pid, signal.SIGKILL)
        lives.rest()
    assert f'"pid": {pid}' in (tmp_path / "lock").read_text()
    with Bank(tmp_path) as bank:
        bank.append(made("a"))
        with pytest.raises(BankError, match=f"process {os.getpid()} on"):
            Bank(tmp_path)
    Bank(tmp_path).close()
