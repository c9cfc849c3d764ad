"""First weights from a Hugging Face folder equal those that transformers loads, whatever form they are stored in."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl.config.errors import CheckpointError
from megatron_rl.policy.policy import Policy
from tests.policy.single import opened, tiny_settings
from tests.reference.checkpoint import write_tiny_checkpoint
from tests.reference.hf_weights import load_hf_state
from tests.reference.tiny import TINY
from tests.weights import convert_cases


def loaded(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """A policy's parameters after `policy.init` read the folder."""
    settings = tiny_settings(folder / "settings", family, policy={"init": folder})
    with opened(settings) as policy:
        return tensors_of(policy)


def tensors_of(policy: Policy) -> dict[str, torch.Tensor]:
    state = policy.model.bare_chunks[0].state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if torch.is_tensor(tensor)}


def expected(folder: Path, family: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same by the tests' own, independent conversion."""
    with opened(tiny_settings(folder / "settings", family)) as policy:
        chunk = policy.model.bare_chunks[0]
        load_hf_state(chunk, state, policy.architecture)
        return tensors_of(policy)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", TINY)
def test_weights_are_transformers_own(family: str, stacked: bool, tmp_path: Path) -> None:
    state = write_tiny_checkpoint(family, tmp_path, stacked=stacked)
    ours, theirs = loaded(tmp_path, family), expected(tmp_path, family, state)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.equal(ours[name], values), name


def test_optimizer_starts_from_the_loaded_weights(tmp_path: Path) -> None:
    """The float32 masters of bfloat16 weights are the loaded ones."""
    write_tiny_checkpoint("qwen3_moe", tmp_path)
    settings = tiny_settings(tmp_path / "settings", policy={"init": tmp_path}, precision={"dtype": "bfloat16"})
    with opened(settings) as policy:
        for state in policy.optimizer.states():
            parameter = dict(policy.model.named_parameters())[state.name]
            master = state.tensors["main"]
            assert torch.equal(master.bfloat16(), parameter.data.view(-1)[state.start : state.stop])


NORM = "model.layers.2.input_layernorm.weight"


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """The checkpoint in one file, some tensors of it changed."""

    def spoil(folder: Path) -> None:
        tensors = convert_cases.tensors_of(folder)
        change(tensors)
        for path in folder.glob("model*"):
            path.unlink()
        save_file(tensors, folder / "model.safetensors")

    return spoil


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[-1]


def truncated(folder: Path) -> None:
    last_shard(folder).write_bytes(last_shard(folder).read_bytes()[:-1])


def half_a_header(folder: Path) -> None:
    last_shard(folder).write_bytes(last_shard(folder).read_bytes()[:50])


def swapped_in_the_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = next(
        file for file in index["weight_map"].values() if file != index["weight_map"]["model.norm.weight"]
    )
    path.write_text(json.dumps(index))


def outside_of_the_folder(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    path.write_text(json.dumps(index))


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, r"is cut short or no safetensors file: its tensors end at byte"),
    "half a header": (half_a_header, "its header would have"),
    "a shard missing": (lambda folder: last_shard(folder).unlink(), "lacks 1 of its files"),
    "index of another checkpoint": (swapped_in_the_index, "says that model.norm.weight is in .* which does not hold it"),
    "a path in the index": (outside_of_the_folder, "which is not a file of its folder"),
    "missing": (with_tensors(lambda tensors: tensors.pop(NORM)), f"1 missing .{NORM}"),
    "extra": (with_tensors(lambda tensors: tensors.update(more=torch.ones(2))), "1 not known to the model .more"),
    "misshaped": (
        with_tensors(lambda t: t.update({NORM: torch.ones(63)})),
        r"has shape \[63\], but config.json describes \[64\]",
    ),
    "NaN": (with_tensors(lambda t: t[NORM][3:4].fill_(float("nan"))), f"{NORM} holds numbers that are not finite"),
    "no scales": (with_tensors(lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)})), "not a weight format known"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_checkpoints_are_refused(name: str, tmp_path: Path) -> None:
    spoil, message = WRONG[name]
    write_tiny_checkpoint("qwen3", tmp_path, shard_size="300KB")
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path, "qwen3")
