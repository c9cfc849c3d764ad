"""The journal: what is told stands in files, a kill costs a torn line at most, a resumed run is as one that never stopped."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_rl.observe import lines
from megatron_rl.observe.folder import Folder
from megatron_rl.observe.journal import Journal
from megatron_rl.observe.records import EvaluationRecord, StepRecord
from tests.observe.runs import MadeRun, Ticks, run_record

REPOSITORY = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but the list of its starts, which tells of the resumption."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


def test_what_is_told_is_read_again(tmp_path: Path) -> None:
    run = MadeRun()
    run.tell(Journal(tmp_path, Ticks()), 0, 12)
    folder = Folder(tmp_path)
    found = list(lines.read(folder.metrics))
    assert [line.pop("step") for line in found] == list(range(12))
    assert all(line.pop("time") for line in found)
    assert found == [dict(run.record(step, 12).metrics) for step in range(12)]  # to the last bit
    for step, line in enumerate(lines.read(folder.experts)):
        expected = run.record(step, 12).expert_tokens
        assert expected is not None and np.array_equal(line["tokens"], expected)
    for step, line in enumerate(lines.read(folder.timeline)):
        assert line["spans"] == [vars(span) for span in run.record(step, 12).spans]
    assert [(line["step"], line["name"]) for line in lines.read(folder.evaluations)] == [
        (0, "held-out"), (10, "held-out"), (12, "held-out"),
    ]  # fmt: skip
    assert list(folder.traced()) == [1, 3, 5, 7, 9, 11]
    (row,) = pq.read_table(folder.trace(3)).to_pylist()
    (trace,) = run.record(3, 12).traces
    assert (row["row"], row["group"], row["clipped"], row["ratio"]) == (0, "prompt/3#0", True, 1.001)
    assert np.array_equal(np.float32(row["log_ratio"]), trace.log_ratio)
    assert pq.read_table(folder.trace(5)).to_pylist()[0]["token_advantage"] is None
    (start,) = json.loads(folder.run.read_text())["starts"]
    assert start["host"] == "node7" and start["step"] == 0 and start["finished"] == Ticks()()


@pytest.mark.parametrize("resumed_at", [0, 6, 9])
def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path: Path, resumed_at: int) -> None:
    run = MadeRun(evaluate_every=3)
    run.tell(Journal(tmp_path / "whole", Ticks()), 0, 15)
    run.tell(Journal(tmp_path / "killed", Ticks()), 0, 11, steps=15)
    for name in ("metrics.jsonl", "timeline.jsonl", "evaluations.jsonl"):
        with (tmp_path / "killed" / name).open("ab") as file:
            file.write(b'{"step":11,"ti')  # torn by the kill
    run.tell(Journal(tmp_path / "killed", Ticks()), resumed_at, 15)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    starts = json.loads((tmp_path / "killed/run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, resumed_at]
    assert starts[0]["finished"] is None and starts[1]["finished"] is not None


def test_what_a_resumed_run_will_do_again_is_gone_when_it_starts(tmp_path: Path) -> None:
    """At once: nobody reads steps of a past that did not happen. What was evaluated of the weights it goes on with, stays."""
    MadeRun(evaluate_every=3).tell(Journal(tmp_path), 0, 8, steps=9)
    Journal(tmp_path).started(run_record(), 3)
    folder = Folder(tmp_path)
    for path in (folder.metrics, folder.timeline, folder.experts):
        assert [line["step"] for line in lines.read(path)] == [0, 1, 2]
    assert [line["step"] for line in lines.read(folder.evaluations)] == [0, 3]
    assert list(folder.traced()) == [1]


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.started(run_record(), 0)
    journal.step(StepRecord(0, {"loss": math.nan, "grad_norm": math.inf, "entropy": float(np.float32(0.5))}))

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["loss"], line["grad_norm"], line["entropy"]) == (None, None, 0.5)


def test_an_evaluation_done_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.started(run_record(), 0)
    for score in (0.1, 0.2):
        journal.evaluated(EvaluationRecord(4, "a", {"avg@1": score}))
        journal.evaluated(EvaluationRecord(4, "b", {"avg@1": score}))
    found = [(line["name"], line["metrics"]["avg@1"]) for line in lines.read(Folder(tmp_path).evaluations)]
    assert found == [("a", 0.2), ("b", 0.2)]


def test_a_metric_cannot_hide_the_step() -> None:
    with pytest.raises(ValueError, match="a metric cannot be called step"):
        StepRecord(3, {"step": 1.0})


WRITER = """
import sys
from pathlib import Path
from megatron_rl.observe.journal import Journal
from tests.observe.runs import MadeRun
MadeRun(layers=8, experts=64).tell(Journal(Path(sys.argv[1])), 0, 100_000)
"""


def test_a_kill_at_any_moment_leaves_whole_steps(tmp_path: Path) -> None:
    """A step that has a line of metrics has everything else too; readers meet no torn line."""
    chance = np.random.default_rng()
    for attempt in range(4):
        path = tmp_path / str(attempt)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=REPOSITORY)
        try:
            deadline = time.monotonic() + 60
            while not (path / "metrics.jsonl").exists():
                assert time.monotonic() < deadline and writer.poll() is None
                time.sleep(0.01)
            time.sleep(float(chance.uniform(0, 0.5)))
        finally:
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
        folder = Folder(path)
        steps = [line["step"] for line in lines.read(folder.metrics)]
        assert steps == list(range(len(steps))) and steps
        for other in (folder.timeline, folder.experts):
            assert [line["step"] for line in lines.read(other)][: len(steps)] == steps
        for step in steps:
            assert step % 2 == 0 or pq.read_metadata(folder.trace(step)).num_rows == 1
        (path / "metrics.jsonl.partial").write_bytes(b"{")  # as a kill leaves it while a start cuts the lines of lost steps
        Journal(path).started(run_record(), len(steps))
        assert [line["step"] for line in lines.read(folder.experts)] == steps
        assert all(step < len(steps) for step in folder.traced())
        assert not list(path.rglob("*.partial"))
