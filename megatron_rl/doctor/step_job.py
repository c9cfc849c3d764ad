"""The step itself: `check_step` runs it."""

import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megatron_rl.config.settings import Settings
from megatron_rl.doctor.apart import Lines
from megatron_rl.objectives.gspo import SequencePolicyLoss
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from megatron_rl.train.toy_model import write_toy_model
from megatron_rl.train.upstream import quiet_upstream
from megatron_rl.types import Sequence

SAMPLES, LENGTH, PROMPT = 4, 48, 8


def made_up() -> list[Sequence]:
    """Samples that one policy could have written, half of them good."""
    draw = np.random.default_rng(0)
    mask = np.arange(LENGTH) >= PROMPT
    return [
        Sequence(index, draw.integers(0, 256, LENGTH), mask, {}, {"advantage": 1.0 - 2.0 * (index % 2)}, group=0)
        for index in range(SAMPLES)
    ]


def settings_of(model: Path) -> Settings:
    return Settings.model_validate(
        {
            "policy": {"config": model, "init": model},
            "optimizer": {"lr": 1e-3},
            "batch": {"max_tokens": SAMPLES * LENGTH},
        }
    )


def learn(policy: Policy) -> dict[str, float | bool | str]:
    """Score, take a step, score again."""
    started = time.monotonic()
    packs = policy.pack(made_up())
    old = [values.log_probs for values in policy.log_probs(packs)]
    report = policy.update(packs, SequencePolicyLoss(clip_low=0.2, clip_high=0.2), {"old": old})
    new = [values.log_probs for values in policy.log_probs(packs)]
    moved = max((after - before).abs().max().item() for before, after in zip(old, new, strict=True))
    device = policy.layout.device
    name = torch.cuda.get_device_name() if device.cuda else f"the CPU ({torch.get_num_threads()} threads)"
    learned = report.applied and math.isfinite(moved) and moved > 0 and report.grad_norm > 0
    return {
        "device": name,
        "learned": learned,
        "loss": report.loss,
        "gradient": report.grad_norm,
        "moved": moved,
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    lines = Lines(Path(sys.argv[1]))
    quiet_upstream()
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        lines.write({"doing": "to write a toy model"})
        write_toy_model(model)
        lines.write({"doing": "to build the policy"})
        policy = Policy.open(settings_of(model), Launch())
        lines.write({"doing": "to take a step"})
        lines.write(learn(policy))
        policy.close()


if __name__ == "__main__":
    main()
