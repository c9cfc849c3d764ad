"""The files in a run's directory that tell what the run did. docs/report.md describes them."""

import re
from dataclasses import dataclass
from pathlib import Path

TRACE = re.compile(r"step-(\d+)\.parquet")


@dataclass(frozen=True)
class Folder:
    """Where each kind of record lies."""

    path: Path

    @property
    def run(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timeline(self) -> Path:
        return self.path / "timeline.jsonl"

    @property
    def experts(self) -> Path:
        return self.path / "experts.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def traces(self) -> Path:
        return self.path / "traces"

    def trace(self, step: int) -> Path:
        return self.traces / f"step-{step:06d}.parquet"

    def traced(self) -> dict[int, Path]:
        """Traced steps, rising."""
        found = {int(match[1]): path for path in self.traces.glob("*") if (match := TRACE.fullmatch(path.name))}
        return dict(sorted(found.items()))
