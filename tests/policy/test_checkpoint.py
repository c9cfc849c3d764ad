"""Broken checkpoints, and checkpoints of other models: each has its own clear error, and nothing is loaded from it."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config.errors import CheckpointError
from megatron_rl.objectives.sft import SupervisedLoss
from megatron_rl.policy.checkpoint import Checkpoint, CheckpointWriter
from megatron_rl.policy.optimizer import set_adam_steps
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.state import load_policy, save_policy, state_slices
from megatron_rl.weights.checkpoint_files import complete_checkpoints, latest_checkpoint
from tests.parallel.jobs import toy_sequences
from tests.policy.single import opened, tiny_settings


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    with opened(tiny_settings(folder)) as policy:
        policy.update(policy.pack(toy_sequences(0, 3, 120, 20)), SupervisedLoss())
        return save_policy(CheckpointWriter(folder, policy.layout, 2), policy)


@contextmanager
def manifest_of(folder: Path) -> Iterator[dict[str, Any]]:
    """The manifest, to be changed."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    yield manifest
    path.write_text(json.dumps(manifest))


def rank_file(folder: Path) -> Path:
    return folder / "rank_00000.safetensors"


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def manifest_cut_short(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:100])


def manifest_of_something_else(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1, 2]")


def newer_format(folder: Path) -> None:
    with manifest_of(folder) as manifest:
        manifest["format"] = 99


def file_missing(folder: Path) -> None:
    rank_file(folder).unlink()


def file_truncated(folder: Path) -> None:
    data = rank_file(folder).read_bytes()
    rank_file(folder).write_bytes(data[: len(data) // 2])


def one_bit_flipped(folder: Path) -> None:
    data = bytearray(rank_file(folder).read_bytes())
    data[-5] ^= 1
    rank_file(folder).write_bytes(bytes(data))


def tensor_missing(folder: Path) -> None:
    with manifest_of(folder) as manifest:
        del manifest["tensors"]["model.decoder.final_layernorm.weight"]


def box_missing(folder: Path) -> None:
    with manifest_of(folder) as manifest:
        manifest["tensors"]["model.decoder.layers.0.mlp.experts.experts.linear_fc1.weight"]["boxes"].pop()


def other_shape(folder: Path) -> None:
    with manifest_of(folder) as manifest:
        manifest["tensors"]["model.output_layer.weight"]["shape"] = [64, 64]


BROKEN: dict[Callable[[Path], None], str] = {
    no_manifest: "has no manifest.json: the save was interrupted",
    manifest_cut_short: "is not a checkpoint manifest",
    manifest_of_something_else: "is not a checkpoint manifest",
    newer_format: "format 99; this version of megatron_rl reads format 1",
    file_missing: "rank_00000.safetensors is missing",
    file_truncated: r"rank_00000.safetensors has \d+ bytes instead of \d+",
    one_bit_flipped: "rank_00000.safetensors does not match its checksum",
    tensor_missing: "has no tensor model.decoder.final_layernorm.weight",
    box_missing: r"holds \d+ of the \d+ numbers wanted of model.decoder.layers.0.mlp.experts",
    other_shape: r"model.output_layer.weight has shape \[64, 64\], the model wants \[128, 64\]",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_broken_checkpoint_is_refused(damage: Callable[[Path], None], saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / saved.name
    shutil.copytree(saved, folder)
    damage(folder)
    with opened(tiny_settings(tmp_path)) as policy:
        before = [piece.tensor.clone() for piece in state_slices(policy)]
        with pytest.raises(CheckpointError, match=BROKEN[damage]):
            load_policy(policy, folder)
        assert policy.steps == 0
        after = [piece.tensor for piece in state_slices(policy)]
        assert all(torch.equal(now, then) for now, then in zip(after, before, strict=True))


def test_absent_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        Checkpoint(tmp_path / "step_00000007")
    assert latest_checkpoint(tmp_path) is None


OTHER_MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "family": ({"family": "glm4_moe"}, ["architecture.family: 'qwen3_moe' in the checkpoint, 'glm4_moe' in the settings"]),
    "precision": (
        {"precision": {"dtype": "bfloat16"}},
        ["precision.dtype: 'float32' in the checkpoint, 'bfloat16' in the settings"],
    ),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_model_is_refused_field_by_field(name: str, saved: Path, tmp_path: Path) -> None:
    sections, texts = OTHER_MODELS[name]
    with opened(tiny_settings(tmp_path, **sections)) as policy, pytest.raises(CheckpointError) as caught:
        load_policy(policy, saved)
    for text in texts:
        assert text in str(caught.value)


def test_round_trip_and_retention(tmp_path: Path) -> None:
    """The newest are kept, leftovers of killed saves do not count, and what is loaded is what was saved."""
    (tmp_path / "step_00000009.partial").mkdir()
    with opened(tiny_settings(tmp_path)) as policy:
        writer = CheckpointWriter(tmp_path, policy.layout, keep_last=2)
        packs = policy.pack(toy_sequences(0, 3, 120, 20))
        for _ in range(4):
            policy.update(packs, SupervisedLoss())
            save_policy(writer, policy, asynchronous=True)
        writer.finish()
        states = {piece.name + str(piece.offset): piece.tensor.clone() for piece in state_slices(policy)}
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000003", "step_00000004"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.name == "step_00000004"
    with opened(tiny_settings(tmp_path, policy={"config": tmp_path, "seed": 5})) as policy:
        load_policy(policy, latest)
        assert policy.steps == 4
        for piece in state_slices(policy):
            assert torch.equal(piece.tensor, states[piece.name + str(piece.offset)]), piece.name


def test_background_save_completes_while_training(tmp_path: Path) -> None:
    with opened(tiny_settings(tmp_path)) as policy:
        writer = CheckpointWriter(tmp_path, policy.layout, keep_last=2)
        save_policy(writer, policy, asynchronous=True)
        assert writer._saving is not None
        writer._saving.thread.join()
        assert latest_checkpoint(tmp_path) is None  # written, and not yet declared complete
        writer.poll()
        assert latest_checkpoint(tmp_path) is not None


def test_going_back_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    """Loading an older checkpoint and saving again: the abandoned steps are kept, and never the latest."""
    with opened(tiny_settings(tmp_path)) as policy:
        writer = CheckpointWriter(tmp_path, policy.layout, keep_last=3)
        packs = policy.pack(toy_sequences(0, 3, 120, 20))
        folders = []
        for _ in range(3):
            policy.update(packs, SupervisedLoss())
            folders.append(save_policy(writer, policy))
        load_policy(policy, folders[0])
        policy.update(packs, SupervisedLoss())
        writer = CheckpointWriter(tmp_path, policy.layout, keep_last=1)
        assert save_policy(writer, policy) == latest_checkpoint(tmp_path) == folders[1]
    names = sorted(path.name for path in tmp_path.glob("step_*"))
    assert names == ["step_00000002", "step_00000003.abandoned"]


def test_steps_of_fused_adam_are_counted_in_the_group() -> None:
    """Transformer Engine's and apex's Adam start from 1 unless the group says how many steps were taken."""
    weight = torch.nn.Parameter(torch.ones(2))

    class Fused(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([weight], {})

    fused, plain = Fused(), torch.optim.AdamW([weight])
    plain.state[weight]["step"] = torch.tensor(0.0)
    for inner in (fused, plain):
        set_adam_steps(inner, 7)
    assert fused.param_groups[0]["step"] == 7 and not fused.state
    assert plain.state[weight]["step"].item() == 7 and "step" not in plain.param_groups[0]


def test_settings_that_may_change_are_named(saved: Path, tmp_path: Path) -> None:
    data = {"shuffle": False, "cache": tmp_path}
    changed: dict[str, Any] = {"optimizer": {"lr": 0.5, "beta1": 0.5}, "data": data, "run": {"steps": 7}}
    with opened(tiny_settings(tmp_path, **changed)) as policy, pytest.raises(CheckpointError) as caught:
        load_policy(policy, saved)
    text = str(caught.value)
    assert "optimizer.lr: 0.001 in the checkpoint, 0.5 in the settings" in text and "optimizer.beta1: 0.9" in text
    assert "data.shuffle: True in the checkpoint, False in the settings" in text and "data.cache" not in text
    assert "run.steps" not in text and "checkpoint.allow_changes" in text
    with opened(tiny_settings(tmp_path, checkpoint={"allow_changes": ["optimizer", "data"]}, **changed)) as policy:
        load_policy(policy, saved)
        assert policy.steps == 1


def test_failed_write_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while a rank writes: an error, no checkpoint, and earlier ones untouched."""

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with opened(tiny_settings(tmp_path)) as policy:
        writer = CheckpointWriter(tmp_path, policy.layout, keep_last=2)
        save_policy(writer, policy)
        policy.update(policy.pack(toy_sequences(0, 3, 120, 20)), SupervisedLoss())
        monkeypatch.setattr("megatron_rl.weights.checkpoint_files.TensorFileWriter", no_space)
        with pytest.raises(CheckpointError, match=r"rank 0 could not write its file.*No space left"):
            save_policy(writer, policy)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000000"]


def test_random_state_returns(saved: Path, tmp_path: Path) -> None:
    """The same layout goes on with the same random numbers."""

    def draws(policy: Policy) -> list[float]:
        import random

        import numpy as np

        return [torch.rand(1).item(), float(np.random.rand()), random.random()]

    with opened(tiny_settings(tmp_path)) as policy:
        folder = save_policy(CheckpointWriter(tmp_path, policy.layout, 2), policy)
        expected = draws(policy)
        load_policy(policy, folder)
        assert draws(policy) == expected
