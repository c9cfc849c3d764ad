"""Combinations that cannot work: each is refused with the settings' names, its own reason and a fix."""

import re
from dataclasses import replace

import pytest

from megatron_rl.config.architecture import LatentAttention
from megatron_rl.config.checks import RULES, WARNINGS, check, require_valid, warnings
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import load_settings
from megatron_rl.config.rules.case import Case
from megatron_rl.config.settings import Settings
from tests.config.models import DENSE, EXPERTS, LATENT, MODELS

FP8 = "precision.fp8=transformer_engine"
SIMULATED = "precision.fp8=simulated"

# id: (model, ranks, overrides, words of the message, words of the fix)
WRONG: dict[str, tuple[str, int, str, str, str]] = {
    # first weights
    "first weights from a folder without any": (
        "dense", 1, "policy.init=configs",
        "configs: there is neither model.safetensors.index.json nor model.safetensors nor manifest.json in it",
        "or policy.init=random",
    ),
    # layout
    "declared ranks": (
        "dense", 4, "layout.world_size=8",
        "layout.world_size = 8: the launcher started 4 ranks", "Start 8 ranks",
    ),
    "ranks not the product": (
        "moe", 12, "layout.tensor=2 layout.pipeline=2 layout.context=2",
        "layout.context = 2: one replica of the model takes their product, 8 ranks, and 12 ranks are no multiple",
        "multiple of 8 ranks",
    ),
    "fewer ranks than the product": (
        "dense", 1, "layout.tensor=2",
        "takes their product, 2 ranks", "Start a multiple of 2 ranks",
    ),
    "experts do not fill a stage": (
        "moe", 8, "layout.pipeline=4 layout.expert=4",
        "layout.expert = 4, layout.expert_tensor = 1: the experts of a layer take their product, 4 ranks, and the 2 ranks",
        "among 1 or 2, or start a multiple of 16 ranks",
    ),
    "expert ranks without experts": (
        "dense", 2, "layout.expert=2",
        "layout.expert = 2: the model has no experts", "layout.expert=1",
    ),
    "expert shards without experts": (
        "dense", 2, "layout.expert_tensor=2",
        "layout.expert_tensor = 2: the model has no experts", "layout.expert_tensor=1",
    ),
    "sequence parallel alone": (
        "dense", 1, "layout.sequence_parallel=true",
        "layout.sequence_parallel = true with layout.tensor = 1", "raise layout.tensor",
    ),
    "tensor without sequence parallel on MoE": (
        "moe", 2, "layout.tensor=2 layout.sequence_parallel=false",
        "layout.sequence_parallel = false with layout.tensor = 2: Megatron trains a mixture of experts",
        "Remove layout.sequence_parallel=false",
    ),
    "heads": (
        "latent", 3, "layout.tensor=3 batch.max_tokens=8190",
        "layout.tensor = 3: the model's 32 attention heads", "1, 2, 4, 8, 16 or 32",
    ),
    "fewer key-value heads than tensor ranks": (
        "dense", 8, "layout.tensor=8",
        "layout.tensor = 8: the model's 4 key-value heads", "Set layout.tensor to 1, 2 or 4;",
    ),
    "shared experts": (
        "shared 500", 8, "layout.tensor=8",
        "the shared-expert width 500 does not divide", "Set layout.tensor to a smaller power of two",
    ),
    "feed-forward": (
        "ffn 1001", 2, "layout.tensor=2",
        "the dense feed-forward width 1001 does not divide", "smaller power of two",
    ),
    "vocabulary": (
        "heads 6", 3, "layout.tensor=3 batch.max_tokens=8190",
        "the vocabulary of 32000 tokens, padded to 32000 rows, does not divide", "Set layout.tensor to a power of two",
    ),
    "latent attention": (
        "q_lora 36", 8, "layout.tensor=8",
        "the query bottleneck of the latent attention, 36 wide", "smaller power of two",
    ),
    "experts per rank": ("moe", 3, "layout.expert=3", "layout.expert = 3: the model's 16 experts", "1, 2, 4, 8 or 16"),
    "expert width": (
        "moe", 3, "layout.expert_tensor=3",
        "layout.expert_tensor = 3: the width of one expert, 512,", "layout.expert_tensor=1",
    ),
    "layers per chunk": (
        "moe", 3, "layout.pipeline=3",
        "layout.pipeline = 3, layout.virtual_pipeline = 1: the model's 8 layers", "layout.pipeline_layers=[3,3,2]",
    ),
    "more chunks than layers": (
        "moe", 16, "layout.pipeline=16",
        "do not divide over their product, 16 chunks", "Use fewer chunks",
    ),
    "pipeline_layers of the wrong length": (
        "moe", 2, "layout.pipeline=2 layout.pipeline_layers=[8]",
        "layout.pipeline_layers = [8]: these are 1 numbers for", "one number for each chunk",
    ),
    "pipeline_layers of the wrong sum": (
        "moe", 2, "layout.pipeline=2 layout.pipeline_layers=[4,5]",
        "[4, 5]: they add up to 9, the model has 8", "Make them add up to 8",
    ),
    "an empty chunk in the middle": (
        "moe", 3, "layout.pipeline=3 layout.pipeline_layers=[4,0,4]",
        "[4, 0, 4]: a chunk between the first and the last", "Give each of these",
    ),
    "virtual pipeline alone": (
        "dense", 1, "layout.virtual_pipeline=2",
        "layout.virtual_pipeline = 2 with layout.pipeline = 1", "raise layout.pipeline",
    ),
    "gather overlap without its ground": (
        "dense", 1, "layout.overlap_param_gather=true layout.distributed_optimizer=false",
        "with layout.distributed_optimizer = false and layout.overlap_grad_reduce = false: weights are gathered",
        "Set layout.distributed_optimizer=true and layout.overlap_grad_reduce=true",
    ),
    # experts
    "auxiliary loss of a dense model": (
        "dense", 1, "moe.aux_loss_coefficient=0.1",
        "moe.aux_loss_coefficient = 0.1: the model has no experts for it to act on", "(default 0.0)",
    ),
    "dispatcher of a dense model": (
        "dense", 1, "moe.dispatcher=allgather",
        "moe.dispatcher = allgather: the model has no", "default alltoall",
    ),
    "bias update without a bias": (
        "moe", 1, "moe.expert_bias_update_rate=0.001",
        "the router of a qwen3_moe model has no expert bias", "balance with moe.aux_loss_coefficient",
    ),
    "allgather between stages": (
        "moe", 2, "moe.dispatcher=allgather layout.pipeline=2",
        "moe.dispatcher = allgather with layout.pipeline = 2: packs differ in length", "moe.dispatcher=alltoall",
    ),
    "flex on a CPU": (
        "moe", 2, "moe.dispatcher=flex layout.expert=2 device.kind=cpu",
        "moe.dispatcher = flex with device.kind = cpu", "moe.dispatcher=alltoall",
    ),
    "flex with nothing to dispatch": (
        "moe", 1, "moe.dispatcher=flex",
        "layout.expert = 1, layout.expert_tensor = 1: every rank holds all experts", "Raise layout.expert",
    ),
    "flex in float32": (
        "moe", 2, "moe.dispatcher=flex layout.expert=2 precision.dtype=float32",
        "flex with precision.dtype = float32", "precision.dtype=bfloat16",
    ),
    # packs
    "pack and context": (
        "dense", 2, "layout.context=2 batch.max_tokens=8190",
        "batch.max_tokens = 8190: packs are cut into equal parts by layout.context = 2", "batch.max_tokens=8192 or 8188",
    ),
    "pack and sequence parallel": (
        "dense", 2, "layout.tensor=2 batch.max_tokens=8191",
        "over layout.tensor = 2", "batch.max_tokens=8192 or 8190",
    ),
    "pack and FP8": (
        "dense", 1, f"{SIMULATED} batch.max_tokens=100",
        "for precision.fp8 = simulated: their length is a multiple of 128", "batch.max_tokens=128.",
    ),
    "sequence and context": (
        "dense", 2, "layout.context=2 batch.max_sequence=4094",
        "batch.max_sequence = 4094 with layout.context = 2", "batch.max_sequence=4096",
    ),
    "sequence longer than a pack": (
        "dense", 1, "batch.max_sequence=8192 batch.max_tokens=4096",
        "a sequence is never cut", "batch.max_tokens to at least 8192",
    ),
    "sequence longer than the model's": (
        "dense", 1, "batch.max_sequence=8193 batch.max_tokens=16384",
        "batch.max_sequence = 8193: the model knows 8192 positions", "rope_scaling",
    ),
    # precision
    "Transformer Engine on a CPU": (
        "dense", 1, f"{FP8} device.kind=cpu",
        "precision.fp8 = transformer_engine with device.kind = cpu", SIMULATED,
    ),
    "Transformer Engine in float32": (
        "dense", 1, f"{FP8} precision.dtype=float32",
        "transformer_engine with precision.dtype = float32", "precision.dtype=bfloat16",
    ),
    "delayed scaling": (
        "dense", 1, f"{FP8} precision.fp8_recipe=delayed",
        "precision.fp8_recipe = delayed: scales out of a history", "precision.fp8_recipe to tensorwise, blockwise or mxfp8",
    ),
    "no FP8 layer left": (
        "dense", 1, f"{SIMULATED} precision.fp8_skip_first_layers=4 precision.fp8_skip_last_layers=4",
        "of the model's 8 layers none is left", "precision.fp8=off",
    ),
    "skipped layers over two stages": (
        "dense", 4, f"{FP8} layout.pipeline=4 precision.fp8_skip_first_layers=3",
        "precision.fp8_skip_first_layers = 3 with layout.pipeline = 4", "to at most 2",
    ),
    "FP8 blocks across shards": (
        "moe", 8, f"{SIMULATED} layout.expert_tensor=8",
        "the model's expert width, 64 on each rank, must be a multiple of 128", "Cut it less",
    ),
    "MXFP8 blocks": (
        "hidden 1040", 1, f"{SIMULATED} precision.fp8_recipe=mxfp8",
        "hidden width, 1040 on each rank, must be a multiple of 32", "precision.fp8=off",
    ),
    "FP8 tiles": (
        "ffn 1000", 1, f"{SIMULATED} precision.fp8_recipe=tensorwise",
        "feed-forward width, 1000 on each rank, must be a multiple of 16", "fp8_recipe",
    ),
    # training
    "learning rate that rises": (
        "dense", 1, "optimizer.lr=1e-6 optimizer.min_lr=1e-5",
        "optimizer.min_lr = 1e-05 with optimizer.lr = 1e-06", "at most 1e-06",
    ),
    "warm-up longer than the run": (
        "dense", 1, "optimizer.warmup_steps=10 run.steps=10",
        "optimizer.warmup_steps = 10 with run.steps = 10", "optimizer.warmup_steps below 10",
    ),
    "warm-up longer than the decay": (
        "dense", 1, "optimizer.warmup_steps=10 optimizer.decay_steps=5",
        "with optimizer.decay_steps = 5", "optimizer.warmup_steps below 5",
    ),
    "weight decay without an end": (
        "dense", 1, "optimizer.weight_decay_schedule=linear",
        "optimizer.weight_decay_schedule = linear: no weight decay is given", "Set optimizer.weight_decay_end",
    ),
    "weight decay end without a schedule": (
        "dense", 1, "optimizer.weight_decay_end=0.1",
        "optimizer.weight_decay_end = 0.1 with optimizer.weight_decay_schedule = constant", "to linear or cosine",
    ),
    "nothing to recompute": (
        "dense", 1, "recompute.mode=selective recompute.modules=[]",
        "recompute.modules = [] with recompute.mode = selective", "recompute.mode=none",
    ),
    "recomputed MLA without MLA": (
        "moe", 1, "recompute.mode=selective recompute.modules=[mla_up_proj]",
        "recompute.modules contains mla_up_proj: a qwen3_moe model", "Choose from core_attn, layernorm, moe or moe_act",
    ),
    "recomputed experts of a dense model": (
        "dense", 1, "recompute.mode=selective recompute.modules=[moe_act]",
        "contains moe_act: a llama model", "core_attn, layernorm or mlp",
    ),
    "more recomputed layers than a chunk has": (
        "dense", 4, "layout.pipeline=4 recompute.mode=full recompute.method=block recompute.layers=3",
        "recompute.layers = 3 with recompute.method = block: no rank runs more than 2 layers", "at most 2",
    ),
    # data
    "weights of some sources": (
        "dense", 1, 'data.sources=[{"path":"a.jsonl","weight":1},{"path":"b.jsonl"}]',
        "data.sources: b.jsonl has no weight", "every source, or to none",
    ),
    "template of nobody": (
        "dense", 1, "data.template=none data.chat_template=own.jinja",
        "data.chat_template = own.jinja with data.template = none", "data.template=chat",
    ),
    "two questions": (
        "dense", 1, 'data.sources=[{"path":"a.jsonl","prompt":"p","messages":"m"}]',
        "data source a.jsonl: prompt and messages are set", "Keep one",
    ),
    # sampling
    "episodes of nobody": (
        "dense", 1, "sampling.strategy=episodes",
        "sampling.strategy = episodes with sampling.environment = null", "Name one",
    ),
    "environment of nobody": (
        "dense", 1, "sampling.environment=mine:Game",
        "sampling.environment = mine:Game with sampling.strategy = grouped", "episodes or turn_groups",
    ),
    "partial and ahead": (
        "dense", 1, "sampling.partial=true sampling.ahead=2",
        "sampling.ahead = 2 with sampling.partial = true", "sampling.ahead=0",
    ),
    "samples longer than packs": (
        "dense", 1, "sampling.max_tokens=9000",
        "sampling.max_tokens = 9000 with batch.max_tokens = 8192", "at most 8192",
    ),
    "responses too short to be long enough": (
        "dense", 1, "sampling.min_new_tokens=2000",
        "sampling.min_new_tokens = 2000 with sampling.max_new_tokens = 1024", "at most 1024",
    ),
    "more minibatches than groups": (
        "dense", 1, "batch.minibatches=33",
        "batch.minibatches = 33 with sampling.groups = 32", "at most 32",
    ),
}  # fmt: skip

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
    "never read": (f"{SIMULATED} {OLD_OF_THE_ENGINE} objective.on_policy=true", None),
}


@pytest.mark.parametrize("overrides, said", UNWISE.values(), ids=UNWISE)
def test_what_is_unwise_is_allowed_with_a_warning(overrides: str, said: str | None) -> None:
    settings = load_settings(None, ["policy.config=model", *overrides.split()])
    require_valid(settings, DENSE, 1)
    told = warnings(settings, DENSE, 1)
    assert told == [] if said is None else len(told) == 1 and re.match(said, told[0])


def test_every_warning_is_called_for_by_a_case() -> None:
    cases = [load_settings(None, ["policy.config=model", *overrides.split()]) for overrides, said in UNWISE.values() if said]
    assert all(any(list(rule(Case(settings, DENSE, 1))) for settings in cases) for rule in WARNINGS)
