"""The toy run as a user runs it: one command, two ranks, a metrics file, checkpoints, resume, and a clean end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "megatron_rl.cli", "train", str(ROOT / "configs" / "quickstart.yaml")]


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_resumes_identically(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    result = train(f"run.directory={whole}", "run.steps=24", "checkpoint.export_every=10")
    assert result.returncode == 0, result.stderr
    exports = sorted((whole / "exports").iterdir())
    assert [path.name for path in exports] == ["step_00000010", "step_00000020", "step_00000024"]
    assert all({"config.json", "model.safetensors"} <= {path.name for path in export.iterdir()} for export in exports)
    assert "Supervised toy run (no reinforcement learning yet)" in result.stdout
    assert "Warning" not in result.stderr
    losses = [line["negative_log_likelihood"] for line in metrics(whole)]
    assert len(losses) == 24 and losses[-1] < 0.5 * losses[0]

    first = train(f"run.directory={halves}", "run.steps=24", "checkpoint.every=9", "checkpoint.keep_last=9")
    assert first.returncode == 0, first.stderr
    checkpoints = halves / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000009", "step_00000018", "step_00000024"]
    refused = train(f"run.directory={halves}")
    assert refused.returncode == 2
    assert refused.stderr.count("error:") == 1 and "--resume" in refused.stderr  # once, not once a rank

    # As if killed after step 9: the later checkpoint and metrics never were.
    for name in ("step_00000018", "step_00000024"):
        (checkpoints / name).rename(tmp_path / name)
    (halves / "metrics.jsonl").unlink()
    again = train(f"run.directory={halves}", "run.steps=24", "--resume")
    assert again.returncode == 0, again.stderr
    assert "step_00000009" in again.stdout
    assert metrics(halves) == metrics(whole)[9:]


def test_bad_settings_end_before_ranks_start(tmp_path: Path) -> None:
    start = time.monotonic()
    result = train(f"run.directory={tmp_path}", "layout.expert=3", "layout.world_size=3")
    assert result.returncode == 2 and "layout.expert" in result.stderr
    assert time.monotonic() - start < 60
    assert not list(tmp_path.iterdir())
    result = train("layout.world_size=256")
    assert result.returncode == 2 and "torchrun or SLURM" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_the_command(number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, f"run.directory={tmp_path}", "run.steps=100000"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        # Where tests run in the background, shells have the interrupt ignored, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        children = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _parent(path) == process.pid]
        assert len(children) == 2
        process.send_signal(number)
        assert process.wait(timeout=60) not in (0, None)
        deadline = time.monotonic() + 30  # after a kill -9 it is Linux that ends them
        while any(_runs(child) for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)


def _runs(process: int) -> bool:
    """Neither gone nor waiting for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None
