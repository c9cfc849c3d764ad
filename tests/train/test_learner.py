"""A training step on a sealed step is what its parts say: minibatches, old log-probs, advantages, updates."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.config.settings import Settings
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.reference import Reference
from megatron_rl.train import objective
from megatron_rl.train.experience import Experience
from megatron_rl.train.learner import Learner, LearnReport
from megatron_rl.types import Sequence
from tests.policy.single import opened, tiny_settings
from tests.train.steps import sealed_step


def settings_of(folder: Path, **sections: Any) -> Settings:
    batch = {"max_tokens": 64, **sections.pop("batch", {})}
    return tiny_settings(folder, "qwen3_moe", batch=batch, **sections)


def learner_of(policy: Policy) -> Learner:
    goal, advantage = objective.build(policy.settings.objective)
    reference = Reference(policy) if policy.settings.objective.reference != "none" else None
    return Learner(policy, goal, advantage, policy.settings, reference)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    policy.optimizer.gather_weights()
    return {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}


def learned(settings: Settings, rows: Any, steps: int = 1) -> tuple[list[LearnReport], dict[str, torch.Tensor]]:
    with opened(settings) as policy:
        learner = learner_of(policy)
        return [learner.learn(step, rows) for step in range(steps)], weights(policy)


def by_hand(rows: Any) -> list[tuple[np.ndarray, np.ndarray, float, int]]:
    """Tokens, mask, advantage and group of each sample, in the plainest way."""
    found = []
    for number, group in enumerate(rows.groups()):
        rewards = np.array([sample.reward for sample in group.samples])
        spread = rewards.std(ddof=1)
        for sample in group.samples:
            advantage = 0.0 if spread == 0 else (sample.reward - rewards.mean()) / (spread + 1e-6)
            found.append((sample.tokens, sample.loss_mask, advantage, number))
    return found


def test_a_step_is_the_updates_that_its_parts_describe(tmp_path: Path) -> None:
    """Two minibatches, two epochs; the same sequences given to the policy by hand lead to the same weights, bit for bit."""
    rows = sealed_step(tmp_path / "bank")
    settings = settings_of(tmp_path, batch={"minibatches": 2, "epochs": 2})
    (report,), ours = learned(settings, rows)
    assert len(report.updates) == 4 and all(update.applied for update in report.updates)
    samples = by_hand(rows)
    parts = Experience.read(rows).minibatches(2, (settings.run.seed, 0))
    with opened(settings) as policy:
        goal, _ = objective.build(settings.objective)
        packed = []
        for part in parts:
            sequences = [
                Sequence(
                    int(row), tokens, mask, scalars={"advantage": float(np.float32(advantage)), "reward": 0.0}, group=group
                )
                for row in part
                for tokens, mask, advantage, group in [samples[row]]
            ]
            packs = policy.pack(sequences)
            packed.append((packs, {"old": [values.log_probs for values in policy.log_probs(packs)]}))
        order = [0, 1, *np.random.default_rng([settings.run.seed, 0, 1]).permutation(2)]
        for number in order:
            policy.update(packed[number][0], goal, packed[number][1])
        theirs = weights(policy)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_minibatches_are_whole_groups_dealt_once(tmp_path: Path) -> None:
    experience = Experience.read(sealed_step(tmp_path / "bank", groups=7, size=3))
    parts = experience.minibatches(3, (0, 5))
    assert sorted(np.concatenate(parts).tolist()) == list(range(21))
    assert sorted(len(part) // 3 for part in parts) == [2, 2, 3]
    owners = [set(experience.groups[part].tolist()) for part in parts]
    assert not owners[0] & owners[1] and not owners[1] & owners[2] and not owners[0] & owners[2]
    again, other = experience.minibatches(3, (0, 5)), experience.minibatches(3, (0, 6))
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(parts, other, strict=True))
    with pytest.raises(ValueError, match="7 groups cannot be dealt to 8 minibatches"):
        experience.minibatches(8, (0, 5))


def test_on_policy_ratios_are_one_and_then_move(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, batch={"minibatches": 1, "epochs": 2})
    (report,), _ = learned(settings, sealed_step(tmp_path / "bank"))
    first, second = (update.metrics for update in report.updates)
    assert first["ratio_min"] == first["ratio_max"] == 1.0 and first["clip_fraction"] == 0
    assert second["ratio_max"] != 1.0


def test_rollout_log_probs_as_old(tmp_path: Path) -> None:
    """`old_log_probs: rollout` takes the engine's: the ratio of each sequence is then exp(mean(new − rollout))."""
    rows = sealed_step(tmp_path / "bank", groups=2)
    settings = settings_of(tmp_path, objective={"old_log_probs": "rollout"})
    with opened(settings) as policy:
        experience = Experience.read(rows)
        packs = policy.pack(experience.sequences(range(8)))
        new = policy.per_sequence(packs, [values.log_probs for values in policy.log_probs(packs)])
        (report,) = learner_of(policy).learn(0, rows).updates
    samples = [sample for group in rows.groups() for sample in group.samples]
    ratios = [np.exp((new[i] - s.log_probs)[s.loss_mask].astype(np.float64).mean()) for i, s in enumerate(samples)]
    assert report.metrics["ratio_max"] == pytest.approx(max(ratios), rel=1e-5)
    assert report.metrics["ratio_min"] == pytest.approx(min(ratios), rel=1e-5)


def test_reference_is_the_first_model_whatever_was_learned(tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path, objective={"reference": "initial", "penalties": [{"name": "kl_loss", "options": {"coefficient": 0.1}}]}
    )
    rows = sealed_step(tmp_path / "bank")
    with opened(settings) as policy:
        learner = learner_of(policy)
        assert learner.reference is not None
        packs = policy.pack(Experience.read(rows).sequences(range(20)))
        before = policy.log_probs(packs)
        first, second = learner.learn(0, rows), learner.learn(1, rows)
        moved = weights(policy)
        with learner.reference.in_place():
            again = policy.log_probs(packs)
        assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(before, again, strict=True))
        assert all(torch.equal(moved[name], values) for name, values in weights(policy).items())
    assert first.updates[0].metrics["reference_k3"] == pytest.approx(0, abs=1e-9)
    assert second.updates[0].metrics["reference_k3"] > 0


def test_penalties_in_the_reward_reach_the_advantages(tmp_path: Path) -> None:
    """kl_reward takes β Σ_t (old − reference) from each reward, which needs log-probs before there are advantages."""
    rows = sealed_step(tmp_path / "bank", groups=3)
    penalty = {"name": "kl_reward", "options": {"coefficient": 0.5, "estimator": "k1"}}
    settings = settings_of(
        tmp_path, objective={"reference": "initial", "advantage": "dr_grpo", "penalties": [penalty]}, batch={"minibatches": 3}
    )
    with opened(settings) as policy:
        learner = learner_of(policy)
        learner.learn(0, rows)  # away from the reference
        experience = Experience.read(rows)
        packs = policy.pack(experience.sequences(range(12)))
        old = policy.per_sequence(packs, [values.log_probs for values in policy.log_probs(packs)])
        assert learner.reference is not None
        with learner.reference.in_place():
            first = policy.per_sequence(packs, [values.log_probs for values in policy.log_probs(packs)])
        parts = [learner._scored(experience, part, watch=False) for part in experience.minibatches(3, (0, 1))]
        adjusted = learner._adjusted_rewards(experience, parts)
    samples = [sample for group in rows.groups() for sample in group.samples]
    expected = [s.reward - 0.5 * float((old[i] - first[i])[s.loss_mask].sum()) for i, s in enumerate(samples)]
    np.testing.assert_allclose(adjusted, expected, atol=1e-5)
    assert np.abs(adjusted - experience.rewards).max() > 1e-4


def test_advantages_by_turn_reach_the_tokens_of_their_turn(tmp_path: Path) -> None:
    rows = sealed_step(tmp_path / "bank", groups=3, turns=3)
    settings = settings_of(tmp_path, objective={"advantage": "per_turn", "surrogate": "gspo_token"})
    with opened(settings) as policy:
        learner = learner_of(policy)
        experience = Experience.read(rows)
        from megatron_rl.train.experience import advantages_of

        assert learner.advantage is not None
        advantages = advantages_of(learner.advantage, experience, experience.rewards)
        informed = [advantages.inform(sequence) for sequence in experience.sequences(range(12))]
        report = learner.learn(0, rows)
    assert report.updates[0].applied
    for number, group in enumerate(rows.groups()):
        table = np.array([sample.turn_rewards for sample in group.samples])  # [samples, turns]
        expected = (table - table.mean(0)) / (table.std(0, ddof=1) + 1e-6)
        for place, sample in enumerate(group.samples):
            column = informed[4 * number + place].columns["token_advantage"]
            for segment in sample.segments:
                wanted = expected[place, segment.turn] if segment.author == "policy" else 0.0
                np.testing.assert_allclose(column[segment.start : segment.stop], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("surrogate", ["rebel", "gtpo"])
def test_objectives_that_look_at_groups_learn_from_whole_groups(surrogate: str, tmp_path: Path) -> None:
    own: dict[str, dict[str, Any]] = {"rebel": {"advantage": None}, "gtpo": {"advantage": "dr_grpo", "on_policy": True}}
    settings = settings_of(tmp_path, objective={"surrogate": surrogate, **own[surrogate]})
    (report, _), _ = learned(settings, sealed_step(tmp_path / "bank"), steps=2)
    assert all(update.applied for update in report.updates)


def test_metrics_count_samples(tmp_path: Path) -> None:
    rows = sealed_step(tmp_path / "bank")
    samples = [sample for group in rows.groups() for sample in group.samples]
    found = Experience.read(rows).metrics(step=3)
    assert found["reward/mean"] == pytest.approx(np.mean([s.reward for s in samples]))
    assert found["reward/shape"] == pytest.approx(np.mean([s.rewards["shape"] for s in samples]))
    assert found["response/tokens"] == pytest.approx(np.mean([s.loss_mask.sum() for s in samples]))
    assert found["sample/failed"] == found["response/cut_off"] == 0


def test_a_look_shows_what_the_updates_did(tmp_path: Path) -> None:
    """Log-ratios of the first minibatch after the last update, which sequences the clip stopped, where experts' tokens go."""
    rows = sealed_step(tmp_path / "bank", groups=6)
    low, high = 0.1, 0.1
    options = {"clip_low": low, "clip_high": high}
    settings = settings_of(
        tmp_path, objective={"options": options}, batch={"minibatches": 2, "epochs": 2}, optimizer={"lr": 3e-5}
    )
    with opened(settings) as policy:
        learner = learner_of(policy)
        sequences = Experience.read(rows).sequences(range(rows.rows))

        def scored() -> dict[int, np.ndarray]:
            packs = policy.pack(sequences)
            return policy.per_sequence(packs, [values.log_probs for values in policy.log_probs(packs)])

        before = scored()
        report = learner.learn(0, rows, traces=2)
        after = scored()
    seen = report.look
    assert seen is not None and len({trace.group for trace in seen.traces}) == 2 and len(seen.traces) == 8
    clipped = []
    for trace in seen.traces:
        mask = sequences[trace.row].loss_mask
        expected = np.where(mask, after[trace.row] - before[trace.row], 0.0)
        np.testing.assert_allclose(trace.log_ratio, expected, atol=2e-6)
        ratio = np.exp(expected.sum() / mask.sum())
        assert trace.ratio == pytest.approx(ratio, rel=1e-5)
        stopped = (trace.advantage > 0 and ratio > 1 + high) or (trace.advantage < 0 and ratio < 1 - low)
        assert trace.clipped == stopped
        clipped.append(stopped)

    assert any(clipped) and not all(clipped)
    architecture = policy.architecture
    assert architecture.experts is not None and seen.expert_tokens is not None
    assert seen.expert_tokens.shape == (sum(architecture.moe_layers), architecture.experts.count)
    totals = seen.expert_tokens.sum(1)
    first = set(Experience.read(rows).minibatches(2, (0, 0))[0].tolist())
    tokens = sum(sequence.length for sequence in sequences if sequence.index in first)
    assert (totals == tokens * architecture.experts.top_k).all()
    assert 0 < seen.metrics["moe/routing_changed"] < 0.5
    assert seen.metrics["moe/max_over_mean"] >= 1


def test_a_look_at_weights_that_stay_sees_no_change(tmp_path: Path) -> None:
    rows = sealed_step(tmp_path / "bank")
    with opened(settings_of(tmp_path, optimizer={"lr": 0.0})) as policy:
        report = learner_of(policy).learn(0, rows, traces=1)
    assert report.look is not None and report.look.metrics["moe/routing_changed"] == 0
    assert all(trace.ratio == 1 and not trace.clipped and not trace.log_ratio.any() for trace in report.look.traces)
