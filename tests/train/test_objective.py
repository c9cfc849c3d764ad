"""From settings to objectives: what is wrong is named as it stands in the settings; one's own objective; the worked example."""

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import ObjectiveSettings
from megatron_rl.objectives.advantages import GroupStandardised
from megatron_rl.objectives.compose import ComposedObjective
from megatron_rl.objectives.corrections import TruncatedImportanceWeight
from megatron_rl.objectives.gspo import SequencePolicyLoss
from megatron_rl.objectives.registry import SURROGATES
from megatron_rl.train.objective import build
from tests.objectives.samples import random_samples
from tests.objectives.steps import Layout, metric, run

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PULLED_BACK, BEST_ONLY = "my_objective:PulledBack", "my_objective:BestOnly"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the worked example on the path, as a user would have it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def settings(**words: Any) -> ObjectiveSettings:
    return ObjectiveSettings.model_validate(words)


def test_the_default_is_gspo_on_group_advantages() -> None:
    objective, advantage = build(ObjectiveSettings())
    assert isinstance(objective, ComposedObjective)
    assert objective.surrogate == SequencePolicyLoss()
    assert advantage == GroupStandardised()


def test_parts_get_their_options() -> None:
    weights = [{"name": "tis", "options": {"cap": 3.0}}]
    objective, advantage = build(
        settings(
            surrogate="grpo",
            options={"dual_clip": 3},
            advantage="gdpo",
            advantage_options={"weights": {"correct": 2.0}},
            weights=weights,
            penalties=[{"name": "kl_loss"}, {"name": "overlong", "options": {"longest": 100, "buffer": 10}}],
            reference="initial",
        )
    )
    assert isinstance(objective, ComposedObjective)
    assert objective.surrogate == SURROGATES["grpo"](dual_clip=3)
    assert objective.weights == (TruncatedImportanceWeight(cap=3.0),)
    assert [part.name for part in (*objective.penalties, *objective.reward_penalties)] == ["kl_loss", "overlong"]
    assert advantage is not None and advantage.name == "gdpo"


@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_can_be_asked_for(name: str) -> None:
    reads = "advantage" in SURROGATES[name]().needs_scalars
    build(settings(surrogate=name, advantage="grpo" if reads else None, reference="initial", on_policy=name == "gtpo"))


@pytest.mark.parametrize(
    "words, message",
    [
        ({"options": {"clip_lo": 1e-4}}, r"objective\.options\.clip_lo = 0\.0001: .* did you mean 'clip_low'\?"),
        ({"options": {"clip_low": "x"}}, r"objective\.options\.clip_low = x: .* not a finite number"),
        ({"surrogate": "gsop"}, r"objective\.surrogate = gsop: .* did you mean 'gspo'\?"),
        ({"advantage": "gpro"}, r"objective\.advantage = gpro: .* did you mean 'grpo' or 'gdpo'\?"),
        ({"advantage_options": {"epsilom": 1.0}}, r"objective\.advantage_options\.epsilom = 1\.0: .*'epsilon'"),
        ({"advantage": None, "advantage_options": {"epsilon": 1.0}}, r"advantage_options are set and .* null"),
        ({"advantage": None}, r"gspo needs an advantage"),
        ({"weights": [{"name": "tsi"}]}, r"objective\.weights\[0\]\.name = tsi: .*'tis'"),
        (
            {"weights": [{"name": "opsm"}, {"name": "tis", "options": {"cop": 2}}]},
            r"objective\.weights\[1\]\.options\.cop = 2: .*'cap'",
        ),
        ({"penalties": [{"name": "kl_loss", "options": {"estimator": "k4"}}]}, r"penalties\[0\]\.options\.estimator = k4"),
        ({"penalties": [{"name": "kl_loss"}]}, r"objective: kl_loss compares with a reference model"),
        ({"weights": [{"name": "tis"}]}, r"objective: weight tis has a factor for each token"),
        ({"surrogate": "rebel"}, r"'grpo' would do nothing. Set the advantage to null"),
        ({"advantage": "opo"}, r"objective: advantage 'opo' .*on_policy"),
        ({"surrogate": "gtpo", "advantage": "dr_grpo"}, r"objective: gtpo has a ratio that is always 1.*on_policy"),
        ({"options": {"clip_low": -1e-4}}, r"objective: gspo: clip_low=-0\.0001 must not be below 0"),
        (
            {"weights": [{"name": "sequence_weight"}], "old_log_probs": "rollout"},
            r"objective\.weights: sequence_weight corrects .*old_log_probs = rollout",
        ),
        ({"surrogate": "nowhere.at_all:Loss"}, r"objective\.surrogate = nowhere.at_all:Loss: .*cannot be loaded"),
    ],
)
def test_what_is_wrong_is_named_as_in_the_settings(words: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build(settings(**words))


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(SettingsError) as error:
        build(settings(options={"clip_lo": 1, "clip_hi": 2}, advantage="gpro"))
    assert len(str(error.value).splitlines()) == 3


def test_the_settings_shown_in_the_docs_work(tmp_path: Path) -> None:
    page = (EXAMPLES.parent / "objectives.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    (tmp_path / "shown.yaml").write_text("policy: {config: a-model}\n" + shown, encoding="utf-8")
    objective, advantage = build(load_settings(tmp_path / "shown.yaml", []).objective)
    assert isinstance(objective, ComposedObjective)
    assert [part.name for part in objective.parts] == ["gspo", "sequence_weight", "kl_loss"] and advantage is not None


# -- the worked example of docs/objectives.md --------------------------------------------------------------------------


@pytest.mark.usefixtures("examples")
def test_the_example_surrogate_is_its_formula() -> None:
    """Against a loop over tokens, however the step is split."""
    samples = random_samples(random.Random(3), groups=3, size=3)
    objective, _ = build(settings(surrogate=PULLED_BACK, options={"pull": 3.0}))
    counted = sum(sample.length > 0 for sample in samples)
    expected = 0.0
    for sample in samples:
        moved = [new - old for new, old in zip(sample.new, sample.old, strict=True)]
        expected -= sum(math.exp(d) * sample.advantage - 1.5 * d**2 for d in moved) / max(sample.length, 1) / counted
    split = Layout(micro_batches=((4, 0, 7), (1, 2), (3, 5, 6, 8)))
    for layout in (None, split):
        outcome = run(objective, samples, layout)
        assert outcome.answer.loss == pytest.approx(expected, rel=1e-12)
        for sample, slopes in zip(samples, outcome.answer.gradient, strict=True):
            moved = [new - old for new, old in zip(sample.new, sample.old, strict=True)]
            by_hand = [-(math.exp(d) * sample.advantage - 3 * d) / sample.length / counted for d in moved]
            assert slopes[: sample.length] == pytest.approx(by_hand, rel=1e-9, abs=1e-12)


@pytest.mark.usefixtures("examples")
def test_the_example_takes_weights_and_penalties_like_ours() -> None:
    objective, _ = build(
        settings(surrogate=PULLED_BACK, weights=[{"name": "tis"}], penalties=[{"name": "kl_loss"}], reference="initial")
    )
    outcome = run(objective, random_samples(random.Random(3), groups=2, size=3))
    assert {"spring", "reference_kl"} <= outcome.results[0].metrics.keys()


@pytest.mark.usefixtures("examples")
def test_the_example_of_a_bare_objective() -> None:
    samples = random_samples(random.Random(4), groups=3, size=3)
    objective, _ = build(settings(surrogate=BEST_ONLY))
    best = [sample for sample in samples if sample.advantage > 0 and sample.length]
    counted = sum(sample.length > 0 for sample in samples)
    outcome = run(objective, samples, Layout(micro_batches=((4, 0, 7), (1, 2), (3, 5, 6, 8)), garbage=math.nan))
    assert outcome.answer.loss == pytest.approx(-sum(sum(s.new) / s.length for s in best) / counted, rel=1e-12)
    assert metric(outcome, "imitated") == pytest.approx(len(best) / counted)


@pytest.mark.usefixtures("examples")
def test_options_of_the_example_are_checked_like_ours() -> None:
    with pytest.raises(SettingsError, match=r"objective\.options\.pul = 1: .* did you mean 'pull'\?"):
        build(settings(surrogate=PULLED_BACK, options={"pul": 1}))
    with pytest.raises(SettingsError, match="is a whole objective of its own"):
        build(settings(surrogate=BEST_ONLY, weights=[{"name": "opsm"}]))
