"""From the section `sampling:` of the settings to a strategy and its floor."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.rollout_settings import SamplingSettings
from megatron_rl.config.settings import Settings
from megatron_rl.rollout.chat import Chat
from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.collector import Plan
from megatron_rl.rollout.environment import Environment
from megatron_rl.rollout.strategies.base import Limits, Strategy
from megatron_rl.rollout.strategies.episodes import Episodes
from megatron_rl.rollout.strategies.grouped import Grouped
from megatron_rl.rollout.strategies.igrpo import Improved
from megatron_rl.rollout.strategies.turns import TurnGroups
from megatron_rl.types import Prompt

type Messages = Sequence[Mapping[str, str]]


def make_strategy(settings: SamplingSettings, chat: Chat) -> Strategy:
    """The strategy; what it cannot work with is found here, before a server is asked for anything."""
    size = settings.group_size
    match settings.strategy:
        case "grouped":
            return Grouped(size)
        case "igrpo":
            between = [{"role": "user", "content": settings.improve}]
            chat.after_answer(between)
            return Improved(size, settings.drafts, partial(_with_draft, chat, between))
        case "episodes":
            chat.after_answer([{"role": "tool", "content": ""}])
            return Episodes(size, _environment_of(settings), chat, settings.environment_weight)
        case "turn_groups":
            chat.after_answer([{"role": "tool", "content": ""}])
            return TurnGroups(size, _environment_of(settings), chat, settings.go_on_with)


def make_sampling(settings: Settings) -> Sampling:
    """How tokens are drawn: at the temperature that the policy scores at."""
    own = settings.sampling
    return Sampling(
        max_new_tokens=own.max_new_tokens,
        temperature=settings.policy.temperature,
        top_p=own.top_p,
        top_k=own.top_k or -1,
        min_p=own.min_p,
        min_new_tokens=own.min_new_tokens,
        stop_tokens=own.stop_token_ids,
        stop=own.stop,
    )


def make_limits(settings: Settings) -> Limits:
    own, batch = settings.sampling, settings.batch
    total = own.max_tokens or batch.max_sequence or batch.max_tokens
    return Limits(own.max_new_tokens, total, own.max_turns if own.environment is not None else 1)


def make_plan(settings: SamplingSettings) -> Plan:
    return Plan(
        groups=settings.groups,
        ahead=settings.ahead,
        dynamic=settings.dynamic,
        tries=settings.tries,
        partial=settings.partial,
        over_sampling=settings.over_sampling,
    )


def _with_draft(
    chat: Chat, between: Sequence[Mapping[str, str]], prompt: Prompt, draft: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The question, the draft as it was written, and what is asked of the next answer."""
    asked = np.array(chat.continuation(between, draft.tolist()), dtype=np.int64)
    return np.concatenate([prompt.tokens, draft, asked])


def _environment_of(settings: SamplingSettings) -> Callable[[], Environment]:
    """Makes environments; one is made now, so that what is wrong with it is known."""
    path = settings.environment or ""
    module, _, name = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"sampling.environment = {path}: {error}. Give it as package.module:Class, importable from here."
        ) from error
    make = partial(found, **settings.environment_options)
    try:
        made = make()
    except TypeError as error:
        raise SettingsError(f"sampling.environment_options: {name} cannot be made with them: {error}") from error
    if not isinstance(made, Environment):
        raise SettingsError(
            f"sampling.environment = {path}: not an environment. Derive it from megatron_rl.rollout.environment:Environment."
        )
    return make
