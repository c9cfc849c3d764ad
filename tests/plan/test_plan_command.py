"""`megatron-rl plan`: what it prints, what it refuses, how it ends."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megatron_rl.cli import app
from megatron_rl.config.load import load_settings
from megatron_rl.plan.machine import MACHINES
from tests.config.test_cli import TINY

MODEL = json.loads(TINY) | {"hidden_size": 1024, "num_attention_heads": 16, "head_dim": 64, "num_hidden_layers": 12,
                            "intermediate_size": 4096, "moe_intermediate_size": 512, "vocab_size": 32000}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    path = tmp_path / "recipe.yaml"
    path.write_text("policy: {config: config.json}\ncluster: {nodes: 2, gpu: h100}\nlayout: {pipeline: 2, expert: 8}\n")
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_a_plan_in_words(recipe: Path) -> None:
    result = run(recipe)
    assert result.exit_code == 0, result.output
    assert "on 16 x H100 SXM 80 GB" in result.output
    for word in ("parameters", "optimizer", "activations", "rollout", "update", "publish", "million tokens a day", "It fits"):
        assert word in result.output


def test_a_plan_in_numbers(recipe: Path) -> None:
    values = json.loads(run(recipe, "--json", "--response-tokens", "300", "--prompt-tokens", "200").stdout)
    assert values["ranks"] == 16 and values["fits"] is True and values["problems"] == []
    assert [stage["ranks"] for stage in values["stages"]] == [[0, 8], [8, 16]]
    assert values["workload"]["tokens"] == 32 * 8 * 500
    assert values["step_seconds"] == pytest.approx(sum(values["phases"].values()))
    assert values["tokens_a_day"] == pytest.approx(values["workload"]["tokens"] / values["step_seconds"] * 86400)
    for stage in values["stages"]:
        kinds = sum(stage["parameters"].values())
        assert stage["total"] == kinds and stage["weights"] == 2 * kinds and stage["gradients"] == 4 * kinds


SUPERVISED = ("supervised.batch=48", "batch.minibatches=4", "batch.epochs=2", "objective.reference=initial")


def test_supervised_fine_tuning_is_planned_without_servers(recipe: Path) -> None:
    """One update of given responses, as long as packs allow; what reinforcement learning alone reads changes nothing."""
    values = json.loads(run(recipe, *SUPERVISED, "--json").stdout)
    assert list(values["phases"]) == ["update"] and "servers" not in values and values["problems"] == []
    work = {"groups": 48, "group_size": 1, "prompt": 512, "response": 3840, "longest": 7680, "supervised": True}
    assert values["workload"] == work | {"tokens": 48 * (512 + 3840)}
    plain = json.loads(run(recipe, "supervised.batch=48", "--json").stdout)
    assert plain["phases"] == values["phases"] and plain["optimizer_step"] == values["optimizer_step"]
    assert values["step_seconds"] == values["phases"]["update"]
    said = run(recipe, *SUPERVISED)
    assert said.exit_code == 0 and "48 given responses (megatron-rl sft: no servers)" in said.stdout
    assert "1 optimizer step of" in said.stdout and not {"servers:", "rollout", "publish"} & set(said.stdout.split())


def test_which_of_the_two_is_planned_can_be_said(recipe: Path) -> None:
    """Files for both have rewards, and files for sft may leave `supervised` as it is."""

    def phases(*arguments: str) -> list[str]:
        return list(json.loads(run(recipe, *arguments, "--json").stdout)["phases"])

    rewarded = ("supervised.batch=48", "rewards=[{name: numeric}]")
    assert phases() == phases(*rewarded) == phases("supervised.batch=48", "--train") == ["rollout", "old", "update", "publish"]
    assert phases("--sft") == phases(*rewarded, "--sft") == ["update"]


def test_gpus_come_from_the_command_before_the_settings(recipe: Path) -> None:
    values = json.loads(run(recipe, "layout.expert=4", "--gpus", "8", "--gpu", "b200", "--json").stdout)
    assert values["ranks"] == 8 and values["machine"].startswith("B200")


def test_a_machine_of_ones_own(recipe: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text((MACHINES / "h100.yaml").read_text().replace("name: H100 SXM 80 GB", "name: Mine"))
    assert json.loads(run(recipe, "--machine", mine, "--json").stdout)["machine"] == "Mine"
    both = run(recipe, "--machine", mine, "--gpu", "h100")
    assert both.exit_code == 2 and "both say what the GPUs are" in both.stderr


def test_what_does_not_fit_ends_with_one_and_with_what_would(recipe: Path) -> None:
    result = run(recipe, "batch.max_tokens=1048576", "layout.pipeline=1", "layout.expert=1")
    assert result.exit_code == 1
    assert "does not fit: a rank of pipeline stage 0 takes" in result.stderr
    assert "what fits, and is fastest among what does:\nlayout:\n" in result.stderr
    assert json.loads(run(recipe, "batch.max_tokens=1048576", "layout.pipeline=1", "--json").stdout)["fits"] is False


def test_a_server_that_is_too_small_is_told_what_to_do(recipe: Path) -> None:
    result = run(recipe, "sglang.mem_fraction_static=0.001")
    assert result.exit_code == 1
    assert "sglang.tp_size = 1: a server's weights" in result.stderr and "Raise sglang.tp_size" in result.stderr


def test_nothing_fits_at_all(recipe: Path) -> None:
    result = run(recipe, "--gpus", "1", "layout.pipeline=1", "layout.expert=1", "batch.max_tokens=16777216")
    assert result.exit_code == 1
    assert "no layout of 1 x H100 SXM 80 GB holds this qwen3_moe" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h1000"], "there is no machine file for the GPU h1000. Did you mean h100?"),
        (["cluster.gpu=null"], "it is not known what GPUs to plan for"),
        (["--machine", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["layout.tensor=3"], "layout.tensor = 3"),
        (["--gpus", "0"], "Invalid value for '--gpus'"),
        (["cluster.server_nodes=1", "sglang.tp_size=16"], "a server takes 16 GPUs, more than there are for servers."),
        (["--prompt-tokens", "8192"], "a prompt and its response have 8,192 tokens at most"),
        (["--response-tokens", "9000"], "--response-tokens 9000: responses have "),
        (["--sft", "--response-tokens", "9000"], "Give fewer, or raise batch.max_sequence."),
        (["--suggest", "cluster.nodes=null"], "it is not known how many GPUs to suggest a layout for"),
    ],
)
def test_what_cannot_be_planned_ends_with_two(arguments: list[str], said: str, recipe: Path) -> None:
    result = run(recipe, *arguments)
    assert result.exit_code == 2 and said in result.stderr


def test_suggestions_can_be_pasted(recipe: Path, tmp_path: Path) -> None:
    result = run(recipe, "--suggest", "--top", "3")
    assert result.exit_code == 0, result.output
    _, _, yaml = result.stdout.partition("Write for the first:\n")
    pasted = tmp_path / "pasted.yaml"
    pasted.write_text(f"include: recipe.yaml\n{yaml}")
    best = json.loads(run(recipe, "--suggest", "--top", "3", "--json").stdout)
    assert len(best) == 3
    assert load_settings(pasted).layout.model_dump(include={"tensor", "pipeline"}).items() <= best[0]["plan"]["layout"].items()
    again = json.loads(run(pasted, "--json").stdout)
    assert again["phases"] == best[0]["plan"]["phases"]


def test_nothing_to_suggest_ends_with_one(recipe: Path) -> None:
    result = run(recipe, "--suggest", "--gpus", "1", "batch.max_tokens=16777216")
    assert result.exit_code == 1 and "no layout of 1 x" in result.stderr
