"""What an update must survive: packing, padding, empty packs, non-finite numbers, and nothing to learn from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_rl.config.layout_map import Alignment
from megatron_rl.data.packing import build_pack
from megatron_rl.objectives.base import ObjectiveResult, TokenBatch
from megatron_rl.objectives.gspo import SequencePolicyLoss
from megatron_rl.objectives.sft import SupervisedLoss
from megatron_rl.policy.policy import Policy
from megatron_rl.types import Pack, Sequence
from tests.parallel.jobs import Arrays, gradients, main_grad, toy_sequences
from tests.policy.single import opened, tiny_settings

WIDE = SequencePolicyLoss(clip_low=0.2, clip_high=0.2)
SEQUENCES = toy_sequences(3, 6, 120, 30)


def weights(policy: Policy) -> Arrays:
    return {name: parameter.detach().float().numpy().copy() for name, parameter in policy.model.named_parameters()}


def gradient_of(policy: Policy, packs: list[Pack]) -> tuple[float, Arrays]:
    """Loss and gradient of one step, which is then taken with a learning rate of zero."""
    scored = policy.log_probs(packs)
    report = policy.update(packs, WIDE, {"old": [values.log_probs for values in scored]})
    return report.loss, gradients(policy)


def assert_same(ours: tuple[float, Arrays], theirs: tuple[float, Arrays]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-7)
    for name, expected in theirs[1].items():
        np.testing.assert_allclose(ours[1][name], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_packing_and_padding_do_not_matter(tmp_path: Path) -> None:
    """One pack or many, in any order, with any padding and with empty packs between: the same loss and gradient."""
    with opened(tiny_settings(tmp_path, optimizer={"lr": 0.0, "clip_grad": 0.0})) as policy:
        expected = gradient_of(policy, [build_pack([sequence], Alignment(1, 1)) for sequence in SEQUENCES])
        together = build_pack(list(reversed(SEQUENCES)), Alignment(1, 1))
        padded = build_pack(SEQUENCES[2:], Alignment(8, 32))
        empty = build_pack([], Alignment(8, 8))
        assert empty.tokens == 8 and not empty.sequences
        tail = Pack(tuple(SEQUENCES[:2]), (*(s.length for s in SEQUENCES[:2]), 5))
        for packs in ([together], [empty, padded, empty, tail], policy.pack(SEQUENCES)):
            assert_same(gradient_of(policy, packs), expected)


def test_unused_values_are_never_looked_at(tmp_path: Path) -> None:
    """NaN and infinity outside the loss mask, in columns and in the tokens that padding replaces, change nothing."""

    def poisoned(sequence: Sequence, values: NDArray[np.float32]) -> Sequence:
        return replace(sequence, columns={"old": values})

    with opened(tiny_settings(tmp_path, optimizer={"lr": 0.0, "clip_grad": 0.0})) as policy:
        packs = policy.pack(SEQUENCES)
        old = policy.per_sequence(packs, [values.log_probs for values in policy.log_probs(packs)])
        clean = [poisoned(s, old[s.index]) for s in SEQUENCES]
        bad = [poisoned(s, np.where(s.loss_mask, old[s.index], np.float32("nan"))) for s in SEQUENCES]
        worse = [poisoned(s, np.where(s.loss_mask, old[s.index], -np.float32("inf"))) for s in SEQUENCES]
        results = [(policy.update(policy.pack(batch), WIDE), gradients(policy)) for batch in (clean, bad, worse)]
        for report, grads in results[1:]:
            assert report.loss == results[0][0].loss
            for name, expected in results[0][1].items():
                np.testing.assert_array_equal(grads[name], expected, err_msg=name)


class Spoiled:
    """GSPO, whose loss or gradient is not finite."""

    needs_entropy = False

    def __init__(self, spoil: Callable[[Tensor], Tensor]) -> None:
        self.spoil = spoil

    def __call__(self, batch: TokenBatch) -> ObjectiveResult:
        result = SupervisedLoss()(batch)
        return ObjectiveResult(self.spoil(result.loss), result.metrics)


SPOILED = {
    "NaN loss": lambda loss: loss * torch.nan,
    "infinite loss": lambda loss: loss + torch.inf,
    "infinite gradient of a finite loss": lambda loss: torch.sqrt(loss - loss.detach()),
}


@pytest.mark.parametrize("how", SPOILED)
def test_non_finite_step_is_skipped(how: str, tmp_path: Path) -> None:
    """Weights, moments, step count and expert biases stay; the next step is as if nothing had been."""
    moe = {"expert_bias_update_rate": 0.1}
    with opened(tiny_settings(tmp_path, "deepseek_v3", moe=moe)) as policy:
        packs = policy.pack(SEQUENCES)
        policy.update(packs, SupervisedLoss())
        before, biases = weights(policy), [bias.clone() for bias in policy.routers.snapshot()]
        assert biases and any(bias.abs().sum() > 0 for bias in biases)
        moments = {s.name: {k: t.clone() for k, t in s.tensors.items()} for s in policy.optimizer.states()}
        report = policy.update(packs, Spoiled(SPOILED[how]))
        assert (report.applied, report.step, report.skipped) == (False, 1, 1)
        for name, expected in before.items():
            np.testing.assert_array_equal(weights(policy)[name], expected)
        assert all(torch.equal(now, then) for now, then in zip(policy.routers.snapshot(), biases, strict=True))
        for state in policy.optimizer.states():
            assert all(torch.equal(tensor, moments[state.name][kind]) for kind, tensor in state.tensors.items())
        following = policy.update(packs, SupervisedLoss())
        assert following.applied and following.step == 2
        after_skip = weights(policy)
    with opened(tiny_settings(tmp_path, "deepseek_v3", moe=moe)) as policy:
        for _ in range(2):
            policy.update(policy.pack(SEQUENCES), SupervisedLoss())
        for name, expected in weights(policy).items():
            np.testing.assert_array_equal(after_skip[name], expected, err_msg=name)


def test_nothing_to_learn_is_finite(tmp_path: Path) -> None:
    """Fully masked sequences count for nothing, also in divisors; a step of nothing else has no gradient."""
    masked = [replace(s, index=100 + s.index, loss_mask=np.zeros_like(s.loss_mask)) for s in SEQUENCES]
    single = Sequence(200, np.array([5]), np.array([False]), {"rollout": np.zeros(1, np.float32)}, {"advantage": 1.0})
    with opened(tiny_settings(tmp_path, optimizer={"lr": 0.0, "clip_grad": 0.0})) as policy:
        with_nothing = gradient_of(policy, policy.pack([*SEQUENCES, *masked, single]))
        assert_same(with_nothing, gradient_of(policy, policy.pack(SEQUENCES)))
        report = policy.update(policy.pack([*masked, single]), SupervisedLoss())
        assert (report.loss, report.grad_norm, report.applied) == (0.0, 0.0, True)


def test_clipping_and_rates(tmp_path: Path) -> None:
    """A clipped first Adam step moves no weight by more than the learning rate of its schedule; norms are of before."""
    settings = tiny_settings(tmp_path, optimizer={"lr": 1e-2, "clip_grad": 1e-3, "warmup_steps": 4, "weight_decay": 0.0})
    with opened(settings) as policy:
        packs = policy.pack(SEQUENCES)
        before = weights(policy)
        report = policy.update(packs, SupervisedLoss())
        assert report.grad_norm > 1.0  # clipping does not show in it
        steps = [np.abs(weights(policy)[name] - value).max() for name, value in before.items()]
        assert max(steps) == pytest.approx(1e-2 / 4, rel=1e-2)
        grads = [main_grad(parameter).double() for _, parameter in policy.model.named_parameters()]
        clipped = float(sum(grad.square().sum() for grad in grads)) ** 0.5
        assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_unequal_pack_counts_are_refused(tmp_path: Path) -> None:
    with opened(tiny_settings(tmp_path)) as policy, pytest.raises(ValueError, match=r"Policy\.pack"):
        policy.log_probs([])


def test_auxiliary_loss_is_a_mean_over_real_tokens(tmp_path: Path) -> None:
    """Megatron sums its balancing loss over tokens; here it is divided by the step's real tokens, whatever is padding.

    Scoring before and after an update, and another policy in the same process, find the scale as they expect it.
    """

    def norm(coefficient: float, alignment: Alignment) -> float:
        settings = tiny_settings(tmp_path, moe={"aux_loss_coefficient": coefficient}, optimizer={"lr": 0.0, "clip_grad": 0.0})
        with opened(settings) as policy:
            packs = [build_pack(SEQUENCES[:2], alignment)]
            flat = [replace(s, scalars={"advantage": 0.0}) for s in packs[0].sequences]
            report = policy.update([replace(packs[0], sequences=tuple(flat))], Spoiled(lambda loss: loss * 0.0))
            policy.log_probs(packs)
            return report.grad_norm

    assert norm(0.0, Alignment(1, 1)) == 0.0
    once = norm(1.0, Alignment(1, 1))
    assert once > 0.0
    assert norm(2.0, Alignment(1, 1)) == pytest.approx(2 * once, rel=1e-4)
    assert norm(1.0, Alignment(16, 128)) == pytest.approx(once, rel=1e-4)
