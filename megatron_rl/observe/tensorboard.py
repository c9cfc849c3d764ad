"""A run for TensorBoard. Its event files are written directly: torch's writer would bring torch along."""

import time
from pathlib import Path
from typing import Any

from megatron_rl.observe.records import EvaluationRecord, RunRecord, StepRecord


class TensorBoardObserver:
    """Writes event files. TensorBoard itself forgets the steps that a resumed run does again."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events, self._summaries = event_pb2, summary_pb2
        self._folder, self._open = folder, EventFileWriter
        self._writer: Any = None

    def started(self, run: RunRecord, step: int) -> None:
        self._writer = self._open(str(self._folder))
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._add(step, session_log=start)  # tells readers to drop later steps that earlier files have
        self._text("settings", f"```\n{run.settings}\n```", step)

    def step(self, record: StepRecord) -> None:
        self._numbers(record.metrics, record.step)

    def evaluated(self, record: EvaluationRecord) -> None:
        self._numbers({f"evaluation/{record.name}/{name}": value for name, value in record.metrics.items()}, record.step)

    def finished(self) -> None:
        self._writer.close()

    def _numbers(self, metrics: Any, step: int) -> None:
        values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step, summary=self._summaries.Summary(value=values))
        self._writer.flush()

    def _text(self, tag: str, text: str, step: int) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add(step, summary=text_pb(tag, text))

    def _add(self, step: int, **what: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, **what))
