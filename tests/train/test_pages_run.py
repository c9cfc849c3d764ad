"""Every command in the documentation is run, page by page, by the program that this is.

As it stands, but for what `SMALLER` and `Reader` say: fewer steps, one rank, in this process; a server that is up already; and
models, recipes and runs of the reader's own under the names that the pages give them.
"""

import asyncio
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.load import load_settings, names_settings_file
from megatron_rl.rollout.server import Server, ServerOptions, free_ports
from megatron_rl.train.toy_model import write_toy_model
from megatron_rl.weights.toy_model import ToyShape
from tests.pages import PAGES, ROOT, Line, Script, commands, scripts, short

ONE_RANK = ["layout.world_size=1", "layout.expert=1", "layout.tensor=1", "device.threads=1"]
FEW = ["sampling.groups=4", "sampling.group_size=4", "evaluation.prompts=4", "evaluation.samples=2", "optimizer.warmup_steps=0"]
SMALLER = {
    "train": [*ONE_RANK, *FEW, "run.steps=2"],
    "rollout": [*ONE_RANK, *FEW, "run.steps=1"],
    "eval": [*ONE_RANK, *FEW],
    "sft": [*ONE_RANK, "optimizer.warmup_steps=0", "run.steps=4", "supervised.batch=8"],
}
MODELS = ("Qwen3-30B-A3B", "models/qwen3", "checkpoints/base")  # pages' names for a checkpoint that the reader has
TUTORIAL = ROOT / "docs/tutorial.md"
NOT_HERE = {
    "--watch": "it ends with Ctrl-C alone, which tests/observe presses",
    "--kubernetes": "its paths are those of the pods; tests/launch reads the manifest",
}


@dataclass
class Reader:
    """Somebody who types what a page says, in the present folder, and has these servers."""

    url: str

    def reads(self, page: Path) -> list[str]:
        """Types all that the page says to; returns what went wrong."""
        typed: list[Line | Script] = [line for line in commands(page) if line.whole and line.words]
        typed = sorted([*typed, *scripts(page)], key=lambda each: each.number)
        failures = [self.starts(each) if isinstance(each, Script) else self.types(each) for each in typed]
        return [failure for failure in failures if failure is not None]

    def types(self, line: Line) -> str | None:
        if any(word in NOT_HERE for word in line.words):
            return None
        words = self._smaller([re.sub(r"http://(127\.0\.0\.1|node\d):\d+", self.url, word) for word in line.words])
        result = CliRunner().invoke(app, words)
        if result.exit_code == 0 or "0 samples match" in result.output:
            return None
        ended = f"ended with {result.exit_code}: {result.output[-1500:]}{result.exception!r}"
        return f"{line}\n  run as {shlex.join(words)}\n  {ended}"

    def starts(self, script: Script) -> str | None:
        trains = "run.steps=2" in script.arguments
        own = [*SMALLER["train"], f"servers.urls=[{self.url}]"] if trains else []
        with pytest.MonkeyPatch.context() as patch, open(script.output or "printed", "w") as output:
            patch.setattr(sys, "argv", [script.path, *script.arguments, *own])
            patch.setattr(sys, "stdout", output)
            runpy.run_path(script.path, run_name="__main__")
        return None

    def _smaller(self, words: list[str]) -> list[str]:
        """What is run in the place of a command."""
        command, *rest = words
        if command == "serve":
            return [*words, "--dry-run"]
        if command == "launch":  # as many ranks as the page has machines for
            return [*[word for word in words if word != "--submit"], "layout.world_size=null"]
        if command == "doctor":
            return [*words, "--only", "settings", "--only", "folder"]  # tests/doctor makes all checks
        if command == "mismatch":
            return [*words, "--tokens", "16", "--tolerance", "100"]  # the server has the weights of whatever page was last
        if command == "report":
            return [word for word in words if word != "--open"]
        if command == "convert":
            return [re.sub(r"^8$", "2", word) for word in words]
        if command == "bank":
            return [re.sub(r"^12$", "1", word) for word in words]
        if command == "toy":
            shutil.rmtree(rest[0], ignore_errors=True)
        if command not in SMALLER or "--dry-run" in words:
            return words
        if "--resume" in rest:
            return [*[word for word in words if not word.startswith("run.steps=")], "run.steps=3"]
        given = [*rest, *SMALLER[command]]
        if command != "sft" and not any(word.startswith(("servers.urls=", "bank.replay=")) for word in rest):
            given.append(f"servers.urls=[{self.url}]")
        file, *changes = [word for word in given if "=" in word or names_settings_file(word)]
        shutil.rmtree(load_settings(Path(file), changes).run.directory, ignore_errors=True)
        return [command, *given]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The toy's checkpoint, and a server for it."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy_model(folder / "model", ToyShape())
    options = ServerOptions(folder / "model", folder / "log", {"max_total_tokens": 16384}, device="cpu", threads=1)
    (port,) = free_ports(1)
    with Server.start(options, port) as server:
        asyncio.run(server.ready())
        yield folder / "model", server.url


@pytest.fixture(scope="module")
def after_the_tutorial(toy: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Reader, list[str]]]:
    """A reader who has done the tutorial in this folder; and what went wrong in it."""
    model, url = toy
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "docs"):
        (folder / name).symlink_to(ROOT / name)
    for name in MODELS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(model)
    (folder / "sweep.txt").write_text("optimizer.lr=1e-6\noptimizer.lr=2e-6 objective.options.clip_low=1e-3\n")
    (folder / "recipe.yaml").write_text("include: configs/quickstart.yaml\nrun: {directory: runs/mine}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(ROOT / "docs/examples")
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'docs/examples'}")
        reader = Reader(url)
        failures = reader.reads(TUTORIAL)
        for name in ("my-run", "math"):  # pages' names for runs that the reader has
            shutil.copytree("runs/quickstart", f"runs/{name}")
            *_, newest = sorted(Path(f"runs/{name}/checkpoints").iterdir())
            newest.rename(newest.with_name("step_00000200"))
        (folder / "runs/cold-start").symlink_to("quickstart-sft")
        yield reader, failures


def test_the_tutorial(after_the_tutorial: tuple[Reader, list[str]]) -> None:
    assert after_the_tutorial[1] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != TUTORIAL], ids=short)
def test_a_page(page: Path, after_the_tutorial: tuple[Reader, list[str]]) -> None:
    assert after_the_tutorial[0].reads(page) == []
