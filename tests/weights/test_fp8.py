"""FP8 checkpoints: how exact they are, that SGLang would load them, and that both sides quantise the same layers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config.errors import CheckpointError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import LayoutSettings
from megatron_rl.policy.hf_export import HfExporter, fp8_weights
from megatron_rl.weights.convert import Conversion
from megatron_rl.weights.fp8 import audit, fp8_tensors, linear_tensors, quantization_config, quantize_rows, served_tensors
from megatron_rl.weights.hf_files import HfFolder
from megatron_rl.weights.hf_output import Output, OutputFile, strips, write_strip
from megatron_rl.weights.map import WeightMap
from tests.policy.single import opened, tiny_settings
from tests.reference.checkpoint import write_tiny_checkpoint
from tests.reference.tiny import TINY, write_tiny_config
from tests.weights.convert_cases import WIDE, quietly, tensors_of

# sglang 0.5.17. Layers made with a quantisation config, by family: srt/models/{deepseek_v2,qwen3_moe,qwen3,qwen2,glm4_moe,
# mixtral,olmoe,llama}.py. Routers are made without one, embeddings and the output layer are no LinearBase, norms no layer.
SGLANG_LINEAR = {
    "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3",
}  # fmt: skip
# srt/layers/quantization/utils.py, _FALLBACK_FUSED_SHARDS: of one operation, and so all quantised or none; and
# srt/models/deepseek_v2.py, packed_modules_mapping.
SGLANG_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("w1", "w3"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the same in FP8."""
    root = tmp_path_factory.mktemp("fp8")
    write_tiny_checkpoint("deepseek_v3", root / "source", **WIDE)
    quietly(Conversion(root / "source", root / "fp8", "hf", dtype="fp8", shard_size=10**6))
    return root / "source", root / "fp8"


def test_every_number_is_the_nearest_of_its_block(folders: tuple[Path, Path]) -> None:
    source, fp8 = map(tensors_of, folders)
    quantised = [name for name, tensor in fp8.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(quantised) > 30
    for name, tensor in source.items():
        if name not in quantised:
            bias = name.endswith("e_score_correction_bias")
            assert torch.equal(fp8[name], tensor if bias else tensor.bfloat16()), name
            continue
        scales = fp8[name + "_scale_inv"]
        assert scales.dtype == torch.float32 and scales.shape == tuple(math.ceil(n / 128) for n in tensor.shape)
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: tensor.shape[0], : tensor.shape[1]].double()
        scaled = tensor.double() / spread
        # e4m3: 3 bits behind the point, smallest exponent -6; half a step, and float32's own rounding of x / s.
        exponent = torch.log2(scaled.abs().clamp(min=2**-6)).floor()
        half_step = torch.exp2(exponent - 4)
        assert ((scaled - fp8[name].double()).abs() <= half_step * (1 + 1e-5) + 1e-9).all(), name
        for top in range(0, tensor.shape[0], 128):
            for left in range(0, tensor.shape[1], 128):
                block = tensor[top : top + 128, left : left + 128]
                assert scales[top // 128, left // 128] == block.abs().max() / 448.0


def test_strips_are_quantised_as_the_whole_is(tmp_path: Path) -> None:
    whole = torch.randn(300, 9000, generator=torch.Generator().manual_seed(0))  # of three strips, the last a part of a block
    output = Output("w", (300, 9000), torch.float8_e4m3fn)
    assert len(list(strips(output.shape))) == 3
    with OutputFile("f", (output,)).open(tmp_path / "f") as file:
        for box in strips(output.shape):
            write_strip(file, output, box, whole[box[0][0] : box[0][0] + box[1][0]])
    numbers, scales = quantize_rows(whole)
    stored = load_file(tmp_path / "f")
    assert torch.equal(stored["w"].view(torch.uint8), numbers.view(torch.uint8))
    assert torch.equal(stored["w_scale_inv"], scales)


def test_our_reader_gives_back_the_quantised_values(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Whole and by the box; and quantised again, by way of Megatron in float32, they are what they were."""
    stored = tensors_of(folders[1])
    generator = torch.Generator().manual_seed(0)
    with HfFolder(folders[1]) as folder:
        for name, values in stored.items():
            if values.dtype != torch.float8_e4m3fn:
                continue
            scales = stored[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            whole = values.float() * scales[: values.shape[0], : values.shape[1]]
            assert torch.equal(folder.values(name), whole)
            assert torch.equal(folder.read(name).view(torch.uint8), values.view(torch.uint8))
            for _ in range(3):
                low = [int(torch.randint(0, n, (), generator=generator)) for n in values.shape]
                size = [
                    int(torch.randint(1, n - at + 1, (), generator=generator)) for n, at in zip(values.shape, low, strict=True)
                ]
                window = tuple(slice(at, at + n) for at, n in zip(low, size, strict=True))
                assert torch.equal(folder.values(name, (tuple(low), tuple(size))), whole[window])
    quietly(Conversion(folders[1], tmp_path / "megatron", "megatron", LayoutSettings(tensor=2, expert=2), dtype="float32"))
    quietly(Conversion(tmp_path / "megatron", tmp_path / "again", "hf", dtype="fp8"))
    for name, values in tensors_of(tmp_path / "again").items():
        if values.dtype == torch.float8_e4m3fn:
            assert torch.equal(values.view(torch.uint8), stored[name].view(torch.uint8)), name
        elif name.endswith("_scale_inv"):  # (448 s) / 448 may be off by the last bit
            torch.testing.assert_close(values, stored[name], rtol=2**-23, atol=0)


def test_fp8_becomes_bf16(folders: tuple[Path, Path], tmp_path: Path) -> None:
    quietly(Conversion(folders[1], tmp_path / "bf16", "hf", dtype="bfloat16"))
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())
    with HfFolder(folders[1]) as folder:
        for name, tensor in tensors_of(tmp_path / "bf16").items():
            assert torch.equal(tensor, folder.values(name).to(tensor.dtype)), name


def test_config_is_of_the_published_form(folders: tuple[Path, Path]) -> None:
    quantization = json.loads((folders[1] / "config.json").read_text())["quantization_config"]
    assert quantization["modules_to_not_convert"] == ["model.layers.1.mlp.gate", "lm_head"]
    del quantization["modules_to_not_convert"]
    assert quantization == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("family", TINY)
def test_sglang_s_rules_hold(family: str, wide: bool, tmp_path: Path) -> None:
    """What config.json tells it is what the files hold; what it lays together fits blocks and is of one format."""
    rows = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 64} if wide else {}
    changes = {field: value for field, value in rows.items() if field in TINY[family]}
    weight_map = WeightMap(read_architecture(write_tiny_config(family, tmp_path, **changes)))
    for skip in ((0, 0), (1, 1)):
        quantised = fp8_tensors(weight_map, *skip)
        assert served_tensors(weight_map, quantization_config(weight_map, quantised)) == quantised
        for name in quantised:
            module = name.split(".")[-2]
            assert module in SGLANG_LINEAR and name.endswith(".weight")
            layer = int(name.split(".")[2])
            assert skip[0] <= layer < weight_map.architecture.layers - skip[1]
            for fused in (each for each in SGLANG_FUSED if module in each):
                together = [name.replace(f".{module}.", f".{other}.") for other in fused]
                present = [other for other in together if other in weight_map.hf]
                assert quantised >= set(present)
                # validate_block_quant_shapes: every output partition, but the last of the latent projections
                cut = present[:1] if fused[0] == "q_a_proj" else present
                assert len(present) == 1 or all(weight_map.hf[other].shape[0] % 128 == 0 for other in cut)
            if ".experts." in name:  # create_fp8_moe_weight_: the width of an expert; FusedMoE has one format for all
                width = weight_map.architecture.experts
                assert width is not None and width.hidden % 128 == 0
    quantised = fp8_tensors(weight_map)
    assert len({name in quantised for name in linear_tensors(weight_map) if ".experts." in name}) <= 1


def test_router_embedding_and_norms_are_never_quantised(tmp_path: Path) -> None:
    for family in TINY:
        weight_map = WeightMap(read_architecture(write_tiny_config(family, tmp_path)))
        linear = linear_tensors(weight_map)
        for name, entry in weight_map.hf.items():
            plain = any(word in name for word in ("norm", "embed", "lm_head", "bias", "mlp.gate.", "moe.gate."))
            assert (name not in linear) == plain, name
            assert plain or len(entry.shape) == 2


def test_the_audit_names_both_sides() -> None:
    audit({"one": {"a", "b"}, "two": ["b", "a"]})
    with pytest.raises(CheckpointError, match="1 weights are FP8 in one and not in two: b"):
        audit({"one": {"a", "b"}, "two": {"a"}})
    with pytest.raises(CheckpointError, match="1 weights are FP8 in three and not in one: c"):
        audit({"one": {"a"}, "two": {"a"}, "three": {"a", "c"}})


def test_a_layer_listed_as_plain_and_stored_in_fp8_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in folders[1].iterdir():
        (bad / path.name).symlink_to(path)
    config = json.loads((bad / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].append("model.layers.0.self_attn.o_proj")
    (bad / "config.json").unlink()
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"1 weights are FP8 in its files and not in the config.json of .*layers.0.self_attn.o_proj"
    ):
        quietly(Conversion(bad, tmp_path / "target", "hf", dtype="bfloat16"))


def test_simulation_and_export_quantise_the_same(tmp_path: Path) -> None:
    """The policy's own products against the list; and an export that would differ from them is an error before training."""
    write_tiny_config("deepseek_v3", tmp_path, **WIDE)
    precision = {"dtype": "bfloat16", "fp8": "simulated", "fp8_skip_first_layers": 1}
    sections: dict[str, Any] = {
        "precision": precision,
        "policy": {"config": tmp_path / "config.json"},
        "batch": {"max_tokens": 128},
    }
    settings = tiny_settings(tmp_path / "s", **sections)
    with opened(settings) as policy:
        weight_map = WeightMap(policy.architecture)
        assert fp8_weights(policy) == fp8_tensors(weight_map, 1, 0) == linear_tensors(weight_map, 1, 0)
        HfExporter(policy, "fp8")
    write_tiny_config("deepseek_v3", tmp_path, **{**WIDE, "moe_intermediate_size": 96})
    with opened(settings) as policy, pytest.raises(CheckpointError, match="weights are FP8 in the policy's own products"):
        HfExporter(policy, "fp8")
