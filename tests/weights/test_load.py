"""First weights from a Hugging Face folder equal those that transformers loads, whatever form they are stored in."""

from pathlib import Path

import pytest
import torch

from megatron_rl.policy.policy import Policy
from tests.policy.single import opened, tiny_settings
from tests.reference.checkpoint import write_tiny_checkpoint
from tests.reference.hf_weights import load_hf_state
from tests.reference.tiny import TINY


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
