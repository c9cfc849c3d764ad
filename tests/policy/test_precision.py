"""Number formats: on-policy ratios are exactly one in all of them, and simulated FP8 does what it says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.config.settings import PrecisionSettings
from megatron_rl.objectives.gspo import SequencePolicyLoss
from megatron_rl.policy.device import Device
from megatron_rl.policy.precision import quantized_modules, takes_transformer_engine
from tests.parallel.jobs import toy_sequences
from tests.policy.single import opened, tiny_settings

SEQUENCES = toy_sequences(4, 6, 120, 30)
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "tensorwise": {"dtype": "bfloat16", "fp8": "simulated", "fp8_recipe": "tensorwise"},
    "blockwise": {"dtype": "bfloat16", "fp8": "simulated", "fp8_recipe": "blockwise"},
    "mxfp8": {"dtype": "bfloat16", "fp8": "simulated", "fp8_recipe": "mxfp8"},
}
# The tiny model's widths are not multiples of FP8 blocks; these are.
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def settings(folder: Path, precision: dict[str, Any], **sections: Any) -> Any:
    from tests.reference.tiny import write_tiny_config

    folder.mkdir(exist_ok=True)
    config = write_tiny_config("qwen3_moe", folder, **WIDE)
    return tiny_settings(folder, policy={"config": config}, precision=precision, batch={"max_tokens": 128}, **sections)


@pytest.mark.parametrize("name", FORMATS)
def test_on_policy_ratio_is_exactly_one(name: str, tmp_path: Path) -> None:
    """`old` and `new` of unchanged weights are bitwise equal; after a step they are not."""
    with opened(settings(tmp_path, FORMATS[name], optimizer={"lr": 1e-2})) as policy:
        packs = policy.pack(SEQUENCES)
        scored = policy.log_probs(packs)
        again = policy.log_probs(packs)
        assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(scored, again, strict=True))
        assert scored[0].log_probs.dtype == torch.float32
        old = {"old": [values.log_probs for values in scored]}
        first = policy.update(packs, SequencePolicyLoss(), old)
        second = policy.update(packs, SequencePolicyLoss(), old)
        assert first.metrics["ratio_deviation"] == 0.0 and first.metrics["clip_fraction"] == 0.0
        assert second.metrics["ratio_deviation"] > 0.0
        assert first.grad_norm > 0.0


def test_simulated_fp8_takes_layers_that_it_can_round() -> None:
    """Transformer Engine's would be found in no list of linear layers, and nothing be rounded, without a word."""
    gpu = Device("cuda", torch.device("cuda", 0), "nccl", transformer_engine=True)
    assert takes_transformer_engine(PrecisionSettings(fp8="off"), gpu)
    assert takes_transformer_engine(PrecisionSettings(fp8="transformer_engine"), gpu)
    assert not takes_transformer_engine(PrecisionSettings(fp8="simulated"), gpu)


def test_formats_differ_by_their_grain(tmp_path: Path) -> None:
    """Against float32: bfloat16 is close, FP8 is coarser, finer blocks are closer than one scale a tensor."""
    log_probs = {}
    for name, precision in FORMATS.items():
        with opened(settings(tmp_path, precision)) as policy:
            packs = policy.pack(SEQUENCES)
            arrays = policy.per_sequence(packs, [values.log_probs for values in policy.log_probs(packs)])
            log_probs[name] = np.concatenate([arrays[index] for index in sorted(arrays)])
    error = {name: float(np.abs(values - log_probs["float32"]).mean()) for name, values in log_probs.items()}
    assert 0 < error["bfloat16"] < error["blockwise"] < 1.0
    assert error["bfloat16"] < error["tensorwise"] < 1.0
    assert len({error[name] for name in FORMATS}) == len(FORMATS)


def test_only_linear_layers_of_chosen_layers_are_quantized(tmp_path: Path) -> None:
    precision = {**FORMATS["blockwise"], "fp8_skip_first_layers": 1, "fp8_skip_last_layers": 1}
    chosen = settings(tmp_path, precision)
    with opened(chosen) as policy:
        names = quantized_modules(policy.model.bare_chunks[0], chosen.precision, 0, policy.architecture.layers)
        layers = {name.split(".")[2] for name in names}
        kinds = {name.split(".", 3)[3] for name in names}
    assert layers == {"1", "2"}
    assert kinds == {
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.experts.linear_fc1",
        "mlp.experts.linear_fc2",
    }
