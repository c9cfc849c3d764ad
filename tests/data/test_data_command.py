"""`megatron-rl data show`: prompts as the model sees them, before a run."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megatron_rl.cli import app
from tests.data.byte_tokenizer import write_tokenizer
from tests.reference.tiny import write_tiny_config

SETTINGS = """\
policy: {config: model}
data:
  cache: CACHE
  validation_share: 0.25
  sources:
    - {path: "task:arithmetic", weight: 3, options: {rows: 40}}
    - {path: "task:countdown", weight: 1, options: {rows: 20, difficulty: 4}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tokenizer(folder / "model")
    write_tiny_config("qwen3_moe", folder / "model", vocab_size=300)
    path = folder / "recipe.yaml"
    path.write_text(SETTINGS.replace("CACHE", str(folder / "cache")))
    return path


def show(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "show", *map(str, arguments)])


def test_prompts_counts_and_lengths(config: Path) -> None:
    result = show(config, "-n", 4)
    assert result.exit_code == 0, result.output
    output = result.stdout
    heads = re.findall(r"position (\d)   (arithmetic|countdown)/\d+   (\d+) tokens", output)
    assert [int(position) for position, _, _ in heads] == [0, 1, 2, 3]
    assert sorted(name for _, name, _ in heads) == ["arithmetic"] * 3 + ["countdown"]
    assert output.count("<|im_start|>user\n") == 4 and output.count("<|im_end|>\n<|im_start|>assistant\n") == 4
    assert output.count("answer = ") == 4 and output.count("target = ") == 1
    table = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.split()[:1] and "%" in line}
    assert table == {"arithmetic": ["75.0%", "30", "0", "0", "30"], "countdown": ["25.0%", "15", "0", "0", "15"]}
    bars = re.findall(r"^ \d+-\d+ +(\d+) ", output, re.M)
    assert sum(map(int, bars)) == 45
    later = show(config, "-n", 1, "--start", 3).stdout
    assert later.splitlines()[0].split("─")[0] in output
    assert "10 " in show(config, "-n", 0, "--part", "validation").stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.max_prompt_tokens=5"],
            "no rows left for train: 30 rows, 0 empty, 30 too long, 0 kept. Raise data.max_prompt_tokens.",
        ),
        (["data.sources=[]"], "there are no sources of train prompts"),
        (["data.chat_template_kwargs.enable_thinkin=false"], "Did you mean enable_thinking?"),
        (
            ["data.sources=[{path: 'task:sorting', weight: 1}, {path: 'task:countdown'}]"],
            "task:countdown has no weight and others have",
        ),
        (["data.template=none", "data.chat_template=x"], "data.chat_template = x with data.template = none"),
        (["data.sources=[{path: 'task:sorting', prompt: a, wording: b}]"], "prompt and wording are set"),
        (["data.shufle=true"], "Did you mean data.shuffle?"),
    ],
)
def test_wrong_settings_are_told(config: Path, overrides: list[str], message: str) -> None:
    result = show(config, *overrides)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output


def test_a_tokenizer_of_another_model_is_refused(config: Path) -> None:
    write_tiny_config("qwen3_moe", config.parent, vocab_size=120)
    result = show(config, f"policy.config={config.parent}", f"data.tokenizer={config.parent / 'model'}")
    assert result.exit_code == 2 and "and the model has 120 (vocab_size of policy.config)" in result.stderr
