"""A run on the screen: a line a step that also reads well in a log file, and on a terminal a bar below the lines."""

import atexit
import math
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from megatron_rl.config.observe_settings import ObserveSettings
from megatron_rl.observe.records import EvaluationRecord, RunRecord, Span, StepRecord
from megatron_rl.observe.vocabulary import meaning

# Shown of a step where it has them, with the words of a narrow line.
COLUMNS = {
    "reward/mean": "reward",
    "loss": "loss",
    "negative_log_likelihood": "−log p",
    "clip_fraction": "clipped",
    "old_k3": "kl",
    "mismatch_k3": "mismatch",
    "entropy": "entropy",
    "grad_norm": "grad",
    "response/tokens": "length",
    "rate/tokens": "tok/s",
}
SHORTEST_PHASE = 0.01  # of a step's seconds: shorter phases are left to the report


class ConsoleObserver:
    """Says what happens. `bar` draws one where the console is a terminal."""

    def __init__(self, console: Console, settings: ObserveSettings | None = None) -> None:
        settings = settings or ObserveSettings()
        self._console = console
        self._columns = COLUMNS | {name: name for name in settings.console_metrics if name not in COLUMNS}
        self._every = settings.console_every
        self._bar: Progress | None = None
        self._wants_bar = console.is_terminal and settings.console == "auto"
        self._task: TaskID | None = None
        self._steps: int | None = None

    def started(self, run: RunRecord, step: int) -> None:
        self._steps = run.steps
        what = f"{run.model}, {run.parameters:,} parameters, {run.ranks} rank{'s' if run.ranks != 1 else ''} from {run.host}"
        self._say(Text(f"resumed at step {step}: {what}" if step else what, style="bold"))
        if self._wants_bar:
            self._stop_bar()
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("training", total=run.steps, completed=step)
            self._bar.start()
            atexit.register(self._stop_bar)  # a run that fails leaves the terminal as it was

    def step(self, record: StepRecord) -> None:
        done = record.step + 1
        if done % self._every == 0 or done == self._steps:
            self._say(step_line(record, self._columns, self._steps))
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)

    def evaluated(self, record: EvaluationRecord) -> None:
        numbers = "  ".join(f"{name} {shown(name, value)}" for name, value in record.metrics.items())
        self._say(Text.assemble((f"evaluation of {record.name} after {record.step} steps  ", "bold cyan"), numbers))

    def finished(self) -> None:
        self._stop_bar()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)  # a log file breaks no lines


def step_line(record: StepRecord, columns: Mapping[str, str], steps: int | None) -> Text:
    """`[13/100] step 12  reward 0.512  … · sample 3.1 s, update 2.0 s`: how far it is, and the number it has in files."""
    line = Text(f"[{record.step + 1}/{steps}] " if steps else "").append(f"step {record.step}", "bold")
    for name, title in columns.items():
        if name in record.metrics:
            value = record.metrics[name]
            line.append(f"  {title} ", "dim").append(shown(name, value), "" if math.isfinite(value) else "bold red")
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phase_seconds(record.spans).items())
    return line.append(f"  · {phases}", "dim") if phases else line


def phase_seconds(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds by phase, in the order in which they began; what takes no time to speak of is left out."""
    total: dict[str, float] = {}
    for span in sorted(spans, key=lambda span: span.start):
        total[span.name] = total.get(span.name, 0.0) + span.seconds
    least = SHORTEST_PHASE * _length(spans)
    return {name: seconds for name, seconds in total.items() if seconds >= least}


def _length(spans: Iterable[Span]) -> float:
    """Seconds from the first start to the last stop."""
    ends = [(span.start, span.stop) for span in spans]
    return max((stop for _, stop in ends), default=0.0) - min((start for start, _ in ends), default=0.0)


def shown(name: str, value: float) -> str:
    """A number as its unit is read."""
    unit = meaning(name).unit
    if not math.isfinite(value):
        return str(value)
    if unit == "share":
        return f"{value:.1%}"
    if unit == "ratio":
        return f"{value:.5f}"
    if unit in ("tokens", "tokens/s"):
        return f"{value:,.0f}"
    return f"{value:.3f}" if value == 0 or 1e-2 <= abs(value) < 1e4 else f"{value:.2e}"
