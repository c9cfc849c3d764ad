"""Group-limited choice of experts against a loop over tokens, and its way through Megatron's routing replay."""

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from megatron_rl.config.architecture import Experts
from megatron_rl.policy.group_choice import GROUP_BEST, GroupRankedRouter, _GroupChoice, router_for
from megatron_rl.policy.modules import Router


def experts(top_k: int, top_k_groups: int | None, group_score: Literal["max", "top2_sum"]) -> Experts:
    return Experts(160, top_k, 8, "softmax", False, True, groups=8, top_k_groups=top_k_groups, group_score=group_score)


def route(logits: Tensor, choice: _GroupChoice, top_k: int, groups: int, top_k_groups: int) -> tuple[Tensor, Tensor]:
    """Megatron's routing with this choice: weights and map, both [tokens, experts]."""
    routed: tuple[Tensor, Tensor] = topk_routing_with_score_function(
        logits, top_k, use_pre_softmax=True, num_groups=groups, group_topk=top_k_groups, router_replay=choice
    )
    return routed


@pytest.fixture
def replay() -> Iterator[RouterReplay]:
    RouterReplay.clear_global_router_replay_instances()
    yield RouterReplay()
    RouterReplay.clear_global_router_replay_instances()


@pytest.mark.parametrize("best", [1, 2])
def test_choice_equals_a_loop(best: int) -> None:
    groups, size, top_k, top_k_groups = 4, 5, 6, 2
    logits = torch.randn(50, groups * size, generator=torch.Generator().manual_seed(best))
    weights, chosen = route(logits, _GroupChoice(best, None), top_k, groups, top_k_groups)
    for token, scores in enumerate(logits.softmax(-1).tolist()):
        members = [range(group * size, (group + 1) * size) for group in range(groups)]
        by_rank = sorted(members, key=lambda group: -sum(sorted((scores[e] for e in group), reverse=True)[:best]))
        allowed = [expert for group in by_rank[:top_k_groups] for expert in group]
        expected = sorted(sorted(allowed, key=lambda expert: -scores[expert])[:top_k])
        assert chosen[token].nonzero().flatten().tolist() == expected
        assert weights[token, expected].tolist() == pytest.approx([scores[expert] for expert in expected])


def test_own_router_only_where_megatron_ranks_otherwise() -> None:
    assert router_for(experts(8, 4, "top2_sum")) is Router  # DeepSeek-V3: 8 // 4 = 2
    assert router_for(experts(6, None, "max")) is Router  # DeepSeek-V2-Lite: no groups
    own = router_for(experts(6, 3, "max"))  # DeepSeek-V2: 6 // 3 = 2, and it wants the best alone
    assert own.func is GroupRankedRouter and own.keywords == {"best": GROUP_BEST["max"]}


def test_recorded_choice_is_replayed(replay: RouterReplay) -> None:
    choice = _GroupChoice(1, replay)
    generator = torch.Generator().manual_seed(0)
    first, other = torch.randn(9, 16, generator=generator), torch.randn(9, 16, generator=generator)
    replay.set_router_replay_action(RouterReplayAction.RECORD)
    _, recorded = route(first, choice, 4, 4, 2)
    _, unlike = route(other, choice, 4, 4, 2)
    assert not torch.equal(recorded, unlike)
    _, recorded = route(first, choice, 4, 4, 2)
    replay.set_target_indices(replay.get_recorded_indices())
    replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    weights, replayed = route(other, choice, 4, 4, 2)
    assert torch.equal(replayed, recorded)
    torch.testing.assert_close(weights, torch.where(recorded, other.softmax(-1), 0.0))
