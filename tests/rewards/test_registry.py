"""The section `rewards:`: what is wrong in it is told with its fix; the command and the page list all there is."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import dump_settings, load_settings
from megatron_rl.config.reward_settings import RewardPart
from megatron_rl.rewards.registry import REWARDS, build, catalogue, columns
from tools.reward_docs import PAGE, text

RUN = "policy: {config: config.json}\n"


@pytest.mark.parametrize(
    "part, problems",
    [
        ({"name": "exat"}, ["rewards[0].name = exat: there is no such reward. Did you mean 'exact'?"]),
        ({"name": "beauty"}, ["rewards[0].name = beauty: there is no such reward. There are exact, numeric, regex"]),
        (
            {"name": "exact", "options": {"ignorecase": True, "answer": 3}},
            [
                "rewards[0].options.answer = 3: expected text.",
                "rewards[0].options.ignorecase: exact has no such option. Did you mean 'ignore_case'?",
            ],
        ),
        ({"name": "exact", "options": {"extract": "first"}}, ["expected one of all, last_line, boxed, last_number."]),
        ({"name": "numeric", "options": {"relative": "0.1"}}, ['relative = "0.1": expected a number of at least 0.']),
        ({"name": "numeric", "options": {"timeout": 0}}, ["timeout = 0: expected a number above 0."]),
        ({"name": "regex"}, ["rewards[0].options: regex needs either `pattern` or `column`."]),
        ({"name": "regex", "options": {"pattern": "("}}, ["options.pattern = (: is no regular expression: missing )"]),
        ({"name": "format", "options": {"tags": ["a"], "pattern": "a"}}, ["format needs either `pattern` or `tags`."]),
        ({"name": "length"}, ["length needs `low`, `high` or `budget`"]),
        ({"name": "length", "options": {"low": 5, "high": 4}}, ["`high` = 4 is below `low` = 5."]),
        ({"name": "http"}, ["rewards[0].options.url is not set and has no default: Address of the server."]),
        ({"name": "http", "options": {"url": "localhost:3"}}, ["url = localhost:3: is no address of a server; write http://"]),
        ({"name": "judge", "options": {"url": "http://h/v1"}}, ["rewards[0].options.model is not set"]),
        ({"name": "judge", "options": {"url": "http://h", "model": "m", "prompt": "Good?"}}, ["put {response} into it."]),
        ({"name": "judge", "options": {"url": "http://h", "model": "m", "pattern": "x"}}, ["needs a group in parentheses"]),
        ({"name": "judge", "options": {"url": "http://h", "model": "m", "low": 10}}, ["`low` = 10 must be below `high` = 10"]),
        ({"name": "code", "options": {"memory": 100, "processes": 2}}, ["is below 64 MiB for each of 2 `processes`."]),
        ({"name": "code", "options": {"before": "head"}}, ["belong to style assert."]),
        ({"name": "code", "options": {"unenforced": ["nothing"]}}, ["unenforced = [\"nothing\"]: expected a list"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_fix(part: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(SettingsError) as refusal:
        build([RewardPart.model_validate(part)])
    lines = str(refusal.value).splitlines()
    assert len(lines) == len(problems)
    assert all(problem in line for problem, line in zip(problems, lines, strict=True)), lines


def test_everything_wrong_is_told_at_once() -> None:
    parts = [RewardPart(name="math"), RewardPart(name="mat"), RewardPart(name="exact", component="math")]
    with pytest.raises(SettingsError) as refusal:
        build(parts)
    assert str(refusal.value).splitlines() == [
        "rewards[1].name = mat: there is no such reward. Did you mean 'math'?",
        "rewards: component 'math' is there 2 times. Give each its own name: {name: …, as: math_2}.",
    ]


def test_settings_are_read_and_written_with_their_words(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"{RUN}rewards:\n  - {{name: exact, as: right, weight: 2, options: {{after: Answer}}}}\n  - {{name: math}}\n"
    )
    settings = load_settings(tmp_path / "run.yaml", [])
    assert settings.rewards[0] == RewardPart(name="exact", component="right", weight=2.0, options={"after": "Answer"})
    assert [component.name for component in build(settings.rewards)] == ["right", "math"]
    dumped = dump_settings(settings)
    assert yaml.safe_load(dumped)["rewards"][0]["as"] == "right"
    (tmp_path / "again.yaml").write_text(dumped)
    assert load_settings(tmp_path / "again.yaml", []) == settings
    with pytest.raises(SettingsError, match="as: text, or null"):
        load_settings(tmp_path / "run.yaml", ["rewards=[{name: 3}]"])


def test_columns_are_known_before_anything_is_sampled() -> None:
    url = "http://localhost:1"
    parts = [
        RewardPart(name="exact", options={"answer": "gold"}),
        RewardPart(name="regex", options={"pattern": "x"}),
        RewardPart(name="code", options={"style": "assert", "before": "imports", "entry_point": "function"}),
        RewardPart(name="http", options={"url": url, "body": {"a": "{prompt} {response} {facts}", "b": ["{more}"]}}),
        RewardPart(name="judge", options={"url": url, "model": "m", "prompt": "{response}{rubric}", "system": "{tone}"}),
        RewardPart(name="length", options={"budget": "room"}),
    ]
    assert columns(build(parts)) == {
        "exact": {"gold"},
        "regex": set(),
        "code": {"tests", "imports", "function"},
        "http": {"facts", "more"},
        "judge": {"rubric", "tone"},
        "length": {"room"},
    }


# -- what is told ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_every_example_is_one_that_works(name: str) -> None:
    [component] = build([RewardPart.model_validate(yaml.safe_load(REWARDS[name].example))])
    assert component.words[0] == name


def test_every_reward_and_option_is_described() -> None:
    assert [entry.name for entry in catalogue()] == list(REWARDS)
    assert [f"{entry.name}.{option.name}" for entry in catalogue() for option in entry.options if not option.text] == []
    assert [entry.name for entry in catalogue() if not entry.text or not entry.example] == []


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == text(), "run python tools/reward_docs.py and commit what it writes"


def test_every_file_that_the_page_names_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links and [link for link in links if not link.startswith("https://") and not (PAGE.parent / link).exists()] == []


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["rewards", *arguments])
    return result.exit_code, result.output


def test_the_command_lists_all_with_options_and_examples() -> None:
    code, output = run()
    assert code == 0
    for name in REWARDS:
        assert re.search(rf"^ {name} ", output, re.M), name
    assert "{name: math, options: {boxed: true, timeout: 5}}" in output and "ignore_case = false" in output


def test_the_command_shows_one_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run("math")
    assert code == 0 and output.startswith("reward math\n")
    assert re.search(r"boxed +true or false +false +Only what stands in the last", output)
    monkeypatch.syspath_prepend(str(PAGE.parent / "examples"))
    code, output = run("my_rewards:brevity")
    assert code == 0 and "A plain function computes" in output and "arguments" in output


def test_a_reward_that_does_not_exist() -> None:
    code, output = run("mth")
    assert code == 2 and "error: mth: there is no such reward. Did you mean 'math'?" in output
    assert run("math", "--check")[0] == 2


def test_the_check_says_what_holds_here() -> None:
    code, output = run("--check")
    verdicts = dict(re.findall(r"^ (\w+) +(yes|no|NO) ", output, re.M))
    assert set(verdicts) >= {"memory", "network", "writing", "many_processes"}
    assert code == (1 if "NO" in verdicts.values() else 0)
    assert ("Programs can be held here" in output) == (code == 0)
