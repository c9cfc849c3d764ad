"""Conversions are exact both ways for every family, leave the same bytes whoever makes them, and survive being killed."""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from megatron_rl.config.errors import CheckpointError
from megatron_rl.config.settings import LayoutSettings
from megatron_rl.policy.state import load_policy
from megatron_rl.weights.convert import Conversion
from megatron_rl.weights.hf_output import strips
from megatron_rl.weights.sources import MegatronSource
from megatron_rl.weights.verify import verify
from tests.policy.single import opened, tiny_settings
from tests.reference.checkpoint import write_tiny_checkpoint
from tests.reference.tiny import TINY
from tests.weights.convert_cases import Victims, contents, quietly, require_equal, tensors_of

SPREAD = LayoutSettings(tensor=2, pipeline=2)
SHARD = 150_000  # bytes: several files


@pytest.mark.parametrize("family", TINY)
def test_there_and_back_is_bitwise_equal(family: str, tmp_path: Path) -> None:
    """Also from the form that transformers 5 holds in memory, back to the published one."""
    source, megatron, back = (tmp_path / name for name in ("source", "megatron", "back"))
    state = write_tiny_checkpoint(family, source, shard_size="300KB")
    quietly(Conversion(source, megatron, "megatron", SPREAD))
    quietly(Conversion(megatron, back, "hf", shard_size=SHARD))
    require_equal(tensors_of(back), tensors_of(source))
    if any("experts" in name for name in state):
        stacked = tmp_path / "stacked"
        stacked.mkdir()
        shutil.copy(source / "config.json", stacked)
        save_file(state, stacked / "model.safetensors")
        quietly(Conversion(stacked, tmp_path / "unstacked", "hf"))
        require_equal(tensors_of(tmp_path / "unstacked"), tensors_of(source))
    theirs = split_torch_state_dict_into_shards(
        {name: tensors_of(back)[name] for name in MegatronSource(megatron).weight_map.hf}, max_shard_size=SHARD
    )
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index == {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}


def test_tensors_of_several_strips(tmp_path: Path) -> None:
    """An embedding, padded and cut among ranks, that is more than is encoded at once."""
    source, megatron, back = (tmp_path / name for name in ("source", "megatron", "back"))
    write_tiny_checkpoint("qwen3", source, vocab_size=70_001, num_hidden_layers=2)
    quietly(Conversion(source, megatron, "megatron", SPREAD))
    files = MegatronSource(megatron).files
    assert all(len(list(strips(size))) > 1 for *_, size in files.manifest["tensors"]["model.output_layer.weight"]["boxes"])
    quietly(Conversion(megatron, back, "hf"))
    require_equal(tensors_of(back), tensors_of(source))


def test_strips_fill_a_tensor_in_order() -> None:
    for shape in [(1000, 7), (5,), (1, 300, 9), (1, 1), (3, 200, 2)]:
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        runs = [whole[tuple(slice(low, low + n) for low, n in zip(*box, strict=True))] for box in strips(shape, 500)]
        assert torch.equal(torch.cat([run.reshape(-1) for run in runs]), whole.view(-1))
        assert all(box[0][-2] % 128 == 0 for box in strips(shape, 500) if len(shape) > 1)


def test_four_processes_write_the_same_bytes(tmp_path: Path) -> None:
    source, one, four = (tmp_path / name for name in ("source", "one", "four"))
    write_tiny_checkpoint("glm4_moe", source, shard_size="300KB")
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_bytes(b"not to travel")
    layout = LayoutSettings(tensor=2, pipeline=2, expert=2)
    for target, processes in ((one, 1), (four, 4)):
        quietly(Conversion(source, target, "megatron", layout), processes=processes)
    assert contents(one) == contents(four)
    assert {"tokenizer.json", "chat_template.jinja", "config.json", "manifest.json"} < set(contents(four))
    assert "pytorch_model.bin" not in contents(four)
    for target, processes in ((tmp_path / "one_hf", 1), (tmp_path / "four_hf", 4)):
        quietly(Conversion(one, target, "hf", shard_size=SHARD), processes=processes)
    assert contents(tmp_path / "one_hf") == contents(tmp_path / "four_hf")
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} < set(contents(tmp_path / "one_hf"))
    plan = Conversion(source, four, "megatron", layout).open()
    assert verify(plan, four) == len(plan.source.weight_map.hf)


def test_weights_alone_are_a_checkpoint_of_step_0(tmp_path: Path) -> None:
    """They load into a policy under another layout; the optimizer starts from them, whatever it was before."""
    source, megatron = tmp_path / "source", tmp_path / "megatron"
    write_tiny_checkpoint("glm4_moe", source)
    for dtype in ("float32", "bfloat16"):
        quietly(Conversion(source, megatron, "megatron", SPREAD, dtype=dtype), overwrite=True)
        precision = {"dtype": dtype}
        with opened(tiny_settings(tmp_path / "s", "glm4_moe", policy={"init": source}, precision=precision)) as policy:
            expected = [(s.name, {n: t.clone() for n, t in s.tensors.items()}) for s in policy.optimizer.states()]
            weights = {name: parameter.data.clone() for name, parameter in policy.model.named_parameters()}
        with opened(tiny_settings(tmp_path / "s", "glm4_moe", precision=precision)) as policy:
            for state in policy.optimizer.states():
                for tensor in state.tensors.values():
                    tensor.fill_(7.0)
            load_policy(policy, megatron)
            assert (policy.steps, policy.skipped) == (0, 0)
            for name, parameter in policy.model.named_parameters():
                assert torch.equal(parameter.data, weights[name]), name
            for state, (name, tensors) in zip(policy.optimizer.states(), expected, strict=True):
                assert state.name == name and state.tensors.keys() == tensors.keys()
                assert all(torch.equal(state.tensors[kind], tensor) for kind, tensor in tensors.items())
        with opened(tiny_settings(tmp_path / "s", "glm4_moe", policy={"init": megatron}, precision=precision)) as policy:
            for name, parameter in policy.model.named_parameters():
                assert torch.equal(parameter.data, weights[name]), name


def test_prediction_layers_are_left_out_and_said(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write_tiny_checkpoint("deepseek_v3", source)
    tensors = tensors_of(source)
    extra = {
        "model.layers.4.eh_proj.weight": torch.ones(64, 128),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file({**tensors, **extra}, source / "model.safetensors")
    told = quietly(Conversion(source, target, "hf"))
    assert any("num_nextn_predict_layers is set to 0" in line for line in told)
    assert json.loads((target / "config.json").read_text())["num_nextn_predict_layers"] == 0
    require_equal(tensors_of(target), tensors)


# -- interruption ------------------------------------------------------------------------------------------------------


def test_killed_at_random_instants_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """kill -9 at twenty instants around every write, flush, rename and removal, of both directions and of a replacement."""
    source, megatron = tmp_path / "source", tmp_path / "megatron"
    write_tiny_checkpoint("qwen3_moe", source, shard_size="300KB", num_hidden_layers=2)
    victims = Victims()
    cases: list[tuple[Conversion, bool]] = [
        (Conversion(source, megatron, "megatron", SPREAD), False),
        (Conversion(megatron, tmp_path / "hf", "hf", shard_size=SHARD), False),
        (Conversion(megatron, tmp_path / "old", "hf", shard_size=SHARD), True),
    ]
    generator = random.Random(0)
    for conversion, overwrite in cases:
        old = None
        if overwrite:
            quietly(Conversion(source, conversion.target, "hf", dtype="bfloat16"))
            old = contents(conversion.target)
        events = victims.run(conversion, None, overwrite=overwrite)
        assert events is not None and events > 40
        whole = contents(conversion.target)
        # The last instants, when the folder gets its name, are the ones that matter most.
        for fatal in [*generator.sample(range(1, events - 6), 4), events - 5, events - 3, events - 1]:
            shutil.rmtree(conversion.target)
            if overwrite:
                quietly(Conversion(source, conversion.target, "hf", dtype="bfloat16"))
            assert victims.run(conversion, fatal, overwrite=overwrite) is None
            if conversion.target.exists():
                assert contents(conversion.target) in (whole, old), fatal
            if not conversion.target.exists() or contents(conversion.target) != whole:
                quietly(conversion, overwrite=overwrite)
            assert contents(conversion.target) == whole, fatal
            shutil.rmtree(conversion.target.with_name(conversion.target.name + ".replaced"), ignore_errors=True)


def test_nobody_goes_on_writing_when_the_starter_is_killed(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write_tiny_checkpoint("qwen3", source, shard_size="300KB")
    conversion = Conversion(source, target, "hf", shard_size=SHARD)
    left = Victims().run_two(conversion)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{left}").exists() and "Z" not in Path(f"/proc/{left}/stat").read_text().rsplit(")")[1].split()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not target.exists()
    quietly(conversion)
    require_equal(tensors_of(target), tensors_of(source))


def test_what_is_whole_is_kept_and_another_conversion_starts_afresh(tmp_path: Path) -> None:
    source, target, partial = (tmp_path / name for name in ("source", "target", "target.partial"))
    write_tiny_checkpoint("qwen3", source, shard_size="300KB")
    conversion = Conversion(source, target, "hf", shard_size=SHARD)

    class Interrupted(BaseException):
        pass

    written = 0

    def interrupt(count: int) -> None:
        nonlocal written
        written += count
        if written > 2 * SHARD:
            raise Interrupted

    with pytest.raises(Interrupted):
        quietly(conversion, moved=interrupt)
    whole = {path.name: path.stat().st_mtime_ns for path in partial.glob("model*")}
    assert whole and not target.exists()
    told = quietly(conversion)
    assert told == [f"going on: {len(whole)} files are whole already"]
    assert {name: (target / name).stat().st_mtime_ns for name in whole} == whole
    assert not partial.exists()

    written = 0
    with pytest.raises(Interrupted):
        quietly(Conversion(source, tmp_path / "target2", "hf", shard_size=SHARD), moved=interrupt)
    told = quietly(Conversion(source, tmp_path / "target2", "hf", dtype="bfloat16", shard_size=SHARD))
    assert len(told) == 1 and "starting afresh" in told[0]
    assert all(t.dtype == torch.bfloat16 for t in tensors_of(tmp_path / "target2").values())


# -- errors ------------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, **changes: torch.Tensor | None) -> None:
    """The checkpoint with tensors replaced, or removed."""
    tensors: dict[str, Any] = {**tensors_of(folder), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def poisoned(folder: Path, value: float) -> None:
    tensor = tensors_of(folder)["model.layers.3.mlp.down_proj.weight"]
    tensor[5, 7] = value
    rewritten(folder, **{"model.layers.3.mlp.down_proj.weight": tensor})


def other_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BAD: dict[str, tuple[Any, str]] = {
    "missing": (lambda f: rewritten(f, **{"model.norm.weight": None}), "1 missing .model.norm.weight."),
    "extra": (lambda f: rewritten(f, **{"model.norms.weight": torch.ones(3)}), "1 not known to the model .model.norms"),
    "misshaped": (lambda f: rewritten(f, **{"model.norm.weight": torch.ones(65)}), r"model.norm.weight has shape \[65\]"),
    "integers": (lambda f: rewritten(f, **{"model.norm.weight": torch.ones(64, dtype=torch.int32)}), "stored as torch.int32"),
    "NaN": (lambda f: poisoned(f, float("nan")), "layers.3.mlp.down_proj.weight holds numbers that are not finite"),
    "infinite": (lambda f: poisoned(f, float("-inf")), "layers.3.mlp.down_proj.weight holds numbers that are not finite"),
    "truncated": (cut, "is cut short"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "fewer layers": (lambda f: other_config(f, num_hidden_layers=5), "missing"),
    "more layers": (lambda f: other_config(f, num_hidden_layers=2), r"not known to the model .model\.layers\.2\."),
    "other width": (lambda f: other_config(f, intermediate_size=100), r"config.json describes \[100, 64\]"),
    "FP8 in words": (
        lambda f: other_config(f, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
        "weights are FP8 in the config.json of .* and not in its files",
    ),
}


@pytest.mark.parametrize("format", ["hf", "megatron"])
@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_are_refused_and_nothing_is_left(name: str, format: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_tiny_checkpoint("qwen3", source)
    spoil, message = BAD[name]
    spoil(source)
    with pytest.raises(Exception, match=message) as caught:
        quietly(Conversion(source, tmp_path / "target", format))
    assert type(caught.value).__name__ in ("CheckpointError", "SettingsError")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_bad_megatron_checkpoints_are_refused(tmp_path: Path) -> None:
    source, good = tmp_path / "source", tmp_path / "good"
    write_tiny_checkpoint("qwen3", source)
    quietly(Conversion(source, good, "megatron", SPREAD))

    def manifest(folder: Path, change: Any) -> None:
        fields = json.loads((folder / "manifest.json").read_text())
        change(fields)
        (folder / "manifest.json").write_text(json.dumps(fields))

    cases = {
        "rank_00001.safetensors is missing": lambda f: (f / "rank_00001.safetensors").unlink(),
        "has no tensor model.decoder.final_layernorm.weight": lambda f: manifest(
            f, lambda m: m["tensors"].pop("model.decoder.final_layernorm.weight")
        ),
        "model.decoder.more is not known": lambda f: manifest(
            f, lambda m: m["tensors"].update({"model.decoder.more": m["tensors"]["model.decoder.final_layernorm.weight"]})
        ),
        "ffn_hidden: 96 in the checkpoint, 128 in": lambda f: other_config(f, intermediate_size=128),
        r"has \d+ bytes of \d+": lambda f: (f / "rank_00002.safetensors").write_bytes(b"1234"),
    }
    for message, spoil in cases.items():
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        spoil(bad)
        with pytest.raises(CheckpointError, match=message):
            quietly(Conversion(bad, tmp_path / "target", "hf"))
        assert not (tmp_path / "target").exists() and not (tmp_path / "target.partial").exists()
        shutil.rmtree(bad)


def test_targets_and_disks_are_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write_tiny_checkpoint("qwen3", source)
    target.mkdir()
    with pytest.raises(CheckpointError, match=r"exists already\. Name another folder, or replace it with --overwrite"):
        quietly(Conversion(source, target, "hf"))
    with pytest.raises(CheckpointError, match="is no checkpoint: it is not overwritten"):
        quietly(Conversion(source, target, "hf"), overwrite=True)
    target.rmdir()
    for place in (source, source / "inside", tmp_path):
        with pytest.raises(CheckpointError, match="is what is converted, lies in it or holds it"):
            quietly(Conversion(source, place, "hf"), overwrite=True)
    with pytest.raises(CheckpointError, match=r"cannot be made: Not a directory\. Name another folder"):
        quietly(Conversion(source, Path(__file__) / "inside", "hf"))
    with pytest.raises(CheckpointError, match="FP8 is a format of Hugging Face checkpoints"):
        quietly(Conversion(source, target, "megatron", dtype="fp8"))
    with pytest.raises(Exception, match=r"layout\.tensor = 3"):
        quietly(Conversion(source, target, "megatron", LayoutSettings(tensor=3)))
    with pytest.raises(CheckpointError, match="does not exist"):
        quietly(Conversion(tmp_path / "nothing", target, "hf"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(CheckpointError, match=r"are to be written, and the disk has 0.0 GB left"):
        quietly(Conversion(source, target, "hf"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_wrong_byte_is_found_by_verification(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_tiny_checkpoint("qwen3", source)

    def spoil(plan: Any, folder: Path) -> None:
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        verify(plan, folder)

    with pytest.raises(CheckpointError, match="is not what the source holds: checksum"):
        quietly(Conversion(source, tmp_path / "target", "hf"), proof=spoil)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
