"""Strategies from settings; what is wrong with them is said before anything is sampled."""

import asyncio
import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rl.config.errors import DataError, SettingsError
from megatron_rl.config.rollout_settings import SamplingSettings
from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.rollout.chat import Chat
from megatron_rl.rollout.strategies.choose import make_strategy
from megatron_rl.rollout.strategies.igrpo import Improved
from megatron_rl.types import Prompt
from tests.reference.tiny_checkpoint import END, saved_tokenizer, tiny_tokenizer

CALCULATOR = "megatron_rl.rollout.environments.calculator:Calculator"


def chosen(**settings: Any) -> Any:
    return make_strategy(SamplingSettings(**settings), Chat(saved_tokenizer()))


def test_the_second_prompt_holds_the_draft_as_it_was_written() -> None:
    improved = chosen(strategy="igrpo", improve="Improve on it.")
    assert isinstance(improved, Improved)
    draft = np.array([300, 11, 42, END])  # not what the tokenizer would make of its own text
    second = improved.with_draft(Prompt("p", np.array([5, 6])), draft)
    assert second[:6].tolist() == [5, 6, *draft.tolist()]
    text = tiny_tokenizer().decode(second[6:])
    assert text == "\n<|im_start|>user\nImprove on it.<|im_end|>\n<|im_start|>assistant\n"


def test_environments_are_made_with_their_options() -> None:
    episodes = chosen(strategy="episodes", environment=CALCULATOR, environment_options={"role": "user", "call_reward": 0.5})
    first, second = episodes.make_environment(), episodes.make_environment()
    assert first is not second
    seen = asyncio.run(first.step("<calc>1+1</calc>"))
    assert (seen.messages[0]["role"], seen.reward) == ("user", 0.5)


@dataclass
class NoEnvironment:
    notes: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "episodes", "environment": "nowhere.at_all:Game"}, "No module named 'nowhere'"),
        ({"strategy": "episodes", "environment": CALCULATOR + "x"}, "has no attribute 'Calculatorx'"),
        ({"strategy": "turn_groups", "environment": "tests.rollout.test_choose:NoEnvironment"}, "Derive it from"),
        ({"strategy": "episodes", "environment": CALCULATOR, "environment_options": {"rôle": 1}}, "cannot be made with them"),
    ],
)
def test_wrong_environments_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        chosen(**settings)


def test_turns_need_a_chat_template(tmp_path: Path) -> None:
    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no chat template"):
        make_strategy(SamplingSettings(strategy="igrpo"), Chat(Tokenizer(str(tmp_path))))
