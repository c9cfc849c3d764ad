"""Screen, TensorBoard and W&B: what is told arrives, also of a run that was resumed."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import load_settings
from megatron_rl.config.observe_settings import ObserveSettings
from megatron_rl.config.settings import Settings
from megatron_rl.observe import everyone, observers_of
from megatron_rl.observe.console import ConsoleObserver, shown
from megatron_rl.observe.journal import Journal
from megatron_rl.observe.records import EvaluationRecord, Span, StepRecord
from megatron_rl.observe.tensorboard import TensorBoardObserver
from tests.observe.runs import MadeRun, run_record


def settings_of(directory: Path, *overrides: str) -> Settings:
    return load_settings(None, ["policy.config=a-model", f"run.directory={directory}", *overrides])


def said(observer_settings: ObserveSettings | None = None, *, terminal: bool = False) -> str:
    """What appears on a console of a short run."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100, highlight=False)
    MadeRun(evaluate_every=2).tell(ConsoleObserver(console, observer_settings), 0, 4)
    return screen.getvalue()


# -- screen ------------------------------------------------------------------------------------------------------------


def test_a_log_file_gets_a_line_a_step_and_nothing_else() -> None:
    lines = said().splitlines()
    assert lines[0] == "qwen3_moe, 1,234,567 parameters, 2 ranks from node7"
    steps = [line for line in lines if line.startswith("[")]
    assert [line.split("  ")[0] for line in steps] == [f"[{step + 1}/4] step {step}" for step in range(4)]
    assert re.search(
        r"reward 0\.\d{3}  loss .*  clipped \d+\.\d%  kl 1\.\d\de-04  mismatch \d\.\d\de-05  .*  length 60  tok/s 2,011 "
        r" · wait 1\.0 s, sample 10\.5 s, score 0\.5 s, old 2\.0 s, update 5\.5 s, publish 1\.0 s$",
        steps[0],
    ), steps[0]
    assert len(lines) == 1 + 4 + 3 and sum(line.startswith("evaluation of held-out after") for line in lines) == 3
    assert "\x1b" not in said()


def test_a_terminal_gets_a_bar_as_well() -> None:
    drawn = said(terminal=True)
    assert "training" in drawn and "4/4" in drawn and "step 3" in drawn
    lines = said(ObserveSettings(console="lines"), terminal=True)
    assert "training" not in lines and "step 3" in lines


def test_metrics_of_ones_own_and_numbers_that_are_none() -> None:
    screen = io.StringIO()
    observer = ConsoleObserver(Console(file=screen, width=200), ObserveSettings(console_metrics=("my/metric",)))
    observer.started(run_record(), 7)
    observer.step(StepRecord(7, {"loss": float("nan"), "my/metric": 12345.678}))
    text = screen.getvalue()
    assert "resumed at step 7" in text and "loss nan" in text and "my/metric 1.23e+04" in text


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("clip_fraction", 0.1234, "12.3%"),
        ("response/tokens", 1234.5, "1,234"),
        ("loss", 0.0, "0.000"),
        ("loss", -0.5, "-0.500"),
        ("loss", 1e-5, "1.00e-05"),
        ("ratio", 1.00012, "1.00012"),
        ("loss", float("inf"), "inf"),
    ],
)
def test_numbers_are_read_by_their_unit(name: str, value: float, text: str) -> None:
    assert shown(name, value) == text


def test_phases_that_overlap_or_come_again_are_added_up() -> None:
    screen = io.StringIO()
    observer = ConsoleObserver(Console(file=screen, width=200))
    spans = [
        Span("update", 10.0, 12.0),
        Span("sample", 9.0, 13.0, "rollout"),
        Span("update", 12.0, 13.0),
        Span("score", 9.0, 9.001),
    ]
    observer.step(StepRecord(0, {}, spans))
    assert screen.getvalue().strip() == "step 0  · sample 4.0 s, update 3.0 s"


# -- who is told -------------------------------------------------------------------------------------------------------


def test_the_journal_is_always_told_and_first(tmp_path: Path) -> None:
    kinds = [type(observer).__name__ for observer in observers_of(settings_of(tmp_path, "observe.tensorboard=true"))]
    assert kinds == ["Journal", "TensorBoardObserver", "ConsoleObserver"]
    assert [type(observer) for observer in observers_of(settings_of(tmp_path, "observe.console=off"))] == [Journal]
    assert not list(tmp_path.iterdir())  # nothing is written before a run starts


def test_everyone_is_told_in_order() -> None:
    calls: list[tuple[str, str]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def started(self, run: object, step: int) -> None:
            calls.append((self.name, f"started {step}"))

        def step(self, record: StepRecord) -> None:
            calls.append((self.name, f"step {record.step}"))

        def evaluated(self, record: EvaluationRecord) -> None:
            calls.append((self.name, "evaluated"))

        def finished(self) -> None:
            calls.append((self.name, "finished"))

    MadeRun().tell(everyone([Recorder("a"), Recorder("b")]), 0, 1)
    events = ["started 0", "evaluated", "step 0", "evaluated", "finished"]
    assert calls == [(name, event) for event in events for name in "ab"]


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def test_tensorboard_reads_what_was_told_also_of_a_resumed_run(tmp_path: Path) -> None:
    """The steps that a resumed run does again are there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = MadeRun(evaluate_every=3)
    run.tell(TensorBoardObserver(tmp_path), 0, 7, steps=10)
    run.tell(TensorBoardObserver(tmp_path), 4, 10)
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {event.step: event.value for event in events.Scalars("reward/mean")}
    assert [event.step for event in events.Scalars("reward/mean")] == list(range(10))
    for step, value in found.items():
        assert value == pytest.approx(run.record(step, 10).metrics["reward/mean"], rel=1e-6)
    assert [event.step for event in events.Scalars("evaluation/held-out/pass@4")] == [0, 3, 6, 9, 10]
    assert "settings/text_summary" in events.Tags()["tensors"] or "settings" in events.Tags()["tensors"]


# -- W&B ---------------------------------------------------------------------------------------------------------------

RECORDER = """
calls = []


class Error(Exception):
    pass


class Run:
    def define_metric(self, *names, **options):
        calls.append(("define_metric", names, options))

    def log(self, numbers):
        calls.append(("log", numbers))

    def finish(self):
        calls.append(("finish",))


def init(**options):
    calls.append(("init", options))
    if options["mode"] == "online":
        raise Error("no key")
    return Run()
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package of this name that writes down what it is told: the real one is not in the locked environment."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/wandb.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    sys.modules.pop("wandb", None)


def test_wandb_that_is_missing_is_said_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SettingsError, match=r"observe\.wandb_project = mine: .* Install it \(uv pip install wandb\)"):
        observers_of(settings_of(tmp_path, "observe.wandb_project=mine"))
    observers_of(settings_of(tmp_path, "observe.wandb_project=mine", "observe.wandb_mode=disabled"))


def test_wandb_is_told_steps_of_its_own(tmp_path: Path, wandb: Any) -> None:
    chosen = settings_of(tmp_path / "run", "observe.wandb_project=mine", "observe.wandb_mode=offline", "observe.console=off")
    _, observer = observers_of(chosen)
    MadeRun().tell(observer, 0, 2)
    _, again = observers_of(chosen)
    MadeRun().tell(again, 1, 2)
    starts = [call[1] for call in wandb.calls if call[0] == "init"]
    assert starts[0]["id"] == starts[1]["id"] and starts[0]["mode"] == "offline" and starts[0]["config"]["run"] == {"steps": 40}
    logged = [call[1] for call in wandb.calls if call[0] == "log"]
    assert [numbers["train/step"] for numbers in logged] == [0, 0, 1, 2, 1, 2]  # evaluation, step, step, evaluation; again
    assert logged[1]["train/reward/mean"] == MadeRun().record(0, 2).metrics["reward/mean"]
    assert logged[0]["evaluation/held-out/pass@4"] == pytest.approx(0.2)
    assert wandb.calls[-1] == ("finish",)


def test_wandb_that_refuses_ends_with_advice(tmp_path: Path, wandb: Any) -> None:
    chosen = settings_of(tmp_path / "run", "observe.wandb_project=mine", "observe.console=off")
    _, observer = observers_of(chosen)
    with pytest.raises(SettingsError, match=r"W&B cannot be told: no key\. Log in \(wandb login\), or set observe\.wandb_mode"):
        observer.started(run_record(), 0)
