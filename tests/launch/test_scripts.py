"""The scripts that launch: clean by shellcheck, with help, and torchrun's options read as torchrun reads them."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.launch.jobs import ROOT

SCRIPTS = sorted([*(ROOT / "launch").rglob("*.sh"), *(ROOT / "tests").rglob("*.sh")])
ECHO = "#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n"


def test_shellcheck_finds_nothing() -> None:
    assert len(SCRIPTS) >= 7
    answer = subprocess.run(["shellcheck", "--external-sources", *SCRIPTS], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("script", ["launch/torchrun.sh", "launch/slurm/job.sh"])
def test_help_teaches_every_option_that_is_read(script: str) -> None:
    answer = subprocess.run([ROOT / script, "--help"], capture_output=True, text=True)
    assert answer.returncode == 0 and "shellcheck" not in answer.stdout
    read = re.findall(r"^ +(--[a-z-]+)\)", (ROOT / script).read_text(), re.M)
    assert [option for option in read if option not in answer.stdout] == []


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """A Python that says what it was started with, a word a line."""
    path = tmp_path / "a python"
    path.write_text(ECHO)
    path.chmod(0o755)
    return path


def started(echo: Path, *words: str, **environment: str) -> tuple[int, list[str], str]:
    names = ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    answer = subprocess.run(
        [ROOT / "launch/torchrun.sh", "--python", echo, *words], capture_output=True, text=True, env={**clean, **environment}
    )
    return answer.returncode, answer.stdout.splitlines(), answer.stderr


TRAIN = ["-m", "megatron_rl.cli", "train", "r.yaml", "optimizer.lr=1e-6", "--auto-resume"]
WORDS = ["r.yaml", "optimizer.lr=1e-6"]


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        ([], {}, ["--nproc-per-node=gpu", "--standalone"]),
        (["--nproc_per_node", "2"], {}, ["--nproc-per-node=2", "--standalone"]),
        (
            ["--nnodes=2", "--node-rank", "1", "--master_addr=n0"],
            {"MASTER_PORT": "4"},
            ["--nnodes=2", "--node-rank=1", "--master-addr=n0", "--nproc-per-node=gpu", "--master-port=4"],
        ),
        (
            [],
            {"NNODES": "2", "NPROC_PER_NODE": "8", "NODE_RANK": "0", "MASTER_ADDR": "n0"},
            ["--nnodes=2", "--nproc-per-node=8", "--node-rank=0", "--master-addr=n0"],
        ),
        (
            ["--nnodes", "1:4", "--rdzv-endpoint=n0:29400", "--rdzv_id=7"],
            {},
            ["--nnodes=1:4", "--rdzv-endpoint=n0:29400", "--rdzv-id=7", "--nproc-per-node=gpu", "--rdzv-backend=c10d"],
        ),
        (["--nproc-per-node=3", "--nproc-per-node=3"], {"NPROC_PER_NODE": "8"}, ["--nproc-per-node=3"] * 2 + ["--standalone"]),
    ],
)
def test_torchruns_options_are_its_own(echo: Path, words: list[str], environment: dict[str, str], expected: list[str]) -> None:
    code, said, complained = started(echo, *words, *WORDS, **environment)
    assert (code, complained) == (0, "")
    assert said == ["-m", "megatron_rl.train.elastic", *expected, *TRAIN]


def test_words_of_the_run_arrive_as_they_are(echo: Path) -> None:
    hostile = ["a b.yaml", "rewards=[{name: exact}]", "run.directory=$(touch x); `id`", "sampling.stop=['*']"]
    _, said, _ = started(echo, *hostile)
    assert said[-5:] == [*hostile, "--auto-resume"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nnodes=2", "r.yaml"], "find each other by --master-addr and --node-rank"),
        (["--nnodes=2", "--master-addr=n0", "r.yaml"], "find each other"),
        ([], "launch/torchrun.sh recipe.yaml"),
    ],
)
def test_what_is_missing_is_said(echo: Path, words: list[str], message: str) -> None:
    code, said, complained = started(echo, *words)
    assert (code, said) == (2, []) and message in complained
