"""Routing replay in a step of learning: what each setting repeats, what it measures, what it refuses."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.config.errors import SettingsError, UserError
from megatron_rl.config.settings import ObjectiveSettings, Settings
from megatron_rl.observe.journal import Journal
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.reference import Reference
from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.rollout.bank.sealed import SealedStep
from megatron_rl.train import objective
from megatron_rl.train.experience import Experience
from megatron_rl.train.learner import Learner, LearnReport
from megatron_rl.train.run import train
from megatron_rl.train.steps import require_routing
from megatron_rl.types import Pack, Sample
from tests.policy.single import opened, tiny_settings
from tests.policy.test_routing_replay import shake
from tests.servers import TinyServer
from tests.train.runs import metrics, run_settings
from tests.train.steps import sealed_step

CLOSE = 5e-5  # log-probs of size 10 in float32, by the server's kernels and the policy's
SHAPE = (4, 8, 2)  # layers, experts and top-k of the tiny model


def learned(settings: Settings, rows: SealedStep) -> tuple[LearnReport, dict[str, torch.Tensor]]:
    with opened(settings) as policy:
        report = learner_of(policy).learn(0, rows, traces=1)
        policy.optimizer.gather_weights()
        return report, {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}


def learner_of(policy: Policy) -> Learner:
    goal, advantage = objective.build(policy.settings.objective)
    reference = Reference(policy) if policy.settings.objective.reference != "none" else None
    return Learner(policy, goal, advantage, policy.settings, reference)


def settings_of(folder: Path, replay: str, **sections: Any) -> Settings:
    objective = {"routing_replay": replay, **sections.pop("objective", {})}
    return tiny_settings(folder, objective=objective, **sections)


def test_own_routing_changes_nothing_until_weights_do(tmp_path: Path) -> None:
    """One update repeats what it would choose; the second of two would choose otherwise, and does not."""
    rows = sealed_step(tmp_path / "bank")
    (free, weights), (held, same) = (learned(settings_of(tmp_path, replay), rows) for replay in ("off", "policy"))
    assert all(torch.equal(same[name], values) for name, values in weights.items())
    assert held.metrics["replay/differs"] == 0 and held.updates[0].metrics["ratio_deviation"] == 0
    assert not any(name.startswith("replay/") for name in free.metrics)
    tokens = sum(sample.length for sample in rows.samples(range(rows.rows)))
    assert tokens * 4 * 2 <= held.metrics["replay/bytes"] < 1.5 * tokens * 4 * 2

    more: dict[str, Any] = {
        "batch": {"max_tokens": 64, "epochs": 2},
        "objective": {"options": {"clip_low": 0.5, "clip_high": 1}},
    }
    (free, weights), (held, other) = (learned(settings_of(tmp_path, replay, **more), rows) for replay in ("off", "policy"))
    first, second = (update.metrics for update in held.updates)
    assert first["replay/differs"] == 0 and 0 < second["replay/choices_differ"] < second["replay/differs"] < 0.5
    assert held.metrics["replay/differs"] == second["replay/differs"] / 2
    assert free.updates[0].metrics == {name: value for name, value in first.items() if not name.startswith("replay/")}
    assert free.updates[1].metrics["ratio_std"] != second["ratio_std"]
    assert any(not torch.equal(other[name], values) for name, values in weights.items())
    assert free.look is not None and held.look is not None
    assert "moe/routing_changed" in free.look.metrics and "moe/routing_changed" not in held.look.metrics


@pytest.mark.parametrize("old", ["recompute", "rollout"])
def test_the_servers_routing_is_in_old_and_new(old: str, tmp_path: Path) -> None:
    """Half of the samples have routing, of dice: the others' is the trainer's own. The reference stays free of it."""
    rows = sealed_step(tmp_path / "bank", turns=2, routing=SHAPE)
    own = {"old_log_probs": old, "reference": "initial", "penalties": [{"name": "kl_loss"}]}
    batch = {"max_tokens": 64, "minibatches": 2, "epochs": 2}
    with opened(settings_of(tmp_path, "rollout", objective=own, batch=batch)) as policy:
        experience = Experience.read(rows)
        assert experience.without_routing() == 0.5
        learner = learner_of(policy)
        parts = experience.minibatches(2, (0, 0))
        scored = [learner._scored(experience, part, watch=False) for part in parts]
        for minibatch in scored:
            assert all(sequence.routing is None for pack in minibatch.packs for sequence in pack.sequences)
            plain = [values.log_probs for values in policy.log_probs(minibatch.packs)]
            assert all(torch.equal(a, b) for a, b in zip(plain, minibatch.columns["reference"], strict=True))
            if old == "recompute":
                assert not all(torch.equal(a, b) for a, b in zip(plain, minibatch.columns["old"], strict=True))
        report = learner.learn(0, rows)
    assert report.metrics["replay/missing"] == 0.5
    first = report.updates[0].metrics
    if old == "recompute":
        # Dice against routers: 2 of 8 experts are the same two once in 28 times, and a choice is shared once in four.
        assert report.metrics["replay/rollout_differs"] == pytest.approx(1 - 1 / 28, abs=0.02)
        assert report.metrics["replay/rollout_choices_differ"] == pytest.approx(3 / 4, abs=0.03)
        assert first["ratio_deviation"] == 0
        assert 0.4 < first["replay/differs"] < 0.6  # of all tokens now: half of the samples repeat what they did themselves
    else:
        assert "replay/rollout_differs" not in report.metrics and first["replay/differs"] > 0.9


def test_the_servers_routing_is_compared_where_it_is_not_repeated(tmp_path: Path) -> None:
    """`sampling.routing` alone: numbers tell how often both sides choose otherwise, and nothing is learned otherwise."""
    rows = sealed_step(tmp_path / "bank", groups=2, turns=2, routing=SHAPE)
    plain, weights = learned(settings_of(tmp_path, "off"), rows)
    for replay in ("off", "policy"):
        told, same = learned(settings_of(tmp_path, replay, sampling={"routing": True}), rows)
        assert told.metrics["replay/missing"] == 0.5
        assert told.metrics["replay/rollout_differs"] == pytest.approx(1 - 1 / 28, abs=0.04)
        assert told.metrics["replay/rollout_choices_differ"] == pytest.approx(3 / 4, abs=0.06)
        assert told.metrics.get("replay/differs", 0) == 0 and ("replay/bytes" in told.metrics) == (replay == "policy")
        assert plain.updates[0].metrics.items() <= told.updates[0].metrics.items()
        assert all(torch.equal(same[name], values) for name, values in weights.items())


def test_a_bank_without_routing_is_refused_before_the_work(tmp_path: Path) -> None:
    rows = sealed_step(tmp_path / "bank")
    sealed_step(tmp_path / "routed", routing=SHAPE)
    run = {"directory": tmp_path / "run"}
    settings = settings_of(tmp_path, "rollout", bank={"replay": tmp_path / "bank"}, run=run)
    with pytest.raises(SettingsError, match=r"the bank has no routing of step 0\. Fill one with sampling\.routing=true"):
        train(settings)
    with opened(settings) as policy, pytest.raises(UserError, match="no routing of step 0, whose servers did not return it"):
        learner_of(policy).learn(0, rows)
    for replay, bank in (("policy", "bank"), ("rollout", "routed")):
        require_routing(settings_of(tmp_path, replay, bank={"replay": tmp_path / bank}, run=run))


def test_nothing_to_repeat_is_refused() -> None:
    agro = ObjectiveSettings(surrogate="agro", advantage=None, reference="initial", routing_replay="policy")
    with pytest.raises(SettingsError, match=r"objective\.surrogate = agro: nothing in it reads `old`"):
        objective.build(agro)
    objective.build(agro.model_copy(update={"routing_replay": "rollout"}))


def mismatch(policy: Policy, samples: list[Sample], packs: list[Pack], *, replay: bool) -> tuple[float, float]:
    """Of trainer and server on the tokens that the server wrote: largest |log-ratio|, and KL by k3."""
    with policy.replaying(policy.rollout_routes(packs)) if replay else nullcontext():
        scored = policy.log_probs(packs)
    ours = policy.per_sequence(packs, [values.log_probs for values in scored])
    x = np.concatenate([(ours[row] - sample.log_probs)[sample.loss_mask] for row, sample in enumerate(samples)])
    x = x.astype(np.float64)
    return float(np.abs(x).max()), float((np.exp(x) - 1 - x).mean())


def test_a_run_repeats_what_its_server_did(tiny_server: TinyServer, tmp_path: Path) -> None:
    """Setting replay is enough. In float32 both sides agree; where the trainer's routers are shaken, or it computes in
    bfloat16, replay brings it nearer to what was sampled."""
    folder = tmp_path / "run"
    train(
        run_settings(tiny_server, folder, objective={"routing_replay": "rollout"}, run={"steps": 2}),
        observers=[Journal(folder)],
    )
    for line in metrics(folder):
        assert line["replay/missing"] == 0 and line["replay/rollout_differs"] < 0.01 and line["mismatch_max"] < CLOSE
        assert line["replay/differs"] > line["replay/rollout_differs"]  # the second minibatch's routers have learned
        assert line["replay/bytes"] > 0
    with BankReader(folder / "bank") as bank, bank.step(0) as rows:
        samples = rows.samples(range(rows.rows))
        sequences = Experience.read(rows).sequences(range(rows.rows), routing=True)
    found = {}
    for dtype in ("float32", "bfloat16"):
        settings = run_settings(tiny_server, tmp_path / dtype, precision={"dtype": dtype})
        with opened(settings) as policy:
            packs = policy.pack(sequences)
            found[dtype] = [mismatch(policy, samples, packs, replay=replay) for replay in (False, True)]
            if dtype == "float32":
                shake(policy)
                found["shaken"] = [mismatch(policy, samples, packs, replay=replay) for replay in (False, True)]
    assert found["float32"][1][0] < CLOSE
    assert 2 * found["bfloat16"][1][1] < found["bfloat16"][0][1]
    assert found["shaken"][1][1] < found["shaken"][0][1]
