"""Combinations that cannot work: each is refused with the settings' names, its own reason and a fix."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config.architecture import LatentAttention
from megatron_rl.config.checks import RULES, WARNINGS, check, require_valid, warnings
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import load_settings
from megatron_rl.config.rules.case import Case
from megatron_rl.config.settings import Settings
from tests.config.models import DENSE, EXPERTS, LATENT, MODELS
from tests.config.wrong_settings import FP8, SIMULATED, WRONG

SPECIAL = {
    "heads 6": replace(DENSE, heads=6, kv_heads=3, ffn_hidden=4095),
    "shared 500": replace(LATENT, experts=replace(EXPERTS, shared_hidden=500)),
    "ffn 1001": replace(DENSE, ffn_hidden=1001),
    "ffn 1000": replace(DENSE, ffn_hidden=1000),
    "hidden 1040": replace(DENSE, hidden=1040),
    "q_lora 36": replace(
        LATENT,
        latent_attention=LatentAttention(
            q_lora_rank=36, kv_lora_rank=512, qk_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
    ),
}


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the locked environment, whatever else is installed in this one."""
    monkeypatch.setitem(sys.modules, "wandb", None)


def case(name: str) -> Case:
    model, ranks, overrides, _, _ = WRONG[name]
    return Case(load_settings(None, ["policy.config=model", *overrides.split()]), {**MODELS, **SPECIAL}[model], ranks)


def problems(name: str) -> list[str]:
    wrong = case(name)
    return check(wrong.settings, wrong.architecture, wrong.world_size)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_combination_is_named_with_reason_and_fix(name: str) -> None:
    message, fix = WRONG[name][3:]
    matching = [problem for problem in problems(name) if message in problem]
    assert len(matching) == 1, problems(name)
    assert fix in matching[0].split(message)[1]


@pytest.mark.parametrize("name", WRONG)
def test_one_mistake_gives_one_problem(name: str) -> None:
    """What follows from a mistake is not held against the user as well. Three divides neither heads nor widths."""
    expected = {"heads": 4}.get(name, 1)
    assert len(problems(name)) == expected, problems(name)


def test_messages_are_distinct() -> None:
    told = [next(problem for problem in problems(name) if message in problem) for name, (_, _, _, message, _) in WRONG.items()]
    assert len(set(told)) == len(WRONG) >= 30


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_is_broken_by_a_case(rule: object) -> None:
    assert callable(rule)
    assert any(list(rule(case(name))) for name in WRONG)


ALL_OVERLAPS = "layout.overlap_grad_reduce=true layout.overlap_param_gather=true"
RIGHT = {
    "one rank": ("moe", 1, ""),
    "dense without sequence parallel": ("dense", 4, "layout.tensor=4 layout.sequence_parallel=false"),
    "everything at once": (
        "moe",
        32,
        "layout.tensor=2 layout.pipeline=2 layout.virtual_pipeline=2 layout.context=2 layout.expert=4 layout.expert_tensor=2 "
        f"{ALL_OVERLAPS} batch.max_sequence=8192",
    ),
    "uneven stages with empty ends": ("moe", 4, "layout.pipeline=4 layout.pipeline_layers=[0,4,4,0]"),
    "latent attention": ("latent", 8, "layout.tensor=4 layout.expert=8 moe.expert_bias_update_rate=0.001"),
    "latent attention in blockwise FP8": ("latent", 1, FP8),  # 576 rows of the down projection are no multiple of 128
    "FP8 with sequence parallel": ("moe", 4, f"{FP8} layout.tensor=4 layout.expert_tensor=4"),
    "an FP8 recipe switched off": ("dense", 1, "precision.fp8_recipe=delayed precision.fp8_skip_first_layers=8"),
    "recomputation switched off": ("dense", 1, "recompute.modules=[moe] recompute.layers=9"),
    "schedules": (
        "dense",
        1,
        "optimizer.lr_schedule=cosine optimizer.min_lr=1e-7 optimizer.warmup_steps=9 run.steps=10 "
        "optimizer.weight_decay_end=0.1 optimizer.weight_decay_schedule=cosine",
    ),
    "recomputation": (
        "latent",
        1,
        "recompute.mode=selective recompute.modules=[core_attn,moe_act,layernorm,mla_up_proj,mlp,moe,shared_experts]",
    ),
    "flex": ("moe", 2, "moe.dispatcher=flex layout.expert=2"),
}


@pytest.mark.parametrize("model, ranks, overrides", RIGHT.values(), ids=RIGHT)
def test_what_works_is_let_through(model: str, ranks: int, overrides: str) -> None:
    settings = load_settings(None, ["policy.config=model", *overrides.split()])
    assert check(settings, MODELS[model], ranks) == []
    require_valid(settings, MODELS[model], ranks)


def test_all_problems_are_raised_together() -> None:
    settings = Settings.model_validate(
        {"policy": {"config": "m"}, "layout": {"tensor": 3}, "run": {"steps": 1}, "optimizer": {"warmup_steps": 1}}
    )
    with pytest.raises(SettingsError) as caught:
        require_valid(settings, DENSE, 4)
    assert str(caught.value).splitlines() == check(settings, DENSE, 4)
    assert len(check(settings, DENSE, 4)) > 3


# -- warnings ----------------------------------------------------------------------------------------------------------

OLD_OF_THE_ENGINE = "objective.old_log_probs=rollout"
# id: (overrides, words of the warning, or None)
UNWISE: dict[str, tuple[str, str | None]] = {
    "the engine's log-probs in FP8": (
        f"{SIMULATED} {OLD_OF_THE_ENGINE}",
        "objective.old_log_probs = rollout with precision.fp8 = simulated: .*Set objective.old_log_probs=recompute",
    ),
    "the engine's log-probs in bfloat16": (OLD_OF_THE_ENGINE, None),
    "recomputed in FP8": (SIMULATED, None),
    "drawn from a part": ("sampling.top_p=0.9 sampling.top_k=50", r"sampling.top_p = 0.9 and sampling.top_k = 50: .*Ratios"),
    "the likeliest response again and again": (
        'evaluation.every=5 evaluation.temperature=0 rewards=[{"name":"math"}] data.validation_sources=[{"path":"test.jsonl"}]',
        r"evaluation.samples = 4 with evaluation.temperature = 0: .*Set evaluation.samples=1",
    ),
    "steps forgotten before they are saved": ("bank.keep_steps=5 checkpoint.every=10", r"bank.keep_steps = 5 with .* 10 steps"),
    "ends ruled out": ("sampling.min_new_tokens=5", r"sampling.min_new_tokens = 5: .*reward the length instead"),
    "never read": (f"{SIMULATED} {OLD_OF_THE_ENGINE} objective.on_policy=true", None),
    "a shape without weights": ("policy.init=random", r"policy.init = random: .* of model it takes the shape.* Set policy"),
}


@pytest.fixture
def unwise(tmp_path: Path) -> Callable[[str], Settings]:
    """Settings with a checkpoint to begin with, and these overrides."""
    (tmp_path / "model.safetensors").touch()
    given = ["policy.config=model", f"policy.init={tmp_path}", f"run.directory={tmp_path / 'run'}"]
    return lambda overrides: load_settings(None, [*given, *overrides.split()])


@pytest.mark.parametrize("overrides, said", UNWISE.values(), ids=UNWISE)
def test_what_is_unwise_is_allowed_with_a_warning(overrides: str, said: str | None, unwise: Callable[[str], Settings]) -> None:
    settings = unwise(overrides)
    require_valid(settings, DENSE, 1)
    told = warnings(settings, DENSE, 1)
    assert told == [] if said is None else len(told) == 1 and re.match(said, told[0])


def test_every_warning_is_called_for_by_a_case(unwise: Callable[[str], Settings]) -> None:
    cases = [unwise(overrides) for overrides, said in UNWISE.values() if said]
    assert all(any(list(rule(Case(settings, DENSE, 1))) for settings in cases) for rule in WARNINGS)


def test_first_weights_matter_where_a_run_begins(unwise: Callable[[str], Settings]) -> None:
    """Not where it goes on, nor where servers alone are sampled from."""
    settings = unwise("policy.init=random")
    assert warnings(settings, DENSE, 1, learns=False) == []
    settings.run.directory.mkdir()
    assert len(warnings(settings, DENSE, 1)) == 1
    (settings.run.directory / "settings.yaml").touch()
    assert warnings(settings, DENSE, 1) == []
