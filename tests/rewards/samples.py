"""Prompts and samples whose tokens are characters, so that no tokenizer is needed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rl.config.reward_settings import RewardPart, ScoringSettings
from megatron_rl.rewards.base import ComputedReward, Scored
from megatron_rl.rewards.model import RewardModel
from megatron_rl.rewards.registry import build, make
from megatron_rl.types import Prompt, Sample, Segment

QUESTION = "Q?"


def tokens(text: str) -> NDArray[np.int64]:
    return np.array([ord(letter) for letter in text], dtype=np.int64)


def decode(ids: NDArray[np.int64]) -> str:
    return "".join(map(chr, ids))


def prompt(**fields: Any) -> Prompt:
    messages = ({"role": "system", "content": "Be good."}, {"role": "user", "content": QUESTION})
    return Prompt("source/1", tokens(QUESTION), messages, fields)


def sample(*turns: str, learned: Sequence[bool] = (), environment: str = "") -> Sample:
    """An episode: the question, the policy's turns, and what the environment says between them."""
    text, segments = QUESTION, [Segment(0, len(QUESTION), "prompt")]
    for turn, said in enumerate(turns):
        if turn and environment:
            segments.append(Segment(len(text), len(text) + len(environment), "environment"))
            text += environment
        counts = learned[turn] if learned else True
        segments.append(Segment(len(text), len(text) + len(said), "policy", 1, turn, counts))
        text += said
    log_probs = np.zeros(len(text), dtype=np.float32)
    return Sample(tokens(text), log_probs, tuple(segments), "stop")


def computed(name: str, text: str, options: dict[str, Any] | None = None, **fields: Any) -> float:
    """What a reward that computes says, asked directly."""
    reward = make(name, options or {})
    assert isinstance(reward, ComputedReward)
    return reward.score(prompt(**fields), text, sample(text))


async def scored(
    parts: Sequence[dict[str, Any]], fields: dict[str, Any], *texts: str, scoring: ScoringSettings | None = None
) -> list[Scored]:
    """What responses are worth by a section `rewards:`."""
    components = build([RewardPart.model_validate(part) for part in parts])
    async with RewardModel(components, scoring or ScoringSettings(workers=1), decode) as model:
        return await model.score(prompt(**fields), [sample(text) for text in texts])
