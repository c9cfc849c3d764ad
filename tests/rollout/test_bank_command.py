"""`megatron-rl bank`: what it shows is what is there, errors say what to do."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from megatron_rl.cli import app
from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.rollout.bank.writer import Bank
from megatron_rl.types import Group, Prompt, Sample, Segment
from tests.data.byte_tokenizer import write_tokenizer
from tests.rollout.banks import made

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bank", *map(str, arguments)])


def said(tokenizer: Tokenizer, key: str, step: int, answers: dict[str, float]) -> Group:
    """A group of answers in words with their rewards."""
    prompt = tokenizer.encode([f"<|im_start|>user\n{key}?<|im_end|>\n"], special=False)[0]

    def sample(answer: str, reward: float) -> Sample:
        own = tokenizer.encode([answer], special=False)[0]
        length, start = len(prompt) + len(own), len(prompt)
        middle = start + len(own) // 2
        return Sample(
            np.array([*prompt, *own]),
            np.linspace(0, -6, length, dtype=np.float32),
            (Segment(0, start, "prompt"), Segment(start, middle, "policy", step), Segment(middle, length, "policy", step + 1)),
            "stop" if reward else "length",
            {"exact": reward, "format": 0.5},
            reward,
            None if reward else "no answer found",
            turn_rewards=(reward,),
        )

    samples = tuple(sample(answer, reward) for answer, reward in answers.items())
    return Group(key, Prompt(f"p{key}", np.array(prompt), (), {"answer": "4"}), samples, step)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a bank: two sealed steps, one group waiting, one carried."""
    home = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer(str(write_tokenizer(home / "model")))
    with Bank(home / "bank", tokenizer=tokenizer.path) as bank:
        bank.append(said(tokenizer, "two and two", 0, {"the number is 4": 1.0, "the number\nis 5": 0.0}))
        bank.append(said(tokenizer, "one", 0, {"always 1": 1.0, "also 1": 1.0}))
        bank.seal(0, decode=tokenizer.decode)
        bank.append(said(tokenizer, "three", 1, {"perhaps 7": 0.0}))
        bank.seal(1)  # without texts
        bank.append(said(tokenizer, "four", 2, {"fröhlich 4 🙂": 1.0}))
        bank.carry(said(tokenizer, "five", 2, {"not yet": 0.0})).result()
    return home


def test_show_prints_texts_rewards_versions_and_segments(home: Path) -> None:
    output = run("show", home, "--step", 0, "-n", 1).stdout
    assert "step 0  two and two  sample 0" in output
    assert "<|im_start|>user\ntwo and two?<|im_end|>\nthe number is 4" in output
    assert "reward 1  exact 1  format 0.5" in output and "versions 0-1" in output
    assert re.search(r"segments: \[0, (\d+)\) prompt  \[\1, (\d+)\) policy v0  \[\2, \d+\) policy v1", output)
    everything = run("show", home, "-n", 50).stdout
    assert [everything.count(place) for place in ("step 0  ", "step 1  ", "waiting  ", "carried  ")] == [4, 1, 1, 1]
    assert "fröhlich 4 🙂" in everything and "failed: no answer found" in everything
    ids = run("show", home, "--ids", "--group", "three").stdout
    assert re.search(r"^1 \d+ \d+ ", ids, re.M) and "three?" not in ids


def test_tokens_are_coloured_by_their_probability(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rl.cli import bank

    tokenizer = Tokenizer(str(home / "model"))
    cells: dict[str, Any] = {
        "tokens": np.array([5, 6, 7, 8, 9]),
        "log_probs": np.array([0, -0.01, -1.0, -9.0, 0], dtype=np.float32),
        "segments": [
            {"start": 0, "stop": 1, "author": "prompt"},
            {"start": 1, "stop": 4, "author": "policy"},
            {"start": 4, "stop": 5, "author": "environment"},
        ],
    }
    text = bank._coloured(cells, tokenizer)
    assert [str(span.style) for span in text.spans] == ["dim", "green", "yellow", "bold red", "blue"]
    assert text.plain == tokenizer.decode([5, 6, 7, 8, 9])


@pytest.mark.parametrize(
    ("options", "places"),
    [
        (["number"], ["step 0  two and two  sample 0", "step 0  two and two  sample 1"]),
        (["NUMBER.*5", "-i"], []),
        (["(?s)NUMBER.*5", "-i"], ["step 0  two and two  sample 1"]),
        (["two", "--prompts", "--max-reward", 0], ["step 0  two and two  sample 1"]),
        (["1|7|4", "--reward", "exact", "--min-reward", 0.5, "--max-reward", 1], 4),
        ([".", "--failed"], 3),
        ([".", "--finish", "length", "--step", 1], ["step 1  three  sample 0"]),
    ],
)
def test_grep_finds_by_text_and_reward(home: Path, options: list[object], places: list[str] | int) -> None:
    result = run("grep", home, *options)
    found = [line.split("  reward")[0] for line in result.stdout.splitlines() if "  reward " in line]
    if isinstance(places, int):
        assert len(found) == places, result.stdout
    else:
        assert found == places
    assert f"{len(found)} samples match" in result.stdout and result.exit_code == (0 if found else 1)
    counted = run("grep", home, *options, "-c").stdout
    assert counted.strip() == f"{len(found)} samples match"


def test_export_keeps_every_column(home: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    subprocess.run(["cp", "-r", home / "bank", bank], check=True)
    path = bank / "steps/step_00000001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("judge", [[float("nan")]]), path)
    assert "5 samples written" in run("export", bank, tmp_path / "all.jsonl").stdout
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [row["sealed_step"] for row in rows] == [0, 0, 0, 0, 1]
    assert rows[0]["response_text"] == "the number is 4" and rows[0]["prompt_fields"] == {"answer": "4"}
    assert rows[4]["judge"] is None and rows[4]["segments"][0] == {
        "start": 0, "stop": rows[4]["prompt_length"], "author": "prompt", "version": None, "turn": 0, "learned": True
    }  # fmt: skip
    run("export", bank, tmp_path / "good.parquet", "--min-reward", 1)
    good = pq.read_table(tmp_path / "good.parquet")
    assert good["reward"].to_pylist() == [1.0, 1.0, 1.0] and "judge" in good.column_names
    first = pq.read_table(bank / "steps/step_00000000.parquet")
    for name in ("tokens", "log_probs", "segments", "prompt_fields"):
        assert good[name].to_pylist() == [first[name].to_pylist()[row] for row in (0, 2, 3)]
    assert "routing" not in good.column_names
    run("export", bank, tmp_path / "step.parquet", "--step", 1, "--routing")
    assert "routing" in pq.read_table(tmp_path / "step.parquet").column_names


def test_stats_sums_every_step_up(home: Path) -> None:
    lines = [line.split() for line in run("stats", home / "bank").stdout.splitlines()]
    table = {" ".join(line[:2]) if line[0] == "step" else line[0]: line for line in lines if line}
    assert table["step 0"][2:9] == ["2", "4", "0.750", "0.433", "0.750", "0.500", "1"]
    assert table["step 1"][2:4] == ["1", "1"] and table["step 1"][8] == "1"
    assert table["step 0"][-6:] == ["stop", "3", "length", "1", "1", "0-1"]
    assert table["waiting"][1:4] == ["1", "1", "1.000"] and "carried" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere"], "nowhere is not a bank: there is no such folder. Give the folder of a bank"),
        (["show", "HOME", "--step", 7], "has no sealed step 7. It has 0, 1"),
        (["grep", "HOME", "("], "PATTERN = (: missing )"),
        (["show", "HOME", "--min-reward", 2, "--max-reward", 1], "--min-reward 2 is above --max-reward 1"),
        (["show", "HOME", "--reward", "exakt"], "--reward exakt: no sample has a component of this name. There is exact"),
        (["show", "HOME", "--tokenizer", "/nowhere"], "`bank show --ids` needs none"),
        (["export", "HOME", "out.csv"], "Use one of .jsonl, .parquet"),
        (["export", "HOME", "no/such/folder/out.jsonl"], "is not a folder"),
    ],
)
def test_errors_say_what_to_do(home: Path, arguments: list[object], message: str) -> None:
    result = run(*(home if argument == "HOME" else argument for argument in arguments))
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output


def test_a_bank_without_texts_or_tokenizer_says_so(tmp_path: Path) -> None:
    with Bank(tmp_path) as bank:
        bank.append(replace(made("a")))
        bank.seal(0)
    result = run("grep", tmp_path, "x")
    assert result.exit_code == 2 and "kept without its texts. Give the model's tokenizer with --tokenizer" in result.stderr
    assert "reward" in run("show", tmp_path).stdout


def test_looking_needs_no_torch(home: Path) -> None:
    program = (
        "import sys\nsys.modules['torch'] = None\nfrom megatron_rl.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
    )
    for arguments in (["grep", home, "is", "--step", "0"], ["stats", home], ["show", home]):
        done = subprocess.run(
            [sys.executable, "-c", program, "bank", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
