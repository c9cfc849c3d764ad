"""The run's own log: everything that was told, in files of its directory."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.observe import lines
from megatron_rl.observe.folder import Folder
from megatron_rl.observe.records import EvaluationRecord, RunRecord, SequenceTrace, StepRecord
from megatron_rl.rollout.bank import files

TRACE_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("advantage", pa.float64(), nullable=False),
        pa.field("ratio", pa.float64(), nullable=False),
        pa.field("clipped", pa.bool_(), nullable=False),
        pa.field("log_ratio", pa.list_(pa.float32()), nullable=False),
        pa.field("token_advantage", pa.list_(pa.float32())),
    ]
)


class Journal:
    """An observer that writes. A kill at any instant leaves whole records and at most one torn line, which is cut.

    A step's line in metrics.jsonl is its last file: a step that has one has all of them.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = Folder(directory), clock
        self._starts: list[dict[str, Any]] = []

    def started(self, run: RunRecord, step: int) -> None:
        """Files of a run that was killed and resumed become those of a run that never was: later steps go."""
        folder = self._folder
        files.private_folder(folder.path)
        for path in (folder.metrics, folder.timeline, folder.experts):
            lines.keep(path, lambda line: line["step"] < step)
        # Weights that have been through `step` steps are those that the run goes on with: what was found of them stands.
        lines.keep(folder.evaluations, lambda line: line["step"] <= step)
        for number, path in folder.traced().items():
            if number >= step:
                files.remove(path)
        for path in (*folder.path.glob(f"*{files.BESIDE}"), *folder.traces.glob(f"*{files.BESIDE}")):  # what a kill interrupted
            files.remove(path)
        self._starts = [start for line in lines.read(folder.run) for start in line["starts"]]
        self._starts.append({**asdict(run), "step": step, "finished": None})
        self._write_starts()

    def step(self, record: StepRecord) -> None:
        folder, number = self._folder, record.step
        if record.traces:
            self._write_traces(number, record.traces)
        if record.expert_tokens is not None:
            lines.append(folder.experts, {"step": number, "tokens": record.expert_tokens.tolist()})
        lines.append(folder.timeline, {"step": number, "spans": [asdict(span) for span in record.spans]})
        lines.append(folder.metrics, {"step": number, "time": self._clock(), **_numbers(record.metrics)})

    def evaluated(self, record: EvaluationRecord) -> None:
        path, place = self._folder.evaluations, (record.step, record.name)
        lines.keep(path, lambda line: (line["step"], line["name"]) != place)
        results = None if record.results is None else record.results.as_posix()
        about = {"step": record.step, "name": record.name, "time": self._clock(), "results": results}
        lines.append(path, {**about, "metrics": _numbers(record.metrics)})

    def finished(self) -> None:
        if self._starts:
            self._starts[-1]["finished"] = self._clock()
            self._write_starts()

    def _write_starts(self) -> None:
        files.write_file(self._folder.run, lines.encode({"format": 1, "starts": self._starts}))

    def _write_traces(self, step: int, traces: Sequence[SequenceTrace]) -> None:
        path = self._folder.trace(step)
        path.parent.mkdir(exist_ok=True)
        table = pa.Table.from_pylist([vars(trace) for trace in traces], schema=TRACE_SCHEMA)
        pq.write_table(table, files.beside(path), compression="zstd")
        files.sync_file(files.beside(path))
        files.rename(files.beside(path), path)


def _numbers(metrics: Any) -> dict[str, float]:
    """Plain floats: a metric may come as a number of numpy's."""
    return {name: float(value) for name, value in metrics.items()}
