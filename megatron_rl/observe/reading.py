"""What a run has told so far, read from its directory, also while it goes on: only what is new is read again."""

import json
import math
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_rl.config.errors import DataError
from megatron_rl.observe.folder import Folder
from megatron_rl.observe.lines import Line

NEWEST_SPANS = 200  # steps whose phases are kept one by one; of others, how long each phase took


class RunReader:
    """A run's records. `refresh` reads what has come since; a run that was resumed meanwhile is read from its beginning."""

    def __init__(self, directory: Path) -> None:
        self.folder = Folder(directory)
        if not self.folder.run.exists():
            raise DataError(
                f"{directory} is no run's directory: there is no {self.folder.run.name} in it. Give the run.directory of a run "
                "that has started."
            )
        self.metrics, self.times = Table(), Table()
        self.phases = Table()  # seconds by phase
        self.spans: deque[Line] = deque(maxlen=NEWEST_SPANS)
        self.evaluations: list[Line] = []
        self.starts: list[Line] = []
        self._expert_places: list[tuple[int, int]] = []  # step, and where its line begins
        files = (self.folder.metrics, self.folder.timeline, self.folder.experts, self.folder.evaluations)
        self._metrics, self._timeline, self._experts, self._evaluations = map(Follower, files)
        self._about = b""
        self.refresh()

    def refresh(self) -> bool:
        """Read what is new; was there anything?"""
        about = self.folder.run.read_bytes()
        news = [about != self._about]
        if news[0]:
            self._about, self.starts = about, json.loads(about)["starts"]
        news += [self._read_metrics(), self._read_timeline(), self._read_experts(), self._read_evaluations()]
        return any(news)

    @property
    def start(self) -> Line:
        """What runs, as it was told when it last started."""
        return self.starts[-1]

    @property
    def finished(self) -> bool:
        """Has the run said that it came to its end? One that was killed never will."""
        return self.start["finished"] is not None

    @property
    def last_step(self) -> int | None:
        return self.metrics.steps[-1] if self.metrics.steps else None

    def expert_tokens(self, most: int) -> tuple[list[int], NDArray[np.int64] | None]:
        """Steps at equal distances, the last among them, and [steps, moe layers, experts] tokens; None of a dense model."""
        places = self._expert_places
        if not places:
            return [], None
        apart = math.ceil(len(places) / most)
        chosen = places[(len(places) - 1) % apart :: apart]
        found = {}
        with self.folder.experts.open("rb") as file:
            for step, offset in chosen:
                file.seek(offset)
                data = file.readline()
                if data.startswith(b'{"step":%d,' % step) and data.endswith(b"\n"):  # else a resumed run has replaced the file
                    found[step] = json.loads(data)["tokens"]
        return list(found), np.array(list(found.values()), dtype=np.int64) if found else None

    @property
    def expert_steps(self) -> int:
        """Steps whose experts' tokens are known."""
        return len(self._expert_places)

    def traces(self, step: int) -> list[dict[str, Any]]:
        """A step's traces, a dictionary each; none where there are none. Token columns are arrays."""
        path = self.folder.trace(step)
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException):  # a resumed run removes it
            return []
        rows = table.select(["row", "group", "advantage", "ratio", "clipped"]).to_pylist()
        for name in ("log_ratio", "token_advantage"):
            for row, cell in zip(rows, table.column(name), strict=True):
                row[name] = cell.values.to_numpy(zero_copy_only=False) if cell.is_valid else None
        return rows

    def _read_metrics(self) -> bool:
        restarted, found = self._metrics.news()
        if restarted:
            self.metrics, self.times = Table(), Table()
        for _, line in found:
            step = line.pop("step")
            self.times.add(step, {"time": line.pop("time")})
            self.metrics.add(step, line)
        return restarted or bool(found)

    def _read_timeline(self) -> bool:
        restarted, found = self._timeline.news()
        if restarted:
            self.phases = Table()
            self.spans.clear()
        for _, line in found:
            seconds: dict[str, float] = {}
            for span in line["spans"]:
                seconds[span["name"]] = seconds.get(span["name"], 0.0) + span["stop"] - span["start"]
            self.phases.add(line["step"], seconds)
            self.spans.append(line)
        return restarted or bool(found)

    def _read_experts(self) -> bool:
        restarted, found = self._experts.news(parse=False)
        if restarted:
            self._expert_places.clear()
        self._expert_places += [(line["step"], offset) for offset, line in found]
        return restarted or bool(found)

    def _read_evaluations(self) -> bool:
        restarted, found = self._evaluations.news()
        if restarted:
            self.evaluations.clear()
        self.evaluations += [line for _, line in found]
        return restarted or bool(found)


class Table:
    """Numbers by name and step. What a step has none of is nan."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._columns: dict[str, list[float]] = {}

    def add(self, step: int, numbers: dict[str, Any]) -> None:
        for name in numbers.keys() - self._columns.keys():
            self._columns[name] = [math.nan] * len(self.steps)
        self.steps.append(step)
        for name, column in self._columns.items():
            value = numbers.get(name)
            column.append(math.nan if value is None else float(value))

    @property
    def names(self) -> list[str]:
        return sorted(self._columns)

    def column(self, name: str) -> NDArray[np.float64]:
        """[steps] numbers of this name."""
        return np.array(self._columns[name], dtype=np.float64)


class Follower:
    """A file of lines that grows: each call gives what has come since the last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read, self._inode = 0, 0

    def news(self, parse: bool = True) -> tuple[bool, list[tuple[int, Line]]]:
        """Was the file replaced, as a resumed run does, so that these are all its lines; and (offset, line) of each.

        Without `parse` a line is read as far as its step, which stands first.
        """
        if not self._path.exists():
            return False, []
        found = []
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            restarted = self._inode not in (0, status.st_ino) or status.st_size < self._read
            self._inode, at = status.st_ino, 0 if restarted else self._read
            file.seek(at)
            for data in file:
                if not data.endswith(b"\n"):  # it is being written: another time
                    break
                found.append((at, json.loads(data) if parse else _step_alone(data)))
                at += len(data)
        self._read = at
        return restarted, found


def _step_alone(data: bytes) -> Line:
    return {"step": int(data.removeprefix(b'{"step":').split(b",", 1)[0])}
