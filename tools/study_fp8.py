"""What FP8 does to ratios and to learning, on both sides or on one, and what repeating the routing takes off it. No GPU.

FP8 is simulated: in the policy every product's inputs are rounded (precision.fp8=simulated); a server gets weights that went
through FP8 in blocks of 128 x 128, and computes with them in bfloat16.

    server …        noise: a server in this format samples from a random Qwen3-MoE of 8 layers with 16 experts, 4 a token;
                    policies in float32, bfloat16 and FP8 score the same tokens, with and without the server's routing (R3)
    gspo …, grpo …  learning: the quickstart's toy, 20 steps of 64 responses in 4 minibatches, in bfloat16, with FP8 on both
                    sides, on the server's alone, on the trainer's alone; routers choose anew (live), repeat the routing of
                    the pass that scored `old` (R2), or the server's (R3)

    python -m tools.study_fp8                           what is missing; may be killed and started again at any time
    python -m tools.study_fp8 --list                    which runs there are
    python -m tools.study_fp8 --only "server bfloat16"  one of them, again
    python -m tools.study_fp8 --page                    the part of docs/fidelity.md and its pictures from what there is

Results go to docs/fidelity/fp8.json, a line a run, and from there into docs/fidelity.md.
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_rl.train.upstream import quiet_upstream

quiet_upstream()

import numpy as np  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_rl.config.families import read_architecture  # noqa: E402
from megatron_rl.config.settings import Settings  # noqa: E402
from megatron_rl.fidelity.bench import Draws, bench  # noqa: E402
from megatron_rl.fidelity.scoring import Ask, score  # noqa: E402
from megatron_rl.fidelity.setup import prompts_of, settings_of  # noqa: E402
from megatron_rl.fidelity.tokens import Compared  # noqa: E402
from megatron_rl.policy.layout import Launch  # noqa: E402
from megatron_rl.train import steps  # noqa: E402
from megatron_rl.train.publishing import open_publisher  # noqa: E402
from megatron_rl.weights.fp8 import linear_tensors  # noqa: E402
from megatron_rl.weights.map import WeightMap  # noqa: E402
from megatron_rl.weights.publish.publisher import Publisher  # noqa: E402
from megatron_rl.weights.publish.wire import Parcel  # noqa: E402
from megatron_rl.weights.quantize import WEIGHT_BLOCKS, round_to_fp8  # noqa: E402
from tests.reference.tiny_checkpoint import write_served_checkpoint  # noqa: E402
from tools import fp8_page  # noqa: E402
from tools.toy_runs import (  # noqa: E402
    Laboratory,
    Results,
    Stopped,
    chosen,
    laboratory,
    progress_bars,
    rounded,
    series,
    show,
    study_parser,
)

# -- noise
SHAPE = {"num_hidden_layers": 8, "num_experts": 16, "num_experts_per_tok": 4, "hidden_size": 128, "moe_intermediate_size": 128}
PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "FP8": {"dtype": "bfloat16", "fp8": "simulated"},
}
SERVERS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "FP8": ("bfloat16", True)}
PROMPTS, TOKENS = 16, 96
BANDS = {"gspo": (3e-4, 4e-4), "grpo": (0.2, 0.27)}  # the paper's, around 1

# -- learning
STEPS, MINIBATCHES, GROUPS, GROUP_SIZE = 20, 4, 8, 8
SEEDS = 2  # of each arm
COMMON = (
    f"run.steps={STEPS}",
    f"batch.minibatches={MINIBATCHES}",
    f"sampling.groups={GROUPS}",
    f"sampling.group_size={GROUP_SIZE}",
    "sampling.routing=true",
    "precision.dtype=bfloat16",
    "publish.tolerance=0.5",  # FP8 on one side is meant here, and no reason to stop
)
OBJECTIVES = {"gspo": (), "grpo": ("objective.surrogate=grpo", "objective.options={clip_low: 0.2, clip_high: 0.27}")}
FORMATS = {"bfloat16": (False, False), "FP8 both": (True, True), "FP8 server": (True, False), "FP8 trainer": (False, True)}
ROUTINGS = {"live": "off", "R2": "policy", "R3": "rollout"}
SERIES = (
    "reward/mean", "clip_fraction", "clip_fraction_tokens", "ratio_deviation", "old_k3", "grad_norm", "mismatch_k3",
    "mismatch_max", "replay/choices_differ", "replay/rollout_choices_differ",
)  # fmt: skip
CONDITIONS = {
    "prompts": PROMPTS, "tokens": TOKENS,
    "steps": STEPS, "minibatches": MINIBATCHES, "groups": GROUPS, "group_size": GROUP_SIZE, "seeds": SEEDS,
}  # fmt: skip


def plan() -> list[str]:
    """Every run, seed after seed."""
    arms = [f"{goal} {form} {routing}" for form in FORMATS for routing in ROUTINGS for goal in OBJECTIVES]
    return [*(f"server {name}" for name in SERVERS), *(f"{arm} seed {seed}" for seed in range(SEEDS) for arm in arms)]


# -- noise before anything is learned --------------------------------------------------------------------------------------


def noise_of(name: str, folder: Path) -> dict[str, Any]:
    """For each precision of the policy, how its log-probs compare with those of a server in this format."""
    dtype, narrow = SERVERS[name]
    shutil.rmtree(folder, ignore_errors=True)
    model = write_served_checkpoint(folder / "model", "qwen3_moe", **SHAPE)
    served = through_fp8(model, folder / "fp8") if narrow else model
    settings = settings_of(model, [f"sglang.dtype={dtype}", "precision.dtype=float32", f"servers.model={served}"], [])
    prompts, _ = prompts_of(settings, (), PROMPTS)
    with bench(settings, Draws(prompts, TOKENS, 1.0), lambda done, total: None) as hands:
        observation = hands.observe()
    layers = [layer for layer, holds in enumerate(read_architecture(model).moe_layers) if holds]
    longest, found = max(map(len, prompts)) + TOKENS, {}
    for policy, precision in PRECISIONS.items():
        own = Settings.model_validate({**settings.model_dump(), "precision": precision})
        _, (live, held) = score(own, Launch(), observation, longest, [Ask(1.0), Ask(1.0, replay=True)])
        free = Compared.of(observation.drawn, live.log_probs, live.routes, layers=layers)
        assert free.agree is not None
        found[policy] = {
            "live": noise(free),
            "R3": noise(Compared.of(observation.drawn, held.log_probs)),
            "choices_differ": float(1 - free.agree.mean()),
            "tokens_differ": float((~free.agree.all(1)).mean()),
        }
    return found


def noise(compared: Compared) -> dict[str, float]:
    """How far ratios are from 1 when `old` is the rollout's and nothing has been learned: spreads, shares that a clip takes."""
    summary = compared.summary()
    ratios = {
        "gspo": np.exp(compared.difference.reshape(PROMPTS, TOKENS).mean(1)),  # [sequences]
        "grpo": np.exp(compared.difference),  # [tokens]
    }
    found = {name: summary[name] for name in ("mean", "p99", "max", "kl")}
    for name, ratio in ratios.items():
        low, high = BANDS[name]
        found[f"{name}_spread"] = float(np.abs(ratio - 1).mean())
        found[f"{name}_beyond"] = float(((ratio < 1 - low) | (ratio > 1 + high)).mean())
    return dict(zip(found, rounded(list(found.values()), 4), strict=True))


def through_fp8(model: Path, folder: Path) -> Path:
    """The model with every linear weight of the decoder as FP8 has it."""
    shutil.copytree(model, folder)
    linear = linear_tensors(WeightMap(read_architecture(model)))
    for path in folder.glob("*.safetensors"):
        weights = {name: in_fp8(weight) if name in linear else weight for name, weight in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    return folder


def in_fp8(weight: Tensor) -> Tensor:
    return round_to_fp8(weight, WEIGHT_BLOCKS["blockwise"])


# -- learning --------------------------------------------------------------------------------------------------------------


def parts_of(name: str) -> tuple[str, str, str, int]:
    """Objective, formats, routing and seed of a run."""
    arm, _, seed = name.partition(" seed ")
    goal, _, rest = arm.partition(" ")
    form, _, routing = rest.rpartition(" ")
    return goal, form, routing, int(seed)


def own_settings(name: str) -> list[str]:
    goal, form, routing, seed = parts_of(name)
    fp8 = ["precision.fp8=simulated"] if FORMATS[form][1] else []
    return [*OBJECTIVES[goal], *fp8, f"objective.routing_replay={ROUTINGS[routing]}", f"run.seed={seed}"]


def learned(laboratory: Laboratory, name: str, advance: Callable[[], None]) -> dict[str, Any]:
    own = own_settings(name)
    with weights_in_fp8() if FORMATS[parts_of(name)[1]][0] else nullcontext():
        told = laboratory.run(name, [*COMMON, *own], advance)
    return {"settings": own, **series(told, SERIES)}


@contextmanager
def weights_in_fp8() -> Iterator[None]:
    """What is published meanwhile goes through FP8 on its way, so that servers compute with rounded weights."""

    def opened(*arguments: Any) -> Publisher:
        publisher = open_publisher(*arguments)
        linear = linear_tensors(publisher.wire.weight_map)

        def through(name: str, tensor: Tensor) -> Parcel | None:
            return [(name, in_fp8(tensor))] if name in linear else None

        publisher.wire = replace(publisher.wire, quantizer=through)
        return publisher

    with mock.patch.object(steps, "open_publisher", opened):
        yield


# -- the study -------------------------------------------------------------------------------------------------------------


def study(folder: Path, todo: Sequence[str], results: Results) -> None:
    with progress_bars() as progress:
        whole = progress.add_task("runs", total=len(todo))

        def done(name: str, found: Mapping[str, Any]) -> None:
            results.add(name, found, plan())
            progress.advance(whole)

        servers = [name for name in todo if name.startswith("server ")]
        for name in servers:
            done(name, noise_of(name.removeprefix("server "), folder / "fp8"))
        if len(servers) == len(todo):
            return
        with laboratory(folder, dtype="bfloat16", enable_return_routed_experts=True) as opened:
            for name in todo[len(servers) :]:
                task = progress.add_task(name, total=STEPS)
                done(name, learned(opened, name, partial(progress.advance, task)))
                progress.remove_task(task)


def main() -> None:
    arguments = study_parser(__doc__, fp8_page.RESULTS).parse_args()
    results = Results(arguments.results, CONDITIONS)
    if arguments.list:
        show(plan(), results.runs)
        return
    todo = [] if arguments.page else chosen(plan(), results.runs, arguments.only)
    if todo:
        try:
            study(arguments.folder, todo, results)
        except Stopped as error:
            sys.exit(f"{error}; start again to go on")
    missing = [name for name in plan() if name not in results.runs]
    if missing:
        sys.exit(f"no page yet, for these runs are missing: {', '.join(missing)}")
    if arguments.results == fp8_page.RESULTS:
        fp8_page.write()


if __name__ == "__main__":
    main()
