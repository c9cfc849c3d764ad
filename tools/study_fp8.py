"""The mismatch in every pair of number formats, and what replaying the server's routing (R3) takes off it.

    python -m tools.study_fp8 OUT

Starts one SGLang server at a time on a random Qwen3-MoE of 8 layers with 16 experts, 4 a token: in float32, in bfloat16, and in
bfloat16 with weights that went through FP8. What it samples is scored by policies in float32, bfloat16 and simulated FP8, with
and without the server's routing. Ratios are those of a run that takes the rollout's log-probs for `old`: all of it is noise.
Writes OUT/results.json, in three minutes, most of them for the starts of servers. docs/fidelity.md has the table.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import Settings
from megatron_rl.fidelity.bench import Draws, bench
from megatron_rl.fidelity.scoring import Ask, score
from megatron_rl.fidelity.setup import prompts_of, settings_of
from megatron_rl.fidelity.tokens import Compared
from megatron_rl.policy.layout import Launch
from megatron_rl.train.upstream import quiet_upstream
from megatron_rl.weights.fp8 import linear_tensors
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.quantize import WEIGHT_BLOCKS, round_to_fp8
from tests.reference.tiny_checkpoint import write_served_checkpoint

SHAPE = {"num_hidden_layers": 8, "num_experts": 16, "num_experts_per_tok": 4, "hidden_size": 128, "moe_intermediate_size": 128}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "FP8 (simulated)": {"dtype": "bfloat16", "fp8": "simulated"},
}
SERVERS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "FP8 weights": ("bfloat16", True)}
PROMPTS, TOKENS = 16, 96
GSPO, GRPO = (3e-4, 4e-4), (0.2, 0.27)  # clip bands around 1


def measured(model: Path, server: str, served: Path) -> dict[str, Any]:
    """For each precision of the policy, the comparison without and with the server's routing."""
    settings = settings_of(model, [f"sglang.dtype={server}", "precision.dtype=float32", f"servers.model={served}"], [])
    prompts, _ = prompts_of(settings, (), PROMPTS)
    longest = max(map(len, prompts)) + TOKENS
    with bench(settings, Draws(prompts, TOKENS, 1.0), lambda done, total: None) as hands:
        observation = hands.observe()
    layers = [layer for layer, holds in enumerate(read_architecture(model).moe_layers) if holds]
    found = {}
    for name, precision in PRECISIONS.items():
        own = Settings.model_validate({**settings.model_dump(), "precision": precision})
        _, (live, held) = score(own, Launch(), observation, longest, [Ask(1.0), Ask(1.0, replay=True)])
        free = Compared.of(observation.drawn, live.log_probs, live.routes, layers=layers)
        assert free.agree is not None
        found[name] = {
            "live": {**free.summary(), **noise(free)},
            "replayed": {**(after := Compared.of(observation.drawn, held.log_probs)).summary(), **noise(after)},
            "routing_differs": float(1 - free.agree.mean()),
            "tokens_differing": float((~free.agree.all(1)).mean()),
        }
    return found


def noise(compared: Compared) -> dict[str, float]:
    """How far ratios are from 1 before anything is learned: their spread, and the share beyond the bands that clip."""
    tokens = np.exp(compared.difference)
    sequences = np.exp(compared.difference.reshape(PROMPTS, TOKENS).mean(1))
    beyond = ((ratio < 1 - low) | (ratio > 1 + high) for ratio, (low, high) in ((sequences, GSPO), (tokens, GRPO)))
    return dict(zip(("gspo_beyond", "grpo_beyond"), (float(each.mean()) for each in beyond), strict=True)) | {
        "sequence_spread": float(np.abs(sequences - 1).mean())
    }


def through_fp8(model: Path, folder: Path) -> Path:
    """The model with every linear weight of the decoder as FP8 in blocks of 128 x 128 has it."""
    shutil.copytree(model, folder)
    linear = linear_tensors(WeightMap(read_architecture(model)))
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        rounded = {n: round_to_fp8(w, WEIGHT_BLOCKS["blockwise"]) if n in linear else w for n, w in weights.items()}
        save_file(rounded, path, metadata={"format": "pt"})
    return folder


def main(out: Path) -> None:
    quiet_upstream()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model = write_served_checkpoint(Path(folder) / "model", "qwen3_moe", **SHAPE)
        models = {False: model, True: through_fp8(model, Path(folder) / "fp8")}
        results = {name: measured(model, dtype, models[rounded]) for name, (dtype, rounded) in SERVERS.items()}
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    for server, rows in results.items():
        for policy, row in rows.items():
            print(
                f"server {server}, policy {policy}: other experts {row['routing_differs']:.2%}, "
                f"KL {row['live']['kl']:.2e} -> {row['replayed']['kl']:.2e}, "
                f"mean |Δ| {row['live']['mean']:.2e} -> {row['replayed']['mean']:.2e}, "
                f"largest {row['live']['max']:.2e} -> {row['replayed']['max']:.2e}, "
                f"GSPO beyond {row['live']['gspo_beyond']:.0%} -> {row['replayed']['gspo_beyond']:.0%}, "
                f"spread {row['live']['sequence_spread']:.1e} -> {row['replayed']['sequence_spread']:.1e}, "
                f"GRPO beyond {row['live']['grpo_beyond']:.2%} -> {row['replayed']['grpo_beyond']:.2%}"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
