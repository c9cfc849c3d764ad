"""torchrun as `launch/torchrun.sh` starts it: ranks are told to stop, have their time, and their exit code is the whole's."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_rl.train.elastic import _code

RANK = """
import os, pathlib, signal, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
folder = pathlib.Path(sys.argv[1])
(folder / os.environ["RANK"]).touch()
if sys.argv[2] == "stops":
    while not heard:
        time.sleep(0.01)
    time.sleep(0.2 + 0.8 * int(os.environ["RANK"]))  # torchrun looks every tenth of a second
    (folder / f"saved-{os.environ['RANK']}").write_text(str(len(heard)))
sys.exit(143 if heard else int(sys.argv[2]))
"""


@pytest.mark.parametrize(("what", "code"), [("stops", 143), ("2", 2)])
def test_ranks_are_told_and_what_they_end_with_is_the_end(what: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    words = ["--standalone", "--nproc-per-node=2", str(tmp_path / "rank.py"), str(tmp_path), what]
    process = subprocess.Popen([sys.executable, "-m", "megatron_rl.train.elastic", *words], stderr=subprocess.PIPE, text=True)
    while what == "stops" and not all((tmp_path / rank).exists() for rank in "01"):
        assert process.poll() is None, process.communicate()
    if what == "stops":
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    saved = {path.name: path.read_text() for path in tmp_path.glob("saved-*")}  # how often each was told
    assert saved == ({"saved-0": "1", "saved-1": "1"} if what == "stops" else {})


@pytest.mark.parametrize(
    ("codes", "expected"), [((143, 143), 143), ((143, 2), 2), ((1, 143), 1), ((143, -9), 137), ((-15, 143), 143), ((2, 1), 2)]
)
def test_a_rank_that_failed_is_told_before_those_that_saved(codes: tuple[int, ...], expected: int, tmp_path: Path) -> None:
    failures = {rank: ProcessFailure(rank, 1, code, str(tmp_path / "none")) for rank, code in enumerate(codes)}
    for rank, failure in failures.items():
        failure.timestamp = rank
    assert _code(ChildFailedError("train", failures)) == expected
