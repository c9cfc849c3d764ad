"""GSPO's clip band is thinner than one step of bfloat16: it is hit exactly all the same, whatever the model computes in."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.objectives.registry import build_objective
from tests.objectives.samples import sample_of
from tests.objectives.steps import Layout, metric, run
from tests.parallel.jobs import toy_sequences
from tests.policy.single import opened, tiny_settings
from tests.reference.tiny import write_tiny_config

# Mean log-ratios around the band's ends, 1 − 3e-4 and 1 + 4e-4, by half a window: advantage, mean log-ratio, clipped.
SHIFTS = [(1.0, 4.5e-4, True), (1.0, 3.5e-4, False), (-1.0, -3.5e-4, True), (-1.0, -2.5e-4, False), (-1.0, 4.5e-4, False)]
FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"dtype": "bfloat16", "fp8": "simulated", "fp8_recipe": "blockwise"},
}
WIDTHS = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def test_bfloat16_could_not_tell() -> None:
    ratios = torch.tensor([1.0004, 0.9997], dtype=torch.float32)
    assert torch.equal(ratios.bfloat16(), torch.ones(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "luspo"])
@pytest.mark.parametrize(("advantage", "shift", "clipped"), SHIFTS)
def test_half_a_window_is_told_apart_in_float32(name: str, advantage: float, shift: float, clipped: bool) -> None:
    """Long responses of log-probs around −2, whose log-ratios scatter a thousand times as wide as the band."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4096, generator=generator, dtype=torch.float64) * 0.3
    old = -2 + torch.randn(4096, generator=generator, dtype=torch.float64) * 0.5
    differences = noise - noise.mean() + shift
    sample = sample_of((old + differences).tolist(), advantage, old=old.tolist())
    outcome = run(build_objective(name), [sample], Layout(dtype=torch.float32))
    assert metric(outcome, "clip_fraction") == (1.0 if clipped else 0.0)
    assert any(outcome.answer.gradient[0]) is not clipped


@pytest.mark.parametrize("name", FORMATS)
def test_half_a_window_is_told_apart_by_a_policy(name: str, tmp_path: Path) -> None:
    """A model that computes in bfloat16 or FP8: its log-probs of now, moved by the shift, as `old`."""
    config = write_tiny_config("qwen3", tmp_path, **WIDTHS)
    settings = tiny_settings(tmp_path, policy={"config": config}, precision=FORMATS[name], batch={"max_tokens": 128})
    sequences = toy_sequences(4, 6, 120, 30)
    with opened(settings) as policy:
        for advantage, shift, clipped in SHIFTS:
            packs = policy.pack([replace(sequence, scalars={"advantage": advantage}) for sequence in sequences])
            old = [values.log_probs - shift for values in policy.log_probs(packs)]
            report = policy.update(packs, build_objective("gspo"), {"old": old})
            assert report.metrics["clip_fraction"] == (1.0 if clipped else 0.0)
            assert (report.grad_norm > 0) is not clipped
            assert report.metrics["ratio"] == pytest.approx(math.exp(shift), abs=1e-6)  # two float32 steps at a log-prob of −5
