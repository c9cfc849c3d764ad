"""Routing replay on one rank: own routes change nothing, given ones are what routers do, and routers learn all the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay
from numpy.typing import NDArray

from megatron_rl.config.errors import UserError
from megatron_rl.objectives.gspo import SequencePolicyLoss
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.routing_replay import Routes
from megatron_rl.types import Sequence
from tests.parallel.jobs import main_grad, toy_sequences
from tests.policy.single import opened, tiny_settings
from tests.reference.tiny import write_tiny_config
from tests.train.steps import made_up_routing

# Softmax over the chosen; groups ranked by their best (our own router); sigmoid with bias, groups, a dense first layer.
FAMILIES = ("qwen3_moe", "deepseek_v2", "deepseek_v3")
LOSS = SequencePolicyLoss(clip_low=0.2, clip_high=0.2)
RECOMPUTE: dict[str, dict[str, Any]] = {
    "whole layers": {"mode": "full"},
    "some layers": {"mode": "full", "method": "block", "layers": 2},
    "experts": {"mode": "selective", "modules": ["moe"]},
}


def shake(policy: Policy, size: float = 0.3) -> None:
    """Router weights move so far that many tokens would go elsewhere. The same whatever the layout."""
    with torch.no_grad():
        for router in policy.routers.routers():
            weight: Any = router.weight
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(int(router.layer_number)))
            weight += size * weight.std() * noise
    policy.optimizer.start_from_weights()


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: main_grad(parameter).clone() for name, parameter in policy.model.named_parameters()}


def same(ours: list[Routes], theirs: list[Routes]) -> bool:
    return all(
        one.experts.keys() == other.experts.keys()
        and all(torch.equal(one.experts[layer], other.experts[layer]) for layer in one.experts)
        for one, other in zip(ours, theirs, strict=True)
    )


def with_routing(policy: Policy, sequences: list[Sequence], seed: int = 0) -> list[Sequence]:
    """As of a server whose routers throw dice: other experts than the policy's nearly everywhere."""
    experts, generator = policy.architecture.experts, np.random.default_rng(seed)
    assert experts is not None
    shape = (policy.architecture.layers, experts.count, experts.top_k)
    return [replace(s, routing=made_up_routing(generator, s.length, *shape)) for s in sequences]


@pytest.mark.parametrize("family", FAMILIES)
def test_own_routes_change_nothing_and_shaken_routers_repeat_them(family: str, tmp_path: Path) -> None:
    with opened(tiny_settings(tmp_path, family)) as policy:
        packs = policy.pack(toy_sequences(0, 7, 120, 40))
        assert len(packs) > 1
        with policy.replaying(record=True) as first:
            old = policy.log_probs(packs)
        plain = policy.log_probs(packs)
        with policy.replaying(first.routes, record=True) as second:
            again = policy.log_probs(packs)
        for values, without, replayed in zip(old, plain, again, strict=True):
            assert torch.equal(values.log_probs, without.log_probs) and torch.equal(values.log_probs, replayed.log_probs)
        assert same(first.routes, second.routes)
        assert second.differences(policy.layout).tokens_differing == 0

        shake(policy)
        loose = policy.log_probs(packs)
        with policy.replaying(first.routes, record=True) as third:
            held = policy.log_probs(packs)
        assert same(first.routes, third.routes)
        differences = third.differences(policy.layout)
        tokens = sum(sequence.length for pack in packs for sequence in pack.sequences)
        experts = policy.architecture.experts
        assert experts is not None
        assert differences.tokens == tokens * sum(policy.architecture.moe_layers)
        assert differences.choices == differences.tokens * experts.top_k
        assert 0.02 < differences.tokens_differing / differences.tokens < 0.9
        assert differences.tokens_differing <= differences.choices_differing < differences.tokens_differing * experts.top_k
        assert not any(torch.equal(a.log_probs, b.log_probs) for a, b in zip(loose, held, strict=True))

        with policy.replaying(first.routes) as fourth:
            report = policy.update(packs, LOSS, {"old": [values.log_probs for values in held]})
        assert report.metrics["ratio_deviation"] == 0 and report.applied
        assert fourth.differences(policy.layout) == differences
        for router in policy.routers.routers():
            assert main_grad(router.weight).abs().max() > 0
    assert RouterReplay.global_router_replay_instances == []


def test_differences_are_those_of_a_loop(tmp_path: Path) -> None:
    """Each router's input is caught, and its choice made again token by token."""
    with opened(tiny_settings(tmp_path)) as policy:
        packs = policy.pack(toy_sequences(1, 5, 120, 30))
        with policy.replaying(record=True) as first:
            policy.log_probs(packs)
        shake(policy)
        inputs: dict[int, list[torch.Tensor]] = {}
        routers = policy.routers.routers()
        for number, router in enumerate(routers):
            router.register_forward_pre_hook(lambda _, given, n=number: inputs.setdefault(n, []).append(given[0].squeeze(1)))
        with policy.replaying(first.routes) as replay:
            policy.log_probs(packs)
        tokens = differing = choices = 0
        for number, router in enumerate(routers):
            for pack, seen, routes in zip(packs, inputs[number], first.routes, strict=True):
                start = 0
                for sequence, padded in zip(pack.sequences, pack.padded_lengths, strict=True):
                    for position in range(start, start + sequence.length):
                        chosen = set((router.weight @ seen[position]).topk(2).indices.tolist())
                        gone = chosen - set(routes.experts[number][position].tolist())
                        tokens, differing, choices = tokens + 1, differing + bool(gone), choices + len(gone)
                    start += padded
        found = replay.differences(policy.layout)
        assert (found.tokens, found.tokens_differing, found.choices_differing) == (tokens, differing, choices)
        assert found.shares("") == {"differs": differing / tokens, "choices_differ": choices / tokens / 2}


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recomputed_layers_choose_as_they_did(name: str, tmp_path: Path) -> None:
    """Of several packs of unequal length, by routes that routers would not choose; in part unknown ones."""

    def run(folder: Path, **sections: Any) -> tuple[float, dict[str, torch.Tensor]]:
        with opened(tiny_settings(folder, "deepseek_v3", **sections)) as policy:
            sequences = with_routing(policy, toy_sequences(2, 9, 120, 40))
            sequences[3] = toy_sequences(2, 9, 120, 40)[3]
            packs = policy.pack(sequences[:4]) + policy.pack(sequences[4:])
            assert len({pack.tokens for pack in packs}) > 2
            with policy.replaying(policy.rollout_routes(packs)):
                old = {"old": [values.log_probs for values in policy.log_probs(packs)]}
                loss = policy.update(packs, LOSS, old)
            assert loss.metrics["ratio_deviation"] == 0
            return loss.grad_norm, gradients(policy)

    norm, expected = run(tmp_path / "kept")
    again, found = run(tmp_path / "recomputed", recompute=RECOMPUTE[name])
    assert again == pytest.approx(norm, rel=1e-6) and norm > 0
    for parameter, values in expected.items():
        torch.testing.assert_close(found[parameter], values, rtol=1e-5, atol=1e-6 * norm, msg=parameter)


def test_the_servers_routing_is_what_routers_do(tmp_path: Path) -> None:
    """Everywhere but on last tokens, on padding and in sequences without any: there they choose by themselves."""
    with opened(tiny_settings(tmp_path, "deepseek_v3", batch={"max_tokens": 96})) as policy:
        plain = toy_sequences(3, 6, 120, 40)
        sequences = [*with_routing(policy, plain[:4]), *plain[4:]]
        packs = policy.pack(sequences)
        routes = policy.rollout_routes(packs)
        with policy.replaying(routes, record=True) as replay:
            policy.log_probs(packs)
        known = sum(s.length - 1 for s in sequences[:4])
        assert replay.differences(policy.layout).tokens == known * 3  # of four layers one is dense
        done = by_sequence(policy, packs, replay.routes)
        for sequence in sequences:
            if sequence.routing is not None:
                np.testing.assert_array_equal(done[sequence.index][:-1], sequence.routing[:, 1:])
        assert all(len(set(row)) == 4 for array in done.values() for token in array for row in token)
        assert sum(route.bytes for route in replay.routes) == sum(pack.tokens for pack in packs) * 3 * 4


def by_sequence(policy: Policy, packs: list[Any], routes: list[Routes]) -> dict[int, NDArray[Any]]:
    """[length, moe layers, top-k] of each sequence."""
    found = {}
    for pack, route in zip(packs, routes, strict=True):
        whole, start = torch.stack([route.experts[layer] for layer in sorted(route.experts)], 1).numpy(), 0
        for sequence, padded in zip(pack.sequences, pack.padded_lengths, strict=False):
            found[sequence.index] = whole[start : start + sequence.length]
            start += padded
    return found


def test_last_tokens_matter_to_nothing(tmp_path: Path) -> None:
    """Whatever is chosen on a sequence's last token, no log-prob and no gradient of another token changes."""
    with opened(tiny_settings(tmp_path)) as policy:
        packs = policy.pack(toy_sequences(4, 6, 120, 40))
        with policy.replaying(record=True) as first:
            old = policy.log_probs(packs, everywhere=True)
        for pack, routes in zip(packs, first.routes, strict=True):
            start = 0
            for sequence, padded in zip(pack.sequences, pack.padded_lengths, strict=False):
                for experts in routes.experts.values():
                    experts[start + sequence.length - 1] = torch.tensor([5, 2], dtype=torch.uint8)
                start += padded
        with policy.replaying(first.routes):
            again = policy.log_probs(packs, everywhere=True)
        for values, replayed in zip(old, again, strict=True):
            torch.testing.assert_close(values.log_probs, replayed.log_probs, rtol=0, atol=1e-6)


def test_experts_beyond_a_byte(tmp_path: Path) -> None:
    (tmp_path / "wide").mkdir()
    config = write_tiny_config("qwen3_moe", tmp_path / "wide", num_experts=300)
    settings = tiny_settings(tmp_path, policy={"config": config})
    with opened(settings) as policy:
        packs = policy.pack(toy_sequences(0, 3, 120, 40))
        with policy.replaying(record=True) as first:
            old = policy.log_probs(packs)
        assert all(tensor.dtype == torch.uint16 for route in first.routes for tensor in route.experts.values())
        assert max(int(tensor.int().max()) for route in first.routes for tensor in route.experts.values()) > 255
        with policy.replaying(first.routes) as second:
            again = policy.log_probs(packs)
        assert second.differences(policy.layout).tokens_differing == 0
        assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(old, again, strict=True))


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    with opened(tiny_settings(tmp_path)) as policy:
        plain = toy_sequences(0, 7, 120, 40)
        packs = policy.pack(plain[:2]) + policy.pack(plain[2:])
        with policy.replaying(record=True) as first:
            policy.log_probs(packs)
        with policy.replaying(first.routes[1:]), pytest.raises(ValueError, match="and the pass is over"):
            policy.log_probs(packs)
        with policy.replaying(first.routes[::-1]), pytest.raises(ValueError, match="it was of other packs"):
            policy.log_probs(packs)
        routed = with_routing(policy, plain)
        assert routed[0].routing is not None
        routed[0].routing[0, 2] = 3
        with pytest.raises(UserError, match="names an expert twice for a token, in layer 2"):
            policy.rollout_routes(policy.pack(routed))
        for other in (np.zeros((plain[0].length - 1, 3, 2), np.uint8), np.full((plain[0].length - 1, 4, 2), 8, np.uint8)):
            with pytest.raises(UserError, match="the policy has 4 layers, 2 of 8 experts"):
                policy.rollout_routes(policy.pack([replace(plain[0], routing=other)]))
    with pytest.raises(ValueError, match="all but the last"):
        replace(plain[0], routing=np.zeros((plain[0].length, 4, 2), np.uint8))
