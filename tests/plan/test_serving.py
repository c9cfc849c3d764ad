"""Servers: what their GPUs hold, and how long responses take."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.counting import model_parameters
from megatron_rl.plan.job import Job, Workload
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.publishing import publish_seconds
from megatron_rl.plan.serving import (
    FP8_WEIGHT,
    decode_seconds,
    free_for_servers,
    rollout_time,
    server_memory,
    server_of,
    server_parameters,
)
from tests.config.models import DENSE, LATENT, MODELS, MOE
from tests.plan.jobs import WORK, job


def memory_of(model: Architecture, **arguments: Any) -> Any:
    planned = job(model, sglang=arguments)
    return server_memory(planned, server_of(planned.settings), free_for_servers(planned, 0))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_server_on_one_gpu_holds_the_model(model: Architecture) -> None:
    padded = replace(model, vocab=-(-model.vocab // 128) * 128)
    assert memory_of(model).weights == 2 * model_parameters(padded).total


@pytest.mark.parametrize("size", ["tp_size", "pp_size", "tp-size"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_two_gpus_hold_half_each(model: Architecture, size: str) -> None:
    """But for norms, routers and bottlenecks, which tensor ranks hold whole, and the end that a stage has."""
    assert 0.4 < memory_of(model, **{size: 2}).weights / memory_of(model).weights < 0.62


def test_key_value_heads_are_copied_where_ranks_outnumber_them() -> None:
    layers, heads, width = DENSE.layers, DENSE.kv_heads, DENSE.head_dim
    for tensor in (1, 2, 4, 8):
        held = memory_of(DENSE, tp_size=tensor)
        assert held.token == 2 * max(heads // tensor, 1) * width * layers * 2
    server = server_of(job(DENSE, sglang={"tp_size": 8}).settings)
    attention = (DENSE.heads // 8 * 2 + 2) * width * DENSE.hidden * layers  # queries, output; one key and one value head
    assert server_parameters(DENSE, server).attention == attention


def test_a_latent_is_whole_on_every_rank_unless_attention_is_copied() -> None:
    assert LATENT.latent_attention is not None
    token = (LATENT.latent_attention.kv_lora_rank + LATENT.latent_attention.qk_rope_head_dim) * LATENT.layers * 2
    assert memory_of(LATENT).token == memory_of(LATENT, tp_size=8).token == token
    shared = memory_of(LATENT, tp_size=8, dp_size=8, enable_dp_attention=True)
    assert shared.token == token
    assert shared.capacity > 6 * memory_of(LATENT, tp_size=8).capacity  # each copy keeps its own requests' tokens
    assert shared.weights > memory_of(LATENT, tp_size=8).weights


def test_fp8_weights_and_cache() -> None:
    plain, small = memory_of(MOE), memory_of(MOE, quantization="fp8", kv_cache_dtype="fp8_e4m3")
    assert small.token == plain.token / 2
    whole = model_parameters(MOE)
    quantised = whole.attention + whole.experts
    assert plain.weights - small.weights == pytest.approx(quantised * (2 - FP8_WEIGHT), abs=1)


def test_a_checkpoint_may_say_that_it_is_fp8(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    assert server_of(job(MOE, servers={"model": str(tmp_path)}).settings).weight_bytes == FP8_WEIGHT
    assert server_of(job(MOE, servers={"model": "somewhere/on-the-hub"}).settings).weight_bytes == 2


def test_memory_is_dealt_as_the_server_is_told() -> None:
    held = memory_of(MOE, mem_fraction_static=0.5)
    planned = job(MOE)
    assert held.static == round(0.5 * free_for_servers(planned, 0))
    assert held.capacity == int(held.cache / held.token)
    assert memory_of(MOE, max_total_tokens=1000).capacity == 1000


def timed(planned: Job, servers: int = 1) -> Any:
    server = server_of(planned.settings)
    return rollout_time(planned, server, server_memory(planned, server, free_for_servers(planned, 0)), servers)


def test_more_servers_are_faster_and_a_longest_response_bounds_them() -> None:
    seconds = [timed(job(MOE), servers).seconds for servers in (1, 2, 8, 64, 512)]
    assert seconds == sorted(seconds, reverse=True)
    planned = job(MOE)
    alone = decode_seconds(planned, server_of(planned.settings), 1, WORK.prompt)
    assert seconds[-1] >= WORK.longest * alone


def test_responses_of_one_length_have_no_tail() -> None:
    planned = job(MOE, work=Workload(8, 4, prompt=100, response=500, longest=500))
    found = timed(planned)
    assert found.tail == 0 and found.concurrent == 32
    server = server_of(planned.settings)
    ends = [500 * decode_seconds(planned, server, 32, length) for length in (100, 600)]
    assert ends[0] < found.decode < ends[1]
    assert timed(job(MOE)).tail > 0


def test_requests_beyond_the_cache_wait() -> None:
    waiting = timed(job(MOE, sglang={"max_total_tokens": 15_000}))
    assert waiting.concurrent == 10 and waiting.requests == 512
    assert waiting.seconds > 2 * timed(job(MOE)).seconds
    limited = timed(job(MOE, sglang={"max_running_requests": 10}))
    assert limited.concurrent == 10


def test_few_requests_meet_few_experts() -> None:
    """One request reads 2 of 16 experts, two at most 4 and on average 2 + 2 x 14/16, many all of them."""
    planned = job(MOE)
    server = server_of(planned.settings)
    machine = planned.machine
    whole = 2 * server_parameters(MOE, server).experts / (machine.memory_gb_s * 1e9 * machine.shares.decode)
    one, two, many = (decode_seconds(planned, server, requests, 0) for requests in (1, 2, 200))
    assert two - one == pytest.approx(whole * 2 / 16 * 14 / 16, rel=1e-3)
    assert many - one == pytest.approx(whole * 14 / 16, rel=1e-3)


# -- where servers are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "servers"),
    [
        ({}, 1),
        ({"servers": {"count": 3}}, 3),
        ({"servers": {"urls": ["http://a:1", "http://b:1"]}}, 2),
        ({"cluster": {"server_nodes": 4}, "sglang": {"tp_size": 4}}, 8),
        ({"cluster": {"server_nodes": 1}, "sglang": {"tp_size": 16}}, 0),
        ({"servers": {"placement": "colocated"}, "sglang": {"tp_size": 2}}, 4),
    ],
)
def test_how_many_servers_there_are(sections: dict[str, Any], servers: int) -> None:
    assert Plan(job(MOE, 8, **sections)).servers == servers


def test_colocated_servers_take_of_what_the_policy_leaves() -> None:
    apart, together = (Plan(job(MOE, servers={"placement": placement})) for placement in ("separate", "colocated"))
    assert together.server_memory.static < apart.server_memory.static / 1.5
    assert together.limit < apart.limit
    assert together.transport == "tensor" and apart.transport == "broadcast"


@pytest.mark.parametrize("transport", ["disk", "broadcast", "tensor"])
def test_publishing_takes_longer_for_more_bytes(transport: str) -> None:
    def seconds(model: Architecture, servers: int) -> float:
        planned = job(model, publish={"transport": transport})
        return publish_seconds(planned, server_of(planned.settings), servers)

    assert seconds(DENSE, 1) < seconds(MOE, 1) <= seconds(MOE, 64)
    fixed = job(MOE).machine.costs.publish_s
    assert seconds(DENSE, 1) > fixed
