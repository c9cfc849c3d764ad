"""Reading a run: the same at once as while it grows, through torn ends, resumptions and files that are missing."""

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_rl.config.errors import DataError
from megatron_rl.observe.journal import Journal
from megatron_rl.observe.reading import RunReader
from megatron_rl.observe.records import StepRecord
from tests.observe.runs import START, MadeRun, Ticks, run_record


def told(reader: RunReader) -> object:
    """All that a reader knows."""
    tables = [
        (table.steps, {name: table.column(name).tolist() for name in table.names})
        for table in (reader.metrics, reader.times, reader.phases)
    ]
    steps, tokens = reader.expert_tokens(7)
    return tables, list(reader.spans), reader.evaluations, steps, None if tokens is None else tokens.tolist(), reader.starts


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no run's directory: there is no run\.json in it\. Give the run\.directory"):
        RunReader(tmp_path)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    Journal(tmp_path).started(run_record(), 0)
    reader = RunReader(tmp_path)
    assert reader.last_step is None and not reader.finished and not reader.refresh()
    assert reader.expert_tokens(5) == ([], None) and reader.traces(0) == []


def test_reading_along_is_reading_at_once(tmp_path: Path) -> None:
    """Also when a line is met half written, and when the run is killed and goes on from an earlier step."""
    run, journal = MadeRun(evaluate_every=4), Journal(tmp_path, Ticks())
    journal.started(run_record(12), 0)
    along = RunReader(tmp_path)
    for step in range(9):
        journal.step(run.record(step, 12))
        with (tmp_path / "metrics.jsonl").open("r+b") as file:  # the reader comes while the last line is being written
            whole = file.read()
            file.truncate(0)
            file.seek(0)
            file.write(whole[:-5])
            file.flush()
            along.refresh()
            file.write(whole[-5:])
        assert along.refresh()
        assert along.last_step == step and told(along) == told(RunReader(tmp_path))
    assert not along.refresh()
    other = MadeRun(seed=8, evaluate_every=4)  # what is done again comes out differently
    other.tell(Journal(tmp_path, Ticks(START + 9)), 5, 12)
    assert along.refresh() and along.finished
    assert told(along) == told(RunReader(tmp_path))
    assert along.metrics.steps == list(range(12)) and [line["step"] for line in along.evaluations] == [8, 12]
    assert [start["step"] for start in along.starts] == [0, 5]


def test_metrics_that_come_late_or_are_not_finite_are_nan(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.started(run_record(), 0)
    for step, metrics in enumerate(({"a": 1.0}, {"b": 2.0}, {"a": math.inf, "b": 4.0})):
        journal.step(StepRecord(step, metrics))
    table = RunReader(tmp_path).metrics
    assert table.names == ["a", "b"]
    np.testing.assert_equal(table.column("a"), [1.0, math.nan, math.nan])
    np.testing.assert_equal(table.column("b"), [math.nan, 2.0, 4.0])


@pytest.mark.parametrize("most, expected", [(100, list(range(11))), (4, [1, 4, 7, 10]), (1, [10])])
def test_expert_tokens_are_taken_at_equal_distances_the_last_among_them(tmp_path: Path, most: int, expected: list[int]) -> None:
    run = MadeRun()
    run.tell(Journal(tmp_path), 0, 11)
    steps, tokens = RunReader(tmp_path).expert_tokens(most)
    assert steps == expected and tokens is not None
    for step, found in zip(steps, tokens, strict=True):
        assert np.array_equal(found, run.record(step, 11).expert_tokens)  # type: ignore[arg-type]


def test_a_file_that_was_replaced_behind_the_readers_back_gives_nothing_wrong(tmp_path: Path) -> None:
    MadeRun().tell(Journal(tmp_path), 0, 6)
    reader = RunReader(tmp_path)
    MadeRun(layers=9, experts=5).tell(Journal(tmp_path), 0, 6)  # other lines at other places
    steps, tokens = reader.expert_tokens(10)
    assert steps == [0] and tokens is not None and tokens.shape == (1, 9, 5)  # where the first begins another begins
