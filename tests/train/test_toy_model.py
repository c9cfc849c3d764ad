"""A toy model is a checkpoint like any other: transformers computes with it what its seed says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.errors import CheckpointError
from megatron_rl.config.families import read_architecture
from megatron_rl.data.toy_tokenizer import END, SIZE
from megatron_rl.train.toy_model import write_toy_model
from megatron_rl.weights.toy_model import ToyShape


def state(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return weights


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3"])
def test_transformers_loads_and_speaks_it(family: Any, tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    parameters = write_toy_model(folder, ToyShape(family, layers=3, hidden=96, experts=6), seed=5)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert model.dtype == torch.float32 and model.num_parameters() == parameters
    assert read_architecture(folder).layers == 3 and read_architecture(folder).vocab == SIZE
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "3 + 4"}], add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits
    assert logits.shape == (1, len(prompt), SIZE) and logits.isfinite().all() and logits.std() > 0.01
    assert GenerationConfig.from_pretrained(folder).eos_token_id == END == tokenizer.eos_token_id


def test_the_seed_says_what_the_weights_are(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        write_toy_model(tmp_path / name, seed=seed)
    one, same, other = (state(tmp_path / name) for name in ("one", "same", "other"))
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if one[name].dim() > 1]
    assert len({float(one[name].flatten()[0]) for name in drawn}) == len(drawn)
    assert all(not torch.equal(one[name], other[name]) for name in drawn)


def test_the_command_writes_it_once(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "toy"
    result = CliRunner().invoke(app, ["toy", str(folder), "--hidden", "64", "--experts", "4"])
    assert result.exit_code == 0 and "parameters" in result.output
    again = CliRunner().invoke(app, ["toy", str(folder)])
    assert again.exit_code == 2 and "is there already" in again.stderr
    assert [path.name for path in folder.parent.iterdir()] == ["toy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden", "100"], "expected a multiple of 32"),
        (["--layers", "0"], "layers = 0"),
        (["--experts", "1"], "expected 2 to 128"),
    ],
)
def test_sizes_that_no_engine_takes_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["toy", str(tmp_path / "toy"), *options])
    assert result.exit_code == 2 and message in result.stderr and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_toy_model(tmp_path / "file" / "toy")
