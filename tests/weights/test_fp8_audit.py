"""The audit of FP8 layers: equal lists and scales pass, every difference is an error that names the modules."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import PrecisionSettings, Settings
from megatron_rl.train.publishing import require_same_layers
from megatron_rl.weights.fp8 import fp8_tensors, quantization_config
from megatron_rl.weights.fp8_audit import LayerAudit, audit_layers, differences, modules, served_layers, trained_layers
from megatron_rl.weights.map import WeightMap
from tests.reference.tiny import write_tiny_config

WIDE = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 64}  # whole blocks of 128


@pytest.fixture
def weight_map(tmp_path: Path) -> WeightMap:
    return WeightMap(read_architecture(write_tiny_config("qwen3_moe", tmp_path, **WIDE)))


def precision(**values: Any) -> PrecisionSettings:
    return PrecisionSettings.model_validate({"fp8": "simulated", **values})


def audited(weight_map: WeightMap, trainer: PrecisionSettings, quantization: dict[str, Any] | None) -> LayerAudit:
    """With an FP8 export."""
    return audit_layers(weight_map, trainer, served_layers(weight_map, quantization), exports=True, any_scale=False)


@pytest.mark.parametrize("skip", [(0, 0), (1, 0), (1, 2)])
def test_our_own_export_is_what_the_trainer_rounds(skip: tuple[int, int], weight_map: WeightMap) -> None:
    trainer = precision(fp8_skip_first_layers=skip[0], fp8_skip_last_layers=skip[1])
    audit = audited(weight_map, trainer, quantization_config(weight_map, fp8_tensors(weight_map, *skip)))
    assert audit.problems == () and audit.remarks == ()
    audit.require()
    (trainer_side, server_side, export_side) = audit.summary().values()
    assert trainer_side == server_side == export_side
    last = 3 - skip[1]
    assert trainer_side["model.layers.*.mlp.experts.*.up_proj"].startswith(
        f"layers {skip[0]}-{last}" if last > skip[0] else "layers 1:"
    )
    assert not any(
        ("gate" in name.rpartition(".")[2] and "proj" not in name) or "embed" in name or "head" in name for name in trainer_side
    )


def without(name: str) -> Callable[[WeightMap], dict[str, Any]]:
    """Servers that leave one more module as it is."""

    def config(weight_map: WeightMap) -> dict[str, Any]:
        found = quantization_config(weight_map, fp8_tensors(weight_map))
        return {**found, "modules_to_not_convert": [*found["modules_to_not_convert"], name]}

    return config


def blocks(**values: Any) -> Callable[[WeightMap], dict[str, Any]]:
    return lambda weight_map: {**quantization_config(weight_map, fp8_tensors(weight_map)), **values}


DIFFERENT: list[tuple[dict[str, Any], Callable[[WeightMap], dict[str, Any]], str]] = [
    (
        {},
        without("model.layers.2.self_attn.o_proj"),
        r"1 weights are FP8 in the trainer and not in the servers: model\.layers\.\{2\}\.self_attn\.o_proj",
    ),
    (
        {},
        without("model.layers.1.mlp.experts"),
        r"24 weights .* not in the servers: model\.layers\.\{1\}\.mlp\.experts\.\*\.down_proj, ",
    ),
    (
        {"fp8_skip_first_layers": 2},
        blocks(),
        r"weights are FP8 in the servers and not in the trainer: model\.layers\.\{0-1\}\.",
    ),
    (
        {"fp8_recipe": "tensorwise"},
        blocks(),
        r"by other scales: .*: weights one scale a tensor, .* here, weights 128 x 128, activations 1 x 128 there",
    ),
    ({"fp8_recipe": "mxfp8"}, blocks(), r"weights 1 x 32, scales powers of two"),
    ({}, blocks(weight_block_size=None), r"128 x 128, .* here, weights one scale a tensor"),
    (
        {},
        blocks(activation_scheme="static"),
        r"activations 1 x 128 here, weights 128 x 128, activations one scale a tensor there",
    ),
]


@pytest.mark.parametrize(("trainer", "served", "message"), DIFFERENT)
def test_a_difference_names_the_modules(
    trainer: dict[str, Any], served: Callable[[WeightMap], dict[str, Any]], message: str, weight_map: WeightMap
) -> None:
    audit = audited(weight_map, precision(**trainer), served(weight_map))
    with pytest.raises(SettingsError, match=message):
        audit.require()


def test_one_side_alone_is_said_and_no_error(weight_map: WeightMap) -> None:
    quantization = quantization_config(weight_map, fp8_tensors(weight_map))
    rollouts = audited(weight_map, PrecisionSettings(), quantization)
    training = audited(weight_map, precision(), None)
    assert rollouts.remarks == ("the servers compute in FP8 and the trainer does not",) and not rollouts.problems
    assert training.remarks == ("the trainer computes in FP8 and the servers do not",) and not training.problems
    neither = audited(weight_map, PrecisionSettings(), None)
    assert neither.remarks == neither.problems == ()


def test_an_export_is_held_to_the_trainer_where_there_is_one(weight_map: WeightMap) -> None:
    """Whatever servers do; and where nothing is exported in FP8, what an export would be is no error."""
    trainer = precision(fp8_recipe="mxfp8")
    for served in ({}, trained_layers(weight_map, trainer)):
        assert audit_layers(weight_map, trainer, served).problems == ()
        (problem,) = audit_layers(weight_map, trainer, served, exports=True).problems
        assert "FP8 in both the trainer and our FP8 export, by other scales" in problem


def test_scales_that_are_powers_of_two_are_told(weight_map: WeightMap) -> None:
    """Transformer Engine's, unless it was told otherwise; the simulation's are as servers have them."""
    served = served_layers(weight_map, quantization_config(weight_map, fp8_tensors(weight_map)))
    engine = precision(fp8="transformer_engine")
    (remark,) = audit_layers(weight_map, engine, served, any_scale=False).remarks
    assert "powers of two" in remark and "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1" in remark
    for trainer, any_scale in (
        (engine, True),
        (precision(), False),
        (precision(fp8="transformer_engine", fp8_recipe="mxfp8"), False),
    ):
        assert audit_layers(weight_map, trainer, served, any_scale=any_scale).remarks == ()
    assert audit_layers(weight_map, engine, {}, any_scale=False).remarks == (
        "the trainer computes in FP8 and the servers do not",
    )


def test_what_is_not_known_is_refused(weight_map: WeightMap) -> None:
    with pytest.raises(SettingsError, match="of method 'awq'"):
        served_layers(weight_map, {"quant_method": "awq"})
    with pytest.raises(SettingsError, match="--quantization is 'w8a8_int8'"):
        served_layers(weight_map, None, "w8a8_int8")


def test_what_servers_do_without_blocks(weight_map: WeightMap) -> None:
    """A scale a token, of their own weights a scale a row, of experts one a tensor: no recipe of the trainer is that."""
    tensorwise = trained_layers(weight_map, precision(fp8_recipe="tensorwise"))
    online = served_layers(weight_map, None, "fp8")
    assert online.keys() == tensorwise.keys() and differences("a", online, "b", online) == []
    stored = served_layers(weight_map, blocks(weight_block_size=None)(weight_map))
    for served, dense in (
        (online, "weights one scale a row, activations"),
        (stored, "weights one scale a tensor, activations"),
    ):
        (problem,) = differences("the trainer", tensorwise, "the servers", served)
        assert f"here, {dense} one scale a row there" in problem and "experts" not in problem


def test_narrow_layers_that_servers_cannot_round_are_named(tmp_path: Path) -> None:
    """The trainer rounds them, an FP8 export cannot: experts of width 32 do not fill blocks of 128."""
    weight_map = WeightMap(read_architecture(write_tiny_config("qwen3_moe", tmp_path)))
    audit = audited(weight_map, precision(), quantization_config(weight_map, fp8_tensors(weight_map)))
    assert len(audit.problems) == 2 and all("mlp.experts.*.up_proj" in problem for problem in audit.problems)


def test_a_run_is_refused_before_it_starts(tmp_path: Path) -> None:
    path = write_tiny_config("qwen3_moe", tmp_path, **WIDE)
    architecture = read_architecture(path)
    weight_map = WeightMap(architecture)
    quantization = quantization_config(weight_map, fp8_tensors(weight_map))
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    settings = Settings.model_validate({"policy": {"config": path}, "precision": {"fp8": "simulated"}})
    require_same_layers(settings, architecture, tmp_path)
    other = settings.model_copy(update={"precision": precision(fp8_skip_last_layers=1)})
    with pytest.raises(SettingsError, match=r"not in the trainer: model\.layers\.\{3\}"):
        require_same_layers(other, architecture, tmp_path)
    require_same_layers(other, architecture, None)  # servers that are not quantised


def test_modules_put_layers_together() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight" for layer in (0, 1, 2, 5) for expert in (0, 1)]
    assert modules(names) == {"model.layers.*.mlp.experts.*.up_proj": ("0-2,5", names[0])}
