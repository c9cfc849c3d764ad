"""The section `objective:`, whose options are named by the parts and not by the settings."""

from pathlib import Path

import pytest

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import dump_settings, load_settings
from megatron_rl.config.names import open_names
from megatron_rl.config.settings import ObjectivePart

MODEL = "policy.config=a-model"
BASE = """\
policy: {config: a-model}
objective:
  advantage: gdpo
  advantage_options: {weights: {correct: 1.0, format: 0.5}}
  options: {clip_low: 1.0e-4, clip_high: 2.0e-4}
  weights: [{name: tis, options: {cap: 3.0}}]
"""


def base(folder: Path, text: str = BASE) -> Path:
    path = folder / "base.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_options_are_what_the_file_says(tmp_path: Path) -> None:
    objective = load_settings(base(tmp_path), []).objective
    assert objective.surrogate == "gspo"
    assert objective.advantage_options == {"weights": {"correct": 1.0, "format": 0.5}}
    assert objective.options == {"clip_low": 1e-4, "clip_high": 2e-4}
    assert objective.weights == (ObjectivePart(name="tis", options={"cap": 3.0}),)


def test_later_wins_option_by_option(tmp_path: Path) -> None:
    overrides = ["objective.options.clip_high=3e-4", "objective.advantage_options.weights.format=0.1"]
    objective = load_settings(base(tmp_path), overrides).objective
    assert objective.options == {"clip_low": 1e-4, "clip_high": 3e-4}
    assert objective.advantage_options == {"weights": {"correct": 1.0, "format": 0.1}}


def test_options_written_empty_forget_those_of_before(tmp_path: Path) -> None:
    overrides = ["objective.surrogate=grpo", "objective.options={}", "objective.options.dual_clip=3.0"]
    assert load_settings(base(tmp_path), overrides[:2]).objective.options == {}
    assert load_settings(base(tmp_path), overrides).objective.options == {"dual_clip": 3.0}
    assert load_settings(base(tmp_path), [*overrides, "objective.options={}"]).objective.options == {}


def test_options_survive_saving(tmp_path: Path) -> None:
    settings = load_settings(base(tmp_path), ["objective.surrogate=my_package.losses:Mine"])
    assert load_settings(base(tmp_path, dump_settings(settings)), []) == settings


def test_the_open_settings_are_those_that_hold_options() -> None:
    named = {"objective.options", "objective.advantage_options", "sampling.environment_options"}
    assert open_names() == named | {"sglang", "data.chat_template_kwargs"}


@pytest.mark.parametrize(
    "override, message",
    [
        ("objective.surogate=grpo", r"unknown setting objective.surogate. Did you mean objective.surrogate\?"),
        ("objective.clip_ratio_low=1", r"unknown setting .* Did you mean objective.options.clip_low\?"),
        ("objective.options=3", r"objective.options = 3: expected named values\."),
        ("objective.weights=[tis]", r"objective.weights = .*: expected a list, each entry {name: text, options: named values}"),
        ("objective.weights=[{name: tis, cap: 3}]", r"objective.weights = .*: expected a list"),
        ("objective.old_log_probs=old", r"objective.old_log_probs = \"old\": expected one of recompute, rollout\."),
    ],
)
def test_what_is_wrong_is_said_by_name(override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(None, [MODEL, override])
