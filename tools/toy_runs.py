"""Real runs on a toy, for the studies: a model that can answer, one server that all runs share, results that survive a kill.

A run is configs/quickstart.yaml on one rank with settings that differ, written as on the command line. The toy is the
quickstart's own: made once, taught once, and kept in the study's folder.
"""

import argparse
import asyncio
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import Settings
from megatron_rl.observe.observer import Observer
from megatron_rl.observe.records import EvaluationRecord, RunRecord, StepRecord
from megatron_rl.rollout.environment import Environment, Observation
from megatron_rl.rollout.server import ServerOptions, start_servers
from megatron_rl.train import supervised
from megatron_rl.train.run import train
from megatron_rl.train.toy_model import write_toy_model
from megatron_rl.types import Prompt

ROOT = Path(__file__).parent.parent
QUICKSTART, COLD_START = ROOT / "configs/quickstart.yaml", ROOT / "configs/quickstart-sft.yaml"
FOLDER = ROOT / "runs/study"  # where studies work, unless told otherwise
ONE_RANK = ("layout.world_size=1", "layout.expert=1", "device.kind=cpu", "device.threads=1")
NO_EXTRAS = ("evaluation.every=0", "checkpoint.every=0", "checkpoint.export_every=0", "observe.look_every=0")


class Stopped(Exception):
    """A run was told to stop before its end."""


# -- runs ------------------------------------------------------------------------------------------------------------------


class Told(Observer):
    """Keeps the metrics of every step."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.steps: list[Mapping[str, float]] = []
        self._advance = advance

    def started(self, run: RunRecord, step: int) -> None:
        return

    def step(self, record: StepRecord) -> None:
        self.steps.append(record.metrics)
        self._advance()

    def evaluated(self, record: EvaluationRecord) -> None:
        return

    def finished(self) -> None:
        return


@dataclass(frozen=True)
class Laboratory:
    """What runs share."""

    folder: Path
    model: Path  # the cold-started toy
    url: str  # of the server

    def settings(self, name: str, overrides: Sequence[str]) -> Settings:
        """Of the run of this name, on one rank, beginning with the cold-started toy."""
        given = [f"policy.init={self.model}", f"servers.urls=['{self.url}']", f"run.directory={self.folder / 'runs' / name}"]
        return load_settings(QUICKSTART, [*ONE_RANK, *NO_EXTRAS, *given, *overrides])

    def run(self, name: str, overrides: Sequence[str], advance: Callable[[], None]) -> list[Mapping[str, float]]:
        """Train from the beginning; the metrics of every step. An earlier try is removed."""
        settings = self.settings(name, overrides)
        shutil.rmtree(settings.run.directory, ignore_errors=True)
        told = Told(advance)
        state = train(settings, observers=[told])
        if state.step < settings.run.steps:
            raise Stopped(f"{name} was told to stop after {state.step} of {settings.run.steps} steps")
        return told.steps


def cold_started(folder: Path) -> Path:
    """The quickstart's toy, able to answer; made if it is not there yet."""
    toy, run = folder / "toy", folder / "sft"
    model = run / "exports" / supervised.LAST_EXPORT
    if not toy.exists():
        write_toy_model(toy)
    if not model.exists():
        supervised.main(load_settings(COLD_START, [*ONE_RANK, f"policy.init={toy}", f"run.directory={run}"]), resume=True)
    return model


@contextmanager
def laboratory(folder: Path, **arguments: Any) -> Iterator[Laboratory]:
    """A model and a server, as long as they are needed. `arguments` are further ones of SGLang's own."""
    model = cold_started(folder)
    options = ServerOptions(model, folder / "server.log", arguments, device="cpu", threads=1)
    (server,) = asyncio.run(start_servers([options]))
    with server:
        yield Laboratory(folder, model, server.url)


# -- results ---------------------------------------------------------------------------------------------------------------


class Results:
    """What runs gave, by name, in a JSON file that is written after each; what it has is not done again."""

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        """`conditions` are what all runs have in common: a file made under others is refused."""
        self.path, self.conditions = path, dict(conditions)
        self.runs: dict[str, dict[str, Any]] = {}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["conditions"] != self.conditions:
                raise SystemExit(
                    f"{path} was made under {found['conditions']}, and now it is {self.conditions}. Remove the file to begin "
                    "anew, or name another with --results."
                )
            self.runs = found["runs"]

    def add(self, name: str, found: Mapping[str, Any], order: Sequence[str]) -> None:
        """One line a run, in the given order, so that a file's changes can be read."""
        self.runs[name] = dict(found)
        self.runs = {name: self.runs[name] for name in order if name in self.runs}
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(run, ensure_ascii=False)}" for name, run in self.runs.items())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(
            f'{{"conditions": {json.dumps(self.conditions)},\n"runs": {{\n{lines}\n}}}}\n',
            encoding="utf-8",
        )
        partial.replace(self.path)


def rounded(values: Sequence[float], digits: int = 6) -> list[float]:
    """To as many significant digits as anybody reads."""
    return [float(f"{value:.{digits}g}") for value in values]


def series(steps: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, list[float]]:
    """A list by name of those that every step has."""
    return {name: rounded([step[name] for step in steps]) for name in names if all(name in step for step in steps)}


def not_finite(steps: Sequence[Mapping[str, float]]) -> dict[str, list[int]]:
    """The metrics that were nan or infinite, each with its steps."""
    names = sorted({name for step in steps for name in step})
    found = {name: [i for i, step in enumerate(steps) if not math.isfinite(step.get(name, 0.0))] for name in names}
    return {name: where for name, where in found.items() if where}


# -- a study's command -----------------------------------------------------------------------------------------------------


def study_parser(description: str | None, results: Path) -> argparse.ArgumentParser:
    """The options that all studies have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", metavar="NAME", action="append", help="runs whose names begin so, done again if need be; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="name the runs and which are done, and do nothing")
    parser.add_argument("--page", action="store_true", help="write the pages from the results that there are, train nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the toy, the server's log and the runs go")
    parser.add_argument("--results", type=Path, default=results, help="the results file; runs that it has are not done again")
    return parser


def chosen(plan: Sequence[str], done: Mapping[str, Any], only: Sequence[str] | None) -> list[str]:
    """The runs to do: those that are named, or those that are missing."""
    if only is None:
        return [name for name in plan if name not in done]
    found = [name for name in plan if name.startswith(tuple(only))]
    if not found:
        raise SystemExit(f"--only {' --only '.join(only)}: no run's name begins so. --list names them.")
    return found


def show(plan: Sequence[str], done: Mapping[str, Any]) -> None:
    for name in plan:
        print(f"{'done' if name in done else '    '}  {name}")


@contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield progress


# -- a task of several turns -----------------------------------------------------------------------------------------------


class DigitsAgain(Environment):
    """The quickstart's task in two turns: after the answer it asks for the same digits, falling. A right turn earns 1."""

    async def reset(self, prompt: Prompt) -> None:
        self.answer, self.turn = str(prompt.fields["answer"]), 0

    async def step(self, text: str) -> Observation:
        self.turn += 1
        reward = float(text.strip() == self.answer)
        if self.turn == 2:
            return Observation(reward=reward, done=True)
        return Observation(({"role": "user", "content": self.answer[::-1]},), reward)
