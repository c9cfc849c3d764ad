"""Environments that are broken for real, and the doctor in them: a process of its own, as a user starts it."""

import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from megatron_rl.cli import app
from tests.pages import ROOT

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # <linux/prctl.h>, <linux/capability.h>


@dataclass(frozen=True)
class Told:
    """What the doctor said."""

    code: int
    verdict: dict[str, Any]

    def of(self, check: str, level: str) -> list[dict[str, Any]]:
        return [line for line in self.verdict["findings"] if (line["check"], line["level"]) == (check, level)]

    def says(self, check: str, level: str, text: str) -> bool:
        return any(text in line["what"] for line in self.of(check, level))


def environment(*first: Path, **variables: str) -> dict[str, str]:
    """This one, with folders in front of the environment's packages and without what a launcher would have said."""
    own = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    path = os.pathsep.join(map(str, [*first, ROOT]))
    return {**own, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


def start(
    words: Sequence[str], env: Mapping[str, str], before: Callable[[], None] | None = None, options: Sequence[str] = ()
) -> "subprocess.Popen[str]":
    command = [sys.executable, *options, "-m", "megatron_rl.cli", "doctor", "--json", *words]
    return subprocess.Popen(
        command, env=dict(env), preexec_fn=before, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def heard(process: "subprocess.Popen[str]") -> Told:
    with process:
        said, complaints = process.communicate(timeout=240)
    assert said, complaints
    return Told(process.returncode, json.loads(said))


def doctor(
    *words: str,
    env: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
    options: Sequence[str] = (),
) -> Told:
    """`--only` the checks that the words name as +name."""
    return heard(start(_arguments(words), env or environment(), before, options))


def here(*words: str) -> Told:
    """The same in this process, for what needs no other: a start costs more than most checks."""
    result = CliRunner().invoke(app, ["doctor", "--json", *_arguments(words)])
    return Told(result.exit_code, json.loads(result.stdout))


def _arguments(words: Sequence[str]) -> list[str]:
    return [part for word in words for part in (["--only", word[1:]] if word.startswith("+") else [word])]


def distribution(folder: Path, name: str, version: str, **modules: str) -> Path:
    """A folder of packages with one in it: its metadata, and modules by their dotted names."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for module, text in modules.items():
        path = folder / module
        path.mkdir(parents=True, exist_ok=True)
        (path / "__init__.py").write_text(text)
    return folder


def all_but(folder: Path, hidden: str) -> Path:
    """The environment's packages, one of them hidden."""
    import packaging

    folder.mkdir()
    for entry in Path(packaging.__file__).parent.parent.iterdir():
        if not entry.name.lower().replace("_", "-").startswith(hidden):
            (folder / entry.name).symlink_to(entry)
    return folder


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def obey_permissions() -> None:
    """Root does not, unless it has given that up."""
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0) == 0


def program(folder: Path, name: str, text: str) -> Path:
    """A program that stands first in PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\n{text}")
    path.chmod(0o755)
    return folder
