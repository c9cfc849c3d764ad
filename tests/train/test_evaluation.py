"""Evaluation on a real server: what is told is what the kept responses say, by sampling settings of its own."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.families import read_architecture
from megatron_rl.config.learning_settings import EvaluationSettings
from megatron_rl.config.reward_settings import RewardPart
from megatron_rl.config.settings import Settings
from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.rewards import registry
from megatron_rl.rewards.base import TellsAnswer
from megatron_rl.rewards.model import RewardModel
from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.errors import Refused
from megatron_rl.rollout.replies import Generation
from megatron_rl.train.evaluation import EvaluationFailed, open_alone, open_evaluator
from megatron_rl.train.held_out import HeldOut
from tests.reference.tiny_checkpoint import END
from tests.servers import VOCABULARY, Address, TinyServer

SAMPLES = 4


def sections(server: TinyServer, folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / "held.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{row} + 1", "answer": str(row + 1)}) + "\n" for row in range(7)))
    return {
        "policy": {"init": str(server.model)},
        "precision": {"dtype": "float32"},
        "batch": {"max_tokens": 400},
        "data": {
            "sources": [{"path": "task:digits", "options": {"rows": 60}}],
            "validation_share": 0.1,
            "validation_sources": [{"path": str(path), "name": "a/b", "answer": "answer"}],
        },
        # A random model is never right: what counts as right here is a response of at most 6 tokens.
        "rewards": [{"name": "length", "options": {"high": 6, "fade": 6}}, {"name": "numeric", "weight": 0.0}],
        "evaluation": {"samples": SAMPLES, "prompts": 5, "max_new_tokens": 9, "temperature": 1.5},
        "servers": {"urls": [server.server.url]},
        "run": {"directory": str(folder / "run")},
        **changes,
    }


def evaluated(given: dict[str, Any], step: int | None) -> dict[str, float]:
    settings = Settings.model_validate(given)

    async def run() -> dict[str, float]:
        async with open_alone(settings, read_architecture(settings.policy.config)) as evaluator:
            told: list[tuple[int, int]] = []
            metrics = await evaluator.evaluate(step, lambda done, total: told.append((done, total)))
            assert told == [(done, 10) for done in range(1, 11)]
            return metrics

    return asyncio.run(run())


def test_what_is_told_is_what_the_kept_responses_say(tiny_server: TinyServer, tmp_path: Path) -> None:
    metrics = evaluated(sections(tiny_server, tmp_path), 10)
    tokenizer = Tokenizer(str(tiny_server.model))
    folder = tmp_path / "run" / "evaluations"
    assert sorted(path.name for path in folder.iterdir()) == ["a-b-step-000010.parquet", "digits-step-000010.parquet"]
    assert {name.partition("/")[0] for name in metrics} == {"digits", "a"}
    for name, file in (("digits", "digits"), ("a/b", "a-b")):
        rows = pq.read_table(folder / f"{file}-step-000010.parquet").to_pylist()
        assert len(rows) == 5 and len({row["key"] for row in rows}) == 5 and all(row["step"] == 10 for row in rows)
        lengths = np.array([[len(tokens) for tokens in row["tokens"]] for row in rows])  # [prompts, samples]
        assert lengths.shape == (5, SAMPLES) and lengths.max() <= 9
        right = np.array([row["right"] for row in rows])
        assert (right == (lengths <= 6)).all()
        rewards = np.clip(1 - (lengths - 6) / 6, 0, 1)
        np.testing.assert_allclose([row["reward"] for row in rows], rewards)
        stopped = np.array([[finish == "stop" for finish in row["finish"]] for row in rows])
        expected = {
            "avg@4": right.mean(),
            "pass@1": right.mean(),
            "pass@4": right.any(axis=1).mean(),
            "reward": rewards.mean(),
            "reward/length": rewards.mean(),
            "length": lengths.mean(),
            "truncated": 1 - stopped.mean(),
            "failed": 0.0,
        }
        found = {metric.removeprefix(f"{name}/"): value for metric, value in metrics.items() if metric.startswith(f"{name}/")}
        assert found.keys() == {*expected, "pass@2", "maj@4", "reward/numeric"}
        for metric, value in expected.items():
            assert found[metric] == pytest.approx(value), metric
        for row in rows:
            assert row["responses"] == [tokenizer.text(tokens) for tokens in row["tokens"]]
            assert tokenizer.decode(row["prompt_tokens"]).count(row["prompt"]) == 1
            assert "answer" in json.loads(row["fields"])


def test_the_command_prints_a_table_and_greedy_responses_are_all_the_same(tiny_server: TinyServer, tmp_path: Path) -> None:
    greedy = {"prompts": 3, "max_new_tokens": 5, "temperature": 0}
    rewards = [{"name": "length", "options": {"high": 6}}]
    ends = {"stop_token_ids": list(range(1, VOCABULARY, 2))}  # as in training; the model's own end is rare
    given = sections(tiny_server, tmp_path, evaluation=greedy, rewards=rewards, sampling=ends)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "recipe.yaml"), "--samples", "2"])
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if line.split()}
    assert lines["avg@2"] == lines["pass@2"] == ["1.000", "1.000"]
    assert "no maj@n: none of the rewards can tell which answer a response gives" in result.output
    for row in pq.read_table(tmp_path / "run" / "evaluations" / "digits.parquet").to_pylist():
        assert row["tokens"][0] == row["tokens"][1] and row["step"] is None
        for tokens, finish in zip(row["tokens"], row["finish"], strict=True):
            assert all(token % 2 == 0 and token != END for token in tokens[:-1])
            assert (finish == "stop") == (tokens[-1] % 2 == 1 or tokens[-1] == END)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": []}, "rewards: there are none"),
        ({"rewards": [{"name": "code"}]}, "reads the column"),
        ({"data": {"sources": [{"path": "task:digits"}]}}, "there are no sources of validation prompts"),
        ({"servers": {"urls": ["http://127.0.0.1:9"]}}, "Correct servers.urls"),
        ({"servers": {}, "policy": {"config": "MODEL"}}, "there is no model to evaluate"),
        ({"servers": {}, "policy": {"config": "MODEL", "init": "RUN"}}, "megatron-rl convert"),
    ],
)
def test_wrong_settings_end_with_a_message(
    tiny_models: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """No server is asked, or started: what is wrong is known before."""
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "manifest.json").write_text("{}")
    places = {"MODEL": str(tiny_models[0]), "RUN": str(tmp_path / "step_00000001")}
    changes = {
        name: {key: places.get(str(value), value) for key, value in section.items()} if name == "policy" else section
        for name, section in changes.items()
    }
    nowhere = TinyServer(Address("http://127.0.0.1:9"), *tiny_models)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections(nowhere, tmp_path, **changes)))
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.output


class Refusing:
    """A pool whose servers refuse what they are asked."""

    async def generate(self, tokens: NDArray[np.int64], sampling: Sampling, *, group: str) -> Generation:
        raise Refused("http://node7:30000", "/generate", "the prompt is too long", 400)

    async def interrupt(self) -> None:
        raise AssertionError("nobody interrupts an evaluation")


def test_servers_that_refuse_end_it_with_a_message(tiny_models: tuple[Path, Path], tmp_path: Path) -> None:
    given = sections(TinyServer(Address("http://127.0.0.1:9"), *tiny_models), tmp_path)
    settings = Settings.model_validate(given)
    model, tokenizer = read_architecture(tiny_models[0]), Tokenizer(str(tiny_models[0]))
    rewards = RewardModel(registry.build(settings.rewards), settings.scoring, lambda ids: tokenizer.text(ids.tolist()))
    evaluator = open_evaluator(settings, model, Refusing(), rewards, tokenizer)
    with pytest.raises(EvaluationFailed, match="digits could not be evaluated: http://node7:30000/generate: the prompt is too"):
        asyncio.run(evaluator.evaluate(0))
    assert not (tmp_path / "run" / "evaluations").exists()


def answers(part: dict[str, Any], texts: Sequence[str]) -> list[str | None]:
    (component,) = registry.build([RewardPart.model_validate(part)])
    assert isinstance(component.reward, TellsAnswer)
    return [component.reward.answer(text) for text in texts]


def test_answers_that_are_equal_are_equal_votes() -> None:
    assert answers({"name": "numeric"}, ["so 1,200", "it is 1200.0", "none"]) == ["1200", "1200", None]
    exact = {"name": "exact", "options": {"after": ":", "ignore_case": True}}
    assert answers(exact, ["x: Yes ", "y:  yes", "yes"]) == ["yes", "yes", None]
    one, two, three = answers({"name": "set_f1"}, ["[b, a]", "a,b", "a"])
    assert one == two != three
    assert answers({"name": "math"}, [r"\boxed{ 7 }", r"first \boxed{1}, no: \boxed{7}", "7", ""]) == ["7", "7", "7", None]
    assert answers({"name": "math", "options": {"boxed": True}}, ["7"]) == [None]
    (length,) = registry.build([RewardPart(name="length", options={"high": 3})])
    assert not isinstance(length.reward, TellsAnswer)


class ToldToStop:
    """Rollouts of a run that is told to stop whenever it waits."""

    def attend(self, work: object) -> None:
        return


def test_a_run_that_is_told_to_stop_before_it_can_evaluate_does_not() -> None:
    rollouts: Any = ToldToStop()
    nothing: Any = None
    assert HeldOut(nothing, nothing, rollouts).run(0) == ()


def test_when_it_is_time() -> None:
    assert [step for step in range(26) if EvaluationSettings(every=10).due(step, 25)] == [0, 10, 20, 25]
    assert not any(EvaluationSettings().due(step, 25) for step in range(26))
