"""The studies' results are whole and say what the pages say; what studies compute themselves is what it is called."""

import asyncio
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rl.config.load import load_settings
from megatron_rl.fidelity.tokens import Compared
from megatron_rl.objectives.base import Divisors, TokenBatch
from megatron_rl.objectives.catalogue import KINDS
from megatron_rl.policy.routing_watch import RoutingWatch
from megatron_rl.train import objective
from megatron_rl.types import Pack, Prompt
from megatron_rl.types import Sequence as TokenSequence
from tools import fp8_page, gspo_page, objective_docs, study_fp8, study_gspo, study_objectives
from tools.toy_runs import QUICKSTART, DigitsAgain, Results, chosen, not_finite, series

EVERY_PART = [f"{kind} {name}" for kind, table in KINDS.items() for name in table]


# -- every objective -------------------------------------------------------------------------------------------------------


def test_every_part_has_trained_for_thirty_finite_steps() -> None:
    study = json.loads(objective_docs.STUDY.read_text(encoding="utf-8"))
    assert study["conditions"] == study_objectives.CONDITIONS and study["conditions"]["steps"] == 30
    assert sorted(study["runs"]) == sorted(EVERY_PART), "run python tools/study_objectives.py"
    for name, run in study["runs"].items():
        assert (run["not_finite"], run["skipped"]) == ({}, 0), name
        for metric in ("reward/mean", "loss", "grad_norm"):
            assert len(run[metric]) == 30 and all(map(math.isfinite, run[metric])), f"{name}: {metric}"
        assert max(run["grad_norm"]) > 0, f"{name} has never moved anything"
        assert run["metrics"] > 30, name
        assert run["settings"] == study_objectives.partners(name), f"{name} has other partners now: run it again"


@pytest.mark.parametrize("name", EVERY_PART)
def test_a_part_is_studied_with_partners_that_suit_it(name: str) -> None:
    settings = load_settings(QUICKSTART, [*study_objectives.COMMON, *study_objectives.partners(name)])
    built, advantage = objective.build(settings.objective)
    parts = [part.name for part in (*getattr(built, "parts", ()), *([advantage] if advantage else []))]
    assert name.partition(" ")[2] in parts


def test_a_second_turn_is_asked_and_earns_its_own_reward() -> None:
    async def play(*said: str) -> tuple[list[float], list[bool], str]:
        environment = DigitsAgain()
        await environment.reset(Prompt("p", np.arange(2), fields={"answer": "0123"}))
        seen = [await environment.step(text) for text in said]
        return [each.reward for each in seen], [each.done for each in seen], seen[0].messages[0]["content"]

    assert asyncio.run(play("0123", "3210")) == ([1.0, 0.0], [False, True], "3210")
    assert asyncio.run(play("9", "0123 ")) == ([0.0, 1.0], [False, True], "3210")


# -- GSPO ------------------------------------------------------------------------------------------------------------------


def test_the_study_of_gspo_is_whole_and_its_page_up_to_date() -> None:
    study = json.loads(gspo_page.RESULTS.read_text(encoding="utf-8"))
    assert study["conditions"] == study_gspo.CONDITIONS
    assert list(study["runs"]) == study_gspo.plan(), "run python tools/study_gspo.py"
    for name, run in study["runs"].items():
        if not name.startswith("rate"):
            assert len(run["reward/mean"]) == study_gspo.STEPS, name
        assert ("updates" in run) == (name.startswith("rate") or study_gspo.looks(name)), name
        for number, table in run.get("updates", {}).items():
            steps = study_gspo.RATE_STEPS if name.startswith("rate") else study_gspo.STEPS
            assert np.isfinite(table).all() and np.shape(table) == (steps, study_gspo.MINIBATCHES), f"{name}: {number}"
    assert gspo_page.PAGE.read_text(encoding="utf-8") == gspo_page.text(), "run python tools/study_gspo.py --page"


def test_nothing_is_clipped_before_the_first_update_of_a_step() -> None:
    runs = json.loads(gspo_page.RESULTS.read_text(encoding="utf-8"))["runs"]
    for arm in gspo_page.LOOKED_AT:
        for judge in ("gspo", "grpo"):
            assert not gspo_page.updates(runs, arm, f"{judge}_clipped")[:, :, 0].any()


def watch(*layers: list[list[int]]) -> RoutingWatch:
    """Of one pack: for each layer, each token's experts, of four."""
    chosen = [torch.tensor([[expert in experts for expert in range(4)] for experts in tokens]) for tokens in layers]
    return RoutingWatch({layer: [choices] for layer, choices in enumerate(chosen)})


def test_a_token_is_rerouted_when_any_layer_chooses_otherwise() -> None:
    before = watch([[0, 1], [0, 1], [2, 3]], [[0, 1], [0, 1], [0, 3]])
    after = watch([[1, 0], [0, 2], [2, 3]], [[0, 1], [0, 1], [0, 2]])
    (found,) = study_gspo.rerouted(before, after)
    assert found.tolist() == [False, True, True]


def batch(log_probs: list[float], mask: list[bool]) -> TokenBatch:
    nothing = torch.zeros(0)
    return TokenBatch(
        torch.tensor(log_probs), torch.tensor(mask), nothing, nothing, {}, {}, Divisors(1, 1), lambda values: values
    )


def test_movement_is_of_tokens_that_count_and_padding_is_passed_over() -> None:
    tokens = np.zeros(3, np.int64)
    sequences = tuple(TokenSequence(i, tokens[: 3 - i], np.zeros(3 - i, np.bool_)) for i in range(2))
    pack = Pack(sequences, (4, 3, 2))  # lengths 3 and 2, padded to 4 and 3, and two tokens of padding alone
    mask = [True, True, False, False, True, False, False, False, False]
    before = batch([-1.0] * 9, mask)
    after = batch([-1.5, -1.25, 7.0, 9.0, -0.9, 7.0, 9.0, 9.0, 9.0], mask)
    found = study_gspo.moved([pack], [before], [after], [torch.tensor([True, False, True, False, True])])
    assert found["tokens_changed"] == pytest.approx(1 / 3)
    assert found["moved_changed"] == pytest.approx(0.5)
    assert found["moved_same"] == pytest.approx((0.25 + 0.1) / 2)


# -- FP8 -------------------------------------------------------------------------------------------------------------------


def test_the_study_of_fp8_is_whole_and_its_page_up_to_date() -> None:
    study = json.loads(fp8_page.RESULTS.read_text(encoding="utf-8"))
    assert study["conditions"] == study_fp8.CONDITIONS
    assert list(study["runs"]) == study_fp8.plan(), "run python -m tools.study_fp8"
    for name, run in study["runs"].items():
        if name.startswith("server "):
            assert run.keys() == study_fp8.PRECISIONS.keys(), name
        else:
            assert run["settings"] == study_fp8.own_settings(name), f"{name} has other settings now: run it again"
            assert len(run["reward/mean"]) == study_fp8.STEPS and min(run["mismatch_k3"]) > 0, name
    assert fp8_page.PAGE.read_text(encoding="utf-8") == fp8_page.text(), "run python -m tools.study_fp8 --page"


@pytest.mark.parametrize("name", study_fp8.plan()[len(study_fp8.SERVERS) :])
def test_a_run_of_the_study_of_fp8_can_be_had(name: str) -> None:
    goal, form, routing, seed = study_fp8.parts_of(name)
    assert name == f"{goal} {form} {routing} seed {seed}"
    settings = load_settings(QUICKSTART, [*study_fp8.COMMON, *study_fp8.own_settings(name)])
    assert (settings.objective.surrogate, settings.run.seed) == (goal, seed)
    assert (settings.precision.fp8 == "simulated") == (form in ("FP8 both", "FP8 trainer"))


def test_noise_is_of_sequences_and_of_tokens() -> None:
    generator = np.random.default_rng(0)
    differences = generator.normal(0, 3e-3, (study_fp8.PROMPTS, study_fp8.TOKENS))
    differences[3, 5], differences[4, 6], differences[5, 7] = 0.3, -0.3, 0.19  # ratios 1.35, 0.74 and 1.21
    found = study_fp8.noise(Compared(differences.ravel(), np.zeros(differences.size), np.zeros(differences.size, np.int64)))
    ratios = [math.exp(sum(row) / len(row)) for row in differences.tolist()]
    beyond = [ratio for ratio in ratios if not 1 - 3e-4 <= ratio <= 1 + 4e-4]
    assert 0 < len(beyond) < len(ratios)
    assert found["gspo_beyond"] == pytest.approx(len(beyond) / len(ratios), rel=1e-3)
    assert found["gspo_spread"] == pytest.approx(sum(abs(ratio - 1) for ratio in ratios) / len(ratios), rel=1e-3)
    assert found["grpo_beyond"] == pytest.approx(2 / differences.size, rel=1e-3)


# -- results ---------------------------------------------------------------------------------------------------------------


def test_results_outlive_the_process_and_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Results(path, {"steps": 2}).add("b", {"reward": [1.0, 2.0]}, ["a", "b"])
    again = Results(path, {"steps": 2})
    again.add("a", {"reward": [0.5]}, ["a", "b"])
    assert list(Results(path, {"steps": 2}).runs) == ["a", "b"]
    assert Results(path, {"steps": 2}).runs["b"] == {"reward": [1.0, 2.0]}
    assert chosen(["a", "b", "c"], again.runs, None) == ["c"]
    assert chosen(["a", "b", "c"], again.runs, ["b"]) == ["b"]
    with pytest.raises(SystemExit, match="no run's name begins so"):
        chosen(["a"], {}, ["z"])
    with pytest.raises(SystemExit, match="was made under"):
        Results(path, {"steps": 3})


def test_what_is_not_finite_is_named_with_its_steps() -> None:
    steps = [{"loss": 1.0, "ratio": 1.0}, {"loss": math.nan, "ratio": 1.0}, {"loss": 2.0, "extra": -math.inf}]
    assert not_finite(steps) == {"loss": [1], "extra": [2]}
    assert series(steps, ["loss", "ratio"]).keys() == {"loss"}
