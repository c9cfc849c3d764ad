"""What a server can cut the model into: the rule against what SGLang's own model files assert, written out as they have it."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.checks import check
from megatron_rl.config.rules.case import Case
from megatron_rl.config.rules.serving import servers_can_cut_the_model
from megatron_rl.config.settings import Settings
from tests.config.models import DENSE, EXPERTS, LATENT, MOE


def problems(model: Architecture, kind: str = "auto", **arguments: Any) -> list[str]:
    settings = Settings.model_validate({"policy": {"config": "m"}, "sglang": arguments, "device": {"kind": kind}})
    return list(servers_can_cut_the_model(Case(settings, model, 1)))


def asserted(model: Architecture, tp_size: int, ep_size: int, dp_size: int) -> None:
    """In models/, distributed/parallel_state.py, linear.py, fused_moe_triton/layer.py and vocab_parallel_embedding.py."""
    assert tp_size % dp_size == 0
    attn_tp_size = tp_size // dp_size
    assert model.heads % attn_tp_size == 0
    if model.latent_attention is None:
        if model.kv_heads >= attn_tp_size:
            assert model.kv_heads % attn_tp_size == 0
        else:
            assert attn_tp_size % model.kv_heads == 0
    moe_tp_size = tp_size // ep_size
    if model.is_moe and model.experts is not None:
        assert moe_tp_size * ep_size == tp_size  # each GPU is in a group
        assert model.experts.count % ep_size == 0
        assert model.experts.hidden % moe_tp_size == 0
    if not all(model.moe_layers or [False]):
        assert model.ffn_hidden % tp_size == 0
    padded = ((model.vocab + 64 - 1) // 64) * 64
    assert padded % (attn_tp_size if dp_size > 1 and model.tied_embeddings else tp_size) == 0


SHAPES = {
    "dense": DENSE,
    "mixture": replace(MOE, heads=24, kv_heads=8, vocab=64 * 3 * 5, experts=replace(EXPERTS, count=12, hidden=768)),
    "latent, dense layers too": replace(LATENT, heads=12, kv_heads=12, ffn_hidden=3 * 2048, vocab=64 * 6 - 7),
    "odd": replace(DENSE, heads=6, kv_heads=3, ffn_hidden=3 * 64, vocab=100),
    "tied": replace(DENSE, heads=12, kv_heads=12, ffn_hidden=12 * 64, vocab=100, tied_embeddings=True),
}


@pytest.mark.parametrize("model", SHAPES.values(), ids=SHAPES)
def test_what_is_refused_is_what_sglang_asserts(model: Architecture) -> None:
    refused = []
    for tp_size, ep_size, dp_size in product(range(1, 33), (1, 2, 3, 4) if model.is_moe else (1,), (1, 2, 3)):
        try:
            asserted(model, tp_size, ep_size, dp_size)
            wrong = False
        except AssertionError:
            wrong = True
        found = problems(model, tp_size=tp_size, ep_size=ep_size, dp_size=dp_size, enable_dp_attention=dp_size > 1)
        assert len(found) == wrong, (tp_size, ep_size, dp_size, found)
        refused.append(wrong)
    assert True in refused and False in refused


def test_the_sizes_that_are_offered_fit() -> None:
    (told,) = problems(SHAPES["mixture"], tp_size=6, ep_size=2)
    assert "8 key-value heads neither divide by 6 nor divide it" in told
    assert told.endswith("Set sglang.tp_size to 2, 4, 8 or 24.")  # 24 GPUs copy the heads three times
    for size in (2, 4, 8, 24):
        asserted(SHAPES["mixture"], size, 2, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"pp_size": 3},
        {"tp_size": 2, "dp_size": 3},  # without enable_dp_attention these are whole copies, on other GPUs
        {"tp_size": 4, "ep_size": 3, "moe_a2a_backend": "deepep"},  # which takes all GPUs, whatever ep_size says
    ],
)
def test_what_sglang_does_not_ask_is_not_asked(arguments: dict[str, Any]) -> None:
    assert problems(MOE, **arguments) == []


def test_servers_on_a_cpu_pad_what_does_not_divide() -> None:
    assert problems(DENSE, tp_size=3, kind="cpu") == [] != problems(DENSE, tp_size=3, kind="cuda")


def test_it_is_among_the_checks_and_says_one_thing() -> None:
    settings = Settings.model_validate({"policy": {"config": "m"}, "sglang": {"tp_size": 3}})
    assert check(settings, MOE, 1) == problems(MOE, tp_size=3) != []
