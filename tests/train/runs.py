"""Runs of reinforcement learning for tests: a tiny model, and servers that are there already."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from megatron_rl.config.load import dump_settings
from megatron_rl.config.settings import Settings
from tests.servers import VOCABULARY, TinyServer

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0  # seconds, far above what anything takes
# What a run measures of its machine and its servers, not of its learning.
MEASURED = ("time", "seconds/", "rate/", "memory/", "publish/", "sampling/")


def run_settings(server: TinyServer, folder: Path, **sections: Any) -> Settings:
    """Every eighth token ends a response, and short ones are rewarded: there is something to learn."""
    defaults: dict[str, Any] = {
        "policy": {"init": server.model},
        "precision": {"dtype": "float32"},
        "optimizer": {"lr": 1e-3},
        "batch": {"max_tokens": 512, "minibatches": 2},
        "data": {"sources": [{"path": "task:arithmetic"}], "validation_share": 0.01},
        "rewards": [{"name": "length", "options": {"high": 4}}],
        "sampling": {
            "groups": 4, "group_size": 4, "max_new_tokens": 12, "stop_token_ids": list(range(3, VOCABULARY, 8)),
        },
        "servers": {"urls": [server.server.url]},
        "publish": {"probe_sequences": 1, "probe_tokens": 16},
        "observe": {"traces": 0},
        "run": {"directory": folder, "steps": 4},
    }  # fmt: skip
    given = {name: {**defaults.get(name, {}), **section} for name, section in sections.items()}
    return Settings.model_validate({**defaults, **given})


class Run:
    """`megatron-rl train` as a user starts it."""

    def __init__(self, *arguments: str, log: Path) -> None:
        self.log = log
        with open(log, "a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_rl.cli", "train", *arguments],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                # Where tests run in the background, shells have the interrupt ignored, and what they start inherits that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
            )

    def until(self, folder: Path, lines: int) -> None:
        """Wait for so many steps to be told, or for the end."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and len(metrics(folder)) < lines:
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout
        return sorted(map(int, found.split()))

    def kill(self, *processes: int) -> None:
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def end(self) -> int:
        """Its exit code."""
        return self.process.wait(PATIENCE)

    @property
    def said(self) -> str:
        return self.log.read_text()


def written(settings: Settings) -> str:
    """A settings file beside the run's folder."""
    path = settings.run.directory.with_suffix(".yaml")
    path.write_text(dump_settings(settings))
    return str(path)


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def learned(folder: Path) -> list[dict[str, Any]]:
    """What metrics say of learning."""
    return [{name: value for name, value in line.items() if not name.startswith(MEASURED)} for line in metrics(folder)]


def state(folder: Path, step: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint, bit for bit: weights, moments, random generators."""
    found: dict[str, bytes] = {}
    for path in sorted((folder / "checkpoints" / f"step_{step:08}").glob("*.safetensors")):
        tensors: dict[str, np.ndarray] = load_file(path)
        found |= {f"{path.name}:{name}": tensor.tobytes() for name, tensor in tensors.items()}
    assert found
    return found
