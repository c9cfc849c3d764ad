"""Supervised fine-tuning as a user runs it: one command, two ranks, metrics, checkpoints, resume, an export, a clean end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.load import load_settings
from megatron_rl.data.prompts import open_prompts, open_tokenizer
from megatron_rl.train.toy_model import write_toy_model
from tests.train.runs import learned, metrics

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "megatron_rl.cli", "sft"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a short run on two ranks, from a toy model that lies beside them."""
    folder = tmp_path_factory.mktemp("recipe")
    write_toy_model(folder / "toy", seed=3)
    path = folder / "recipe.yaml"
    path.write_text(
        "policy: {init: toy}\nlayout: {world_size: 2, expert: 2}\nprecision: {dtype: float32}\n"
        "optimizer: {lr: 3.0e-3, warmup_steps: 3, lr_schedule: linear, min_lr: 1.0e-3}\nbatch: {max_tokens: 256}\n"
        "supervised: {batch: 16, held_out: 20}\ncheckpoint: {every: 9, keep_last: 9, export_dtype: float32}\n"
        "data:\n  sources: [{path: 'task:digits', options: {rows: 400}}]\n  validation_share: 0.1\n"
        f"  cache: {folder / 'cache'}\nrun: {{steps: 24}}\n"
    )
    return path


def sft(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=300)


def evaluations(folder: Path) -> dict[int, float]:
    """Held-out loss by steps done."""
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} == {"held_out"}
    return {line["step"]: line["metrics"]["negative_log_likelihood"] for line in lines}


def loss_by_transformers(model: Path, recipe: Path) -> float:
    """Mean −log p of the held-out answers and their ends, each asked on its own of the exported model."""
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    settings = load_settings(recipe, [])
    prompts = open_prompts(settings, open_tokenizer(settings), "validation").sources[0].evenly(settings.supervised.held_out)
    losses: list[float] = []
    for prompt in prompts:
        talk = [{"role": "user", "content": prompt.messages[-1]["content"]}]
        asked = tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
        answer = tokenizer(prompt.fields["answer"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            scores = loaded(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1].log_softmax(-1)
        losses += (-scores[torch.arange(len(answer)), answer]).tolist()
    return fmean(losses)


def test_it_learns_and_resumes_identically(recipe: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = sft(recipe, f"run.directory={whole}", "checkpoint.export_every=20")
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert "360 rows to learn from, 20 held out" in result.stdout
    losses = [line["negative_log_likelihood"] for line in metrics(whole)]
    assert [line["step"] for line in metrics(whole)] == list(range(24)) and losses[-1] < 0.6 * losses[0]
    assert all(line["rate/tokens"] > 0 and line["skipped_updates"] == 0 for line in metrics(whole))
    held_out = evaluations(whole)
    assert held_out.keys() == {0, 24} and held_out[24] < 0.6 * held_out[0]
    final = whole / "exports" / "final"
    assert held_out[24] == pytest.approx(loss_by_transformers(final, recipe), rel=1e-4)
    assert sorted(path.name for path in (whole / "exports").iterdir()) == ["final", "step_00000020"]
    assert {path.name for path in final.iterdir()} == {path.name for path in (recipe.parent / "toy").iterdir()}
    checkpoints = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert checkpoints == ["step_00000009", "step_00000018", "step_00000024"]
    refused = sft(recipe, f"run.directory={whole}")
    assert refused.returncode == 2
    assert refused.stderr.count("error:") == 1 and "--resume" in refused.stderr  # once, not once a rank

    # As if killed after step 9, while a line was being written: what came after it never was.
    shutil.copytree(whole / "checkpoints" / "step_00000009", killed / "checkpoints" / "step_00000009")
    text = (whole / "metrics.jsonl").read_text()
    (killed / "metrics.jsonl").write_text(text[: text.index('{"step":13')] + '{"step":13,"lo')
    again = sft(recipe, f"run.directory={killed}", "--resume")
    assert again.returncode == 0, again.stderr
    assert "step_00000009" in again.stdout
    assert learned(killed) == learned(whole) and evaluations(killed) == {24: held_out[24]}
    assert (killed / "exports" / "final" / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    reported = CliRunner().invoke(app, ["report", str(whole)])
    assert reported.exit_code == 0 and "negative_log_likelihood" in (whole / "report.html").read_text()

    # Reinforcement learning does not go on with it, in the place of what it has told.
    denied = CliRunner().invoke(app, ["train", "--resume", str(whole), "layout.world_size=1", "layout.expert=1"])
    assert denied.exit_code == 2 and "megatron-rl sft CONFIG --resume" in denied.stderr
    assert len(metrics(whole)) == 24


def test_bad_settings_end_before_ranks_start(recipe: Path, tmp_path: Path) -> None:
    result = sft(recipe, f"run.directory={tmp_path}", "layout.expert=3", "layout.world_size=3")
    assert result.returncode == 2 and "layout.expert" in result.stderr
    result = sft(recipe, "layout.world_size=256")
    assert result.returncode == 2 and "torchrun or SLURM" in result.stderr
    assert not list(tmp_path.iterdir())


def test_weights_drawn_by_chance_are_told_of(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "kind").write_text("train\n")  # which ends it early
    words = [f"policy.config={recipe.parent / 'toy'}", "policy.init=random", "layout.world_size=1", "layout.expert=1"]
    result = CliRunner().invoke(app, ["sft", str(recipe), f"run.directory={tmp_path}", *words])
    assert result.exit_code == 2
    assert [line.split(" = ")[0] for line in result.stderr.splitlines()] == ["warning: policy.init", "error: run.directory"]


def test_bad_data_ends_before_the_model_is_built(recipe: Path, tmp_path: Path) -> None:
    result = sft(recipe, f"run.directory={tmp_path}", 'supervised.response="{solution}"')
    assert result.returncode == 2 and result.stderr.count("error:") == 1
    assert "prompts of digits have no field solution (they have answer, demonstration)" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_the_command(recipe: Path, number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, str(recipe), f"run.directory={tmp_path}", "run.steps=5000"],
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
        assert process.wait(timeout=60) == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
        saved = [path.name for path in (tmp_path / "checkpoints").glob("step_*")]
        assert (f"step_{len(metrics(tmp_path)):08}" in saved) == (number != signal.SIGKILL)
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
