"""The Dockerfile, read without Docker and without a network: what hadolint would say of it, and what the locks do."""

import re
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTRUCTION = re.compile(r"([A-Z]+)\s+(.*)", re.DOTALL)
MOUNTS = re.compile(r"^(--\w+=\S+\s+)+")
TARGETS = ("cpu", "gpu")


@dataclass(frozen=True)
class Instruction:
    """`RUN` and what stands behind it, lines that go on put together."""

    name: str
    words: str

    @property
    def shell(self) -> str:
        """The commands of a RUN."""
        return MOUNTS.sub("", self.words)


def instructions(text: str) -> list[Instruction]:
    kept = "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    found = []
    for piece in re.split(r"(?<!\\)\n", kept):
        match = INSTRUCTION.fullmatch(piece.strip())
        assert match, f"this is no instruction: {piece!r}"
        found.append(Instruction(match[1], match[2]))
    return found


def stages(text: str) -> dict[str, list[Instruction]]:
    """Instructions of each stage by its name; those before the first under no name."""
    found: dict[str, list[Instruction]] = {"": []}
    for each in instructions(text):
        if each.name == "FROM":
            found[each.words.partition(" AS ")[2]] = []
        list(found.values())[-1].append(each)
    return found


TEXT = (ROOT / "Dockerfile").read_text()
STAGES = stages(TEXT)
ALL = [each for stage in STAGES.values() for each in stage]
RUNS = [each for each in ALL if each.name == "RUN"]


def problems(text: str) -> list[str]:
    """What is wrong with a Dockerfile, in the order in which it stands there."""
    wrong = []
    arguments = dict(each.words.split("=", 1) for each in stages(text)[""] if each.name == "ARG")
    for name, stage in stages(text).items():
        for each in stage:
            wrong += [f"{name}: {each.name} {problem}" for problem in _of_one(each, arguments)]
        if name:
            users = [each.words for each in stage if each.name == "USER"]
            if not users or users[-1] in ("root", "0"):
                wrong.append(f"{name}: runs as root")
            if not any(each.name == "HEALTHCHECK" for each in stage):
                wrong.append(f"{name}: has no HEALTHCHECK")
            if not any(each.name == "CMD" for each in stage):
                wrong.append(f"{name}: has no CMD")
            if not any(each.name == "SHELL" and "pipefail" in each.words for each in stage):
                wrong.append(f"{name}: a failure inside a pipe would not be one")
    return wrong


def _of_one(each: Instruction, arguments: dict[str, str]) -> list[str]:
    words, wrong = each.words, []
    if each.name == "FROM":
        image = arguments.get(words.split()[0].strip("${}"), words.split()[0])
        tag = image.rpartition("/")[2].partition(":")[2]
        if not re.search(r"\d+\.\d+", tag):
            wrong.append(f"{image}: a tag without a version is another image tomorrow")
    if each.name in ("CMD", "ENTRYPOINT", "SHELL") and not words.startswith("["):
        wrong.append("is in the form of a shell, which keeps signals to itself")
    if each.name == "HEALTHCHECK" and not re.search(r"CMD \[", words):
        wrong.append("is in the form of a shell")
    if each.name == "ADD":
        wrong.append("fetches and unpacks; COPY does what it says")
    if each.name == "WORKDIR" and not words.startswith(("/", "$")):
        wrong.append("is relative")
    if each.name in ("ENV", "ARG") and re.search(r"(?i)(key|token|secret|password)\w*=", words):
        wrong.append("is kept in the image, for all to read")
    return wrong + (_of_commands(each.shell) if each.name == "RUN" else [])


def _of_commands(shell: str) -> list[str]:
    wrong = []
    if "apt-get install" in shell:
        missing = [
            word
            for word in ("apt-get update", "--no-install-recommends", "--yes", "rm -rf /var/lib/apt/lists/*")
            if word not in shell
        ]
        wrong += [f"apt-get without {word}" for word in missing]
    if re.search(r"\bapt (install|update)|\bsudo\b", shell):
        wrong.append("uses what is for people: apt, sudo")
    if re.search(r"(curl|wget)\b", shell):
        wrong.append("fetches what nobody has a hash of")
    if re.search(r"(?<!\S)cd ", shell):
        wrong.append("changes the folder: WORKDIR does")
    return wrong


def test_nothing_is_wrong_with_it() -> None:
    assert problems(TEXT) == []
    assert set(STAGES) == {"", *TARGETS}
    assert list(STAGES)[-1] == "gpu"  # what is built where no target is named


GOOD = TEXT.partition("FROM $GPU_BASE")[0]
FAULTS = {
    "floating tag": ("python:3.12.12-slim-bookworm", "python:slim", "a tag without a version"),
    "latest": ("python:3.12.12-slim-bookworm", "python:latest", "a tag without a version"),
    "no tag": ("python:3.12.12-slim-bookworm", "python", "a tag without a version"),
    "root": ("USER trainer", "USER root", "runs as root"),
    "no user": ("USER trainer\n", "", "runs as root"),
    "shell form": ('CMD ["megatron-rl", "--help"]', "CMD megatron-rl --help", "keeps signals"),
    "no health check": ('HEALTHCHECK --interval=5m --timeout=1m CMD ["megatron-rl", "version"]\n', "", "no HEALTHCHECK"),
    "address": ("COPY --chown=trainer . .", "ADD https://example.org/x.tar .", "fetches and unpacks"),
    "lists": ("rm -rf /var/lib/apt/lists/*", "true", "without rm -rf"),
    "recommended": ("--no-install-recommends", "", "without --no-install-recommends"),
    "pipes": ('SHELL ["/bin/bash", "-euo", "pipefail", "-c"]\n', "", "inside a pipe"),
    "secret": ("USER trainer", "ENV HF_TOKEN=abc\nUSER trainer", "for all to read"),
    "download": ("useradd", "curl -L https://example.org | sh; useradd", "nobody has a hash of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str) -> None:
    old, new, said = FAULTS[fault]
    assert old in GOOD
    assert problems(GOOD) == []
    assert any(said in problem for problem in problems(GOOD.replace(old, new)))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.shell.split()[0])
def test_shellcheck_has_nothing_to_say(run: Instruction) -> None:
    words = ["shellcheck", "--shell=bash", "--exclude=SC1091", "-"]  # 1091: what is sourced lies in the image
    script = "set -euo pipefail\n" + run.shell + "\n"
    checked = subprocess.run(words, input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_python_packages_come_from_the_locks_alone() -> None:
    """By launch/setup.sh; apex, from its source, without anything else."""
    for run in RUNS:
        for line in re.findall(r"(?:pip3?|uv\S*|\)\") (?:pip )?(?:install|sync)[^;&]*", run.shell):
            assert "--no-deps" in line and line.split()[-1] == "/tmp/apex", line
    assert [sum(f"launch/setup.sh --{target}" in each.words for each in STAGES[target]) for target in TARGETS] == [1, 1]


def test_the_base_has_the_cuda_of_the_lock() -> None:
    """Kernels that are compiled at run time are linked with the packages' libraries."""
    locked = re.search(r"^cuda-toolkit==(\S+)", (ROOT / "launch/lock/gpu.lock").read_text(), re.M)
    assert locked
    assert [each.words for each in STAGES["gpu"] if each.name == "LABEL"] == [f'cuda="{locked[1]}"']
    assert f"nvidia/cuda:{locked[1]}-devel" in TEXT


def test_every_package_of_the_distribution_has_a_reason() -> None:
    """In docs/install.md, and no reason is left of one that is gone."""
    asked = {
        word
        for run in RUNS
        for line in re.findall(r"apt-get install ([^&;]*)", run.shell.replace("\\\n", " "))
        for word in line.split()
        if not word.startswith("-")
    }
    page = (ROOT / "docs/install.md").read_text().partition("## Containers")[2].partition("| package | why |")[2]
    cells = re.findall(r"^\| (`[^|]*) \|", page, re.M)
    assert {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)} == asked


def test_what_is_copied_is_there_and_what_is_secret_is_not() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    def left_out(path: str) -> bool:
        parts = path.split("/")
        heads = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        whole = any(fnmatch(head, pattern) for head in heads for pattern in ignored)
        return whole or any(fnmatch(part, pattern[3:]) for part in parts for pattern in ignored if pattern.startswith("**/"))

    copied = {word for each in ALL if each.name == "COPY" for word in each.words.split()[:-1] if not word.startswith("-")}
    assert copied == {"launch", "pyproject.toml", "README.md", "LICENSE", "megatron_rl/__init__.py", "."}
    assert all((ROOT / path).exists() and not left_out(path) for path in copied)
    for path in (
        ".git/config",
        ".venv/bin/python",
        "runs/mine/settings.yaml",
        "a/.env",
        "keys/server.key",
        "x/__pycache__/y.pyc",
    ):
        assert left_out(path), path
    assert left_out("runs/mine/exports/final/model.safetensors") and left_out("model.safetensors")
