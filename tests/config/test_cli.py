"""The command line: the dry run of a 235B model over 256 ranks, listings, exit codes, and no torch on the way."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from megatron_rl import __version__
from megatron_rl.cli import app
from megatron_rl.config.names import setting_fields
from megatron_rl.objectives.registry import ADVANTAGES, PENALTIES, SURROGATES, WEIGHTS

REPOSITORY = Path(__file__).parents[2]
PAIR = REPOSITORY / "configs" / "pairs" / "qwen3-235b-a22b-32x8-h100.yaml"
TINY = """\
{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 4, "hidden_size": 64,
 "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "moe_intermediate_size": 32,
 "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 100, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
 "norm_topk_prob": true}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(TINY)
    path = tmp_path / "tiny.yaml"
    path.write_text("policy: {config: config.json}\n")
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def numbers(cell: str) -> list[int]:
    """`0-3, 8` as 0, 1, 2, 3, 8."""
    runs = [list(map(int, part.split("-"))) for part in cell.split(", ") if part != "-"]
    return [number for ends in runs for number in range(ends[0], ends[-1] + 1)]


def rows(output: str, header: str) -> list[list[str]]:
    """The cells of the table whose first column is `header`."""
    lines = iter(output.splitlines())
    for line in lines:
        if line.split()[:1] == [header]:
            break
    next(lines)  # the rule under the header
    found = []
    for line in lines:
        if not line.strip():
            break
        found.append(re.split(r"\s{2,}", line.strip()))
    return found


def test_dry_run_of_235b_shows_every_layer_and_rank_once() -> None:
    result = run("train", PAIR, "cluster.nodes=32", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "world 256 = pipeline 8 x data 4 x context 2 x tensor 4" in result.output
    assert "rank = 1 tensor + 4 context + 8 data + 32 pipeline" in result.output
    assert "rank = 1 expert_tensor + 1 expert + 8 expert_data + 32 pipeline" in result.output
    assert "235,093,634,560 parameters, 22,190,763,520 active" in result.output  # the 235B and the 22B of its name
    stages = rows(result.output, "stage")
    assert [rank for row in stages for rank in numbers(row[1])] == list(range(256))
    assert [layer for row in stages for layer in numbers(row[2])] == list(range(94))
    assert stages[0][5] == "embedding" and stages[-1][5] == "output"
    parts = rows(result.output, "ranks")
    assert sorted(rank for row in parts for rank in numbers(row[0])) == list(range(32))
    assert [expert for row in parts for expert in numbers(row[2])] == list(range(128))
    assert len(result.output.splitlines()) < 150  # settings and layout: two tall screens


def test_ranks_shows_every_rank() -> None:
    result = run("train", PAIR, "cluster.nodes=32", "--dry-run", "--ranks")
    table = rows(result.output, "rank")
    assert [int(row[0]) for row in table] == list(range(256))
    # rank 77 = 1 + 4 x 1 + 8 x 1 + 32 x 2: tensor 1, context 1, data 1, stage 2; expert 77 % 8, copy (77 % 32) // 8
    assert table[77] == ["77", "2", "1", "1", "1", "5", "0", "1", "80-95", "23-34"]


def test_dry_run_shows_what_differs_from_the_defaults(recipe: Path) -> None:
    output = run("train", recipe, "optimizer.lr=2e-6", "--dry-run").output
    assert "lr = 2e-06 *  (default 1e-06)" in output
    assert "min_lr = 0.0\n" in output
    shown = [line.strip("│├└─ ").split(" = ")[0] for line in output.splitlines() if " = " in line]
    assert set(shown) >= {name.rpartition(".")[2] for name in setting_fields() if name.startswith("optimizer.")}
    whole = [line.split()[1] for line in output.splitlines() if "(all as by default)" in line]
    every = {name.rpartition(".")[0] for name in setting_fields()} - {""}
    assert "rewards = []" in output
    assert "optimizer" not in whole and set(whole) | {"optimizer", "policy", "precision", "batch", "run"} >= every


@pytest.mark.parametrize("command", ["train", "sft", "eval", "rollout", "serve", "data show"])
def test_every_command_with_settings_takes_several_files(command: str, recipe: Path, tmp_path: Path) -> None:
    """What the second file says is what is wrong."""
    (tmp_path / "second.yaml").write_text("layout: {tensr: 2}\n")
    result = run(*command.split(), recipe, tmp_path / "second.yaml")
    assert result.exit_code == 2, result.output
    assert f"error: {tmp_path}/second.yaml:1: unknown setting layout.tensr" in result.stderr
    assert "FILE.yaml|NAME=VALUE" in run(*command.split(), "--help").output


def test_every_option_and_argument_has_its_help() -> None:
    def words(command: Any, path: str) -> Iterator[tuple[str, str | None]]:
        for name, below in getattr(command, "commands", {}).items():
            yield from words(below, f"{path} {name}")
        yield from ((f"{path} {each.opts[0]}", each.help) for each in command.params)

    found = dict(words(typer.main.get_command(app), "megatron-rl"))
    assert "megatron-rl plan --gpus" in found
    assert [word for word, text in found.items() if not text] == []


def test_a_recipe_and_a_layout_may_be_two_files(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "second.yaml").write_text("layout: {tensor: 2, expert: 4}\n")
    result = run("train", recipe, tmp_path / "second.yaml", "layout.expert=2", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "experts: 2 = pipeline 1 x expert_data 1 x expert 2 x expert_tensor 1" in result.output


def test_dry_run_without_a_world_size_takes_the_smallest(recipe: Path) -> None:
    result = run("train", recipe, "layout.tensor=2", "layout.expert=4", "layout.pipeline=2", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "layout.world_size is not set: shown for 8 ranks" in result.output
    assert "world 8 = pipeline 2 x data 2 x context 1 x tensor 2" in result.output


def test_virtual_chunks_are_shown_stage_by_stage(recipe: Path) -> None:
    output = run("train", recipe, "layout.pipeline=2", "layout.virtual_pipeline=2", "--dry-run").output
    assert [row[2] for row in rows(output, "stage")] == ["0 | 2", "1 | 3"]


def test_many_groups_are_cut_short_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(TINY.replace('"num_experts": 8', '"num_experts": 64'))
    (tmp_path / "many.yaml").write_text("policy: {config: config.json}\nlayout: {expert: 64}\n")
    output = run("train", tmp_path / "many.yaml", "--dry-run").output
    assert len(rows(output, "ranks")) == 32
    assert "and 32 more groups; --ranks shows every rank" in output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.yaml"], "error: nowhere.yaml: cannot be read"),
        (["layout.tensor=2"], "error: layout.tensor=2 is an override where the settings file should stand"),
        (["RECIPE", "layout.lr=2", "--dry-run"], "error: command line: unknown setting layout.lr. Did you mean optimizer.lr?"),
        (["RECIPE", "layout.expert=3", "--dry-run"], "error: layout.expert = 3: the model's 8 experts"),
        (["RECIPE", "policy.config=nowhere", "--dry-run"], "nowhere"),
        (
            ["RECIPE", "objective.surrogate=gsop", "--dry-run"],
            "error: objective.surrogate = gsop: no surrogate is called 'gsop'; did you mean",
        ),
        (["RECIPE", "objective.surrogate=gsop", "layout.world_size=2"], "error: objective.surrogate = gsop"),
        (["RECIPE", "objective.options.clip_lo=1e-4", "--dry-run"], "error: objective.options.clip_lo = 0.0001: "),
        (["RECIPE", "rewards=[{name: numerik}]", "--dry-run"], "error: rewards[0].name = numerik: "),
        (["RECIPE", "rewards=[{name: numerik}]", "layout.world_size=2"], "error: rewards[0].name = numerik: "),
        (["RECIPE", "rewards=[{name: length, options: {hihg: 3}}]"], "error: rewards[0].options.hihg: "),
        (["RECIPE", "pair.json", "--dry-run"], "error: command line: 'pair.json' is no override and no settings file."),
        (["RECIPE", "nowhere.yaml", "--dry-run"], "error: nowhere.yaml: cannot be read"),
        (["--resume", "runs/mine", "run.steps=3", "RECIPE"], "a run goes on with its own settings"),
        (["RECIPE", "--ranks"], "error: --ranks shows the layout of a dry run. Add --dry-run."),
    ],
)
def test_wrong_settings_end_with_a_message_and_code_2(recipe: Path, arguments: list[str], message: str) -> None:
    result = run("train", *(str(recipe) if argument == "RECIPE" else argument for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert all(line.startswith("error: ") for line in result.stderr.splitlines())


def test_what_is_unwise_is_said_once(recipe: Path) -> None:
    result = run("train", recipe, "precision.fp8=simulated", "objective.old_log_probs=rollout", "--dry-run")
    assert result.exit_code == 0, result.output
    weights, line = result.stderr.splitlines()
    assert weights.startswith("warning: policy.init = random: ")
    assert line.startswith("warning: objective.old_log_probs = rollout with precision.fp8 = simulated: ")


def test_training_checks_the_settings_before_it_starts(recipe: Path, tmp_path: Path) -> None:
    result = run("train", recipe, f"run.directory={tmp_path / 'run'}", "layout.tensor=4")
    assert result.exit_code == 2, result.output
    assert "error: layout.tensor = 4: the model's 2 key-value heads" in result.stderr
    assert not (tmp_path / "run").exists()


def test_settings_lists_every_setting() -> None:
    output = run("settings").output
    first_words = {line.split()[0] for line in output.splitlines() if line.split()}
    assert first_words >= set(setting_fields())
    assert "one of alltoall, allgather, flex" in output


def test_version_names_what_is_installed() -> None:
    output = run("version").output
    assert re.search(rf"megatron-rl +{re.escape(__version__)} *\n", output)
    assert re.search(r"megatron-core\s+\d+\.\d+", output)


def test_help_teaches_overrides_by_example() -> None:
    output = run("train", "--help").output
    assert "layout.tensor=4" in output and "optimizer.lr=1e-6" in output and "--dry-run" in output


@pytest.mark.parametrize("arguments", [["train", str(PAIR), "--dry-run"], ["settings"], ["version"], ["train", "--help"]])
def test_looking_imports_no_torch(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom megatron_rl.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'megatron', 'transformers', 'sglang', 'numpy'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# -- objectives --------------------------------------------------------------------------------------------------------


def test_objectives_lists_all_with_formula_source_and_defaults() -> None:
    result = run("objectives")
    assert result.exit_code == 0, result.output
    for name in (*ADVANTAGES, *SURROGATES, *WEIGHTS, *PENALTIES):
        assert re.search(rf"^ {name} ", result.output, re.M), name
    assert "min(s_i A_i, clip(s_i, 1−ε_lo, 1+ε_hi) A_i)" in result.output
    assert "2507.18071" in result.output and "clip_high = 0.0004" in result.output


def test_objectives_shows_one_in_full() -> None:
    output = run("objectives", "gspo").output
    assert output.startswith("surrogate gspo   arXiv 2507.18071")
    assert "N is the number of sequences in the whole step" in output
    assert re.search(r"clip_low +a finite number +0\.0003 +ε_lo", output)
    assert "advantage grpo" in (both := run("objectives", "grpo").output) and "surrogate grpo" in both


def test_objectives_shows_a_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs" / "examples"))
    output = run("objectives", "my_objective:PulledBack").output
    assert re.search(r"pull +a finite number +2\.0 +How strong the spring is", output)
    assert "a bare objective" in run("objectives", "my_objective:BestOnly").output.lower()


@pytest.mark.parametrize("name, message", [("gsop", "did you mean 'gspo'?"), ("nowhere:Loss", "cannot be loaded")])
def test_an_objective_that_does_not_exist(name: str, message: str) -> None:
    result = run("objectives", name)
    assert result.exit_code == 2
    assert message in result.stderr
