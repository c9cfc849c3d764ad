"""What is sent: formats, FP8 with its scales as an FP8 checkpoint has them, buckets as SGLang takes them apart."""

import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket, FlattenedTensorMetadata
from torch import Tensor

from megatron_rl.config.errors import SettingsError
from megatron_rl.rollout.by_value import by_value
from megatron_rl.weights.convert import Conversion, convert
from megatron_rl.weights.hf_files import HfFolder, read_json
from megatron_rl.weights.publish.plan import plan_stream, units
from megatron_rl.weights.publish.stored import StoredWeights
from megatron_rl.weights.publish.wire import Wire, flat_bytes, fp8_quantizer
from megatron_rl.weights.sources import open_source
from tests.reference.checkpoint import write_tiny_checkpoint

WIDE: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 256}  # blocks of 128 fit


def stored(folder: Path) -> StoredWeights:
    return StoredWeights(open_source(folder))


def everything(weights: StoredWeights, wire: Wire) -> dict[str, Tensor]:
    plan = plan_stream(units(weights.weight_map, weights.dtype), 300_000, [0])
    assert len(plan.rounds) > 3
    parcels = [wire.parcel(tensors) for tensors in weights.rounds(plan.rounds)]
    for parcel in parcels:  # each tensor of a flattened bucket begins at a multiple of its own width
        widths = [tensor.dtype.itemsize for _, tensor in parcel]
        assert widths == sorted(widths, reverse=True)
    return {name: tensor for parcel in parcels for name, tensor in parcel}


def test_weights_travel_as_they_are_or_in_the_format_asked_for(tmp_path: Path) -> None:
    state = write_tiny_checkpoint("glm4_moe", tmp_path, num_nextn_predict_layers=0)
    weights = stored(tmp_path)
    for dtype in (None, torch.bfloat16):
        sent = everything(weights, Wire(weights.weight_map, dtype))
        assert sent.keys() == weights.weight_map.hf.keys()
        for name, tensor in sent.items():
            keep = dtype is None or "e_score_correction_bias" in name  # the router's choice needs its digits
            expected = source_of(tmp_path, name)
            assert torch.equal(tensor, expected if keep else expected.to(torch.bfloat16)), name
    assert state


def source_of(folder: Path, name: str) -> Tensor:
    with HfFolder(folder) as files:
        return files.read(name)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2"])
def test_fp8_servers_get_what_an_fp8_checkpoint_holds(family: str, tmp_path: Path) -> None:
    """Same names, formats and bits as the export's, which SGLang's own loading rules were checked against."""
    write_tiny_checkpoint(family, tmp_path / "wide", dtype=torch.bfloat16, **WIDE)
    convert(Conversion(tmp_path / "wide", tmp_path / "fp8", "hf", dtype="fp8"))
    weights = stored(tmp_path / "wide")
    quantization = read_json(tmp_path / "fp8" / "config.json")["quantization_config"]
    sent = everything(weights, Wire(weights.weight_map, None, fp8_quantizer(weights.weight_map, quantization)))
    with HfFolder(tmp_path / "fp8") as exported:
        assert sent.keys() == exported.names.keys()
        for name, tensor in sent.items():
            expected = exported.read(name)
            assert tensor.dtype == expected.dtype, name
            assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), name
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in sent.values()) > 10


def test_other_quantisations_are_refused() -> None:
    weight_map: object = None
    for wrong in ({"quant_method": "gptq"}, {"quant_method": "fp8", "weight_block_size": [64, 64]}):
        with pytest.raises(SettingsError, match="unquantised servers"):
            fp8_quantizer(weight_map, wrong)  # type: ignore[arg-type]
    assert fp8_quantizer(weight_map, None) is None  # type: ignore[arg-type]


def test_a_flat_bucket_is_taken_apart_by_sglang(tmp_path: Path) -> None:
    """Odd sizes of every width: each tensor must begin at a multiple of its own."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator).to(torch.float8_e4m3fn),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "c": torch.randn(3, 3, generator=generator),
        "d": torch.randn(1, generator=generator).bfloat16(),
        "e": torch.randn(4, 2, generator=generator).t(),
    }
    parcel = sorted(tensors.items(), key=lambda entry: -entry[1].dtype.itemsize)
    flat, start, metadata = flat_bytes(parcel), 0, []
    for name, tensor in parcel:
        metadata.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, start, start + tensor.nbytes, tensor.nbytes))
        start += tensor.nbytes
    apart = FlattenedTensorBucket(flattened_tensor=flat, metadata=metadata).reconstruct_tensors()
    assert [name for name, _ in apart] == [name for name, _ in parcel]
    for name, tensor in apart:
        assert torch.equal(tensor.float(), tensors[name].float()), name


def test_tensors_by_value_name_nothing_but_torch() -> None:
    """Megatron-core replaces the function by which torch unpickles storages; SGLang ends when it meets another's."""
    import base64
    import pickle

    import megatron.core  # noqa: F401

    given = {"a": torch.randn(4, 6).t(), "b": torch.randn(3).bfloat16(), "c": torch.tensor(2.0)}
    data = base64.b64decode(by_value(given))
    words = {str(argument) for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)}
    modules = {
        word for word in words if word.split(".")[0] in ("megatron", "megatron_rl", "torch", "functools", "builtins", "tests")
    }
    assert modules == {"torch", "torch._C", "functools", "builtins"}
    unpickled = dict(pickle.loads(data))
    assert all(torch.equal(unpickled[name], tensor) and unpickled[name].dtype == tensor.dtype for name, tensor in given.items())
