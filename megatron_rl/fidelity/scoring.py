"""What the policy says of the tokens: opened, asked, closed. Every rank calls it alike; the answers are the same on all."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_rl.config.settings import Settings
from megatron_rl.fidelity.server import Observation
from megatron_rl.fidelity.tokens import Drawn
from megatron_rl.policy.batch import local_indices
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.routing_replay import Routes
from megatron_rl.types import Pack
from megatron_rl.types import Sequence as TokenSequence

PADDING = 1024  # tokens, more than any layout pads a sequence by

type Routing = list[NDArray[np.int64]]  # of each sequence: [length, moe layers, top-k]


@dataclass(frozen=True)
class Ask:
    """One pass over the tokens."""

    temperature: float
    replay: bool = False  # the server's routing instead of its own


@dataclass(frozen=True)
class Answer:
    log_probs: list[NDArray[np.float32]]  # [length] of each sequence
    routes: Routing | None  # what its routers chose by themselves; None for a dense model, and where they were told


def score(
    settings: Settings, launch: Launch, observation: Observation | None, longest: int, asks: Sequence[Ask]
) -> tuple[Observation, list[Answer]]:
    """Open the policy of these settings, and ask it for the log-probs of what the main rank's server drew, once an ask.

    Every rank learns what was drawn, and stays with the others (`layout.together`). `longest`: tokens of the longest sequence.
    """
    policy = Policy.open(_with_room(settings, longest), launch)
    try:
        known: Observation = policy.layout.from_main(observation)
        sequences = [
            TokenSequence(index, each.tokens, np.zeros(len(each.tokens), np.bool_), routing=each.routing)
            for index, each in enumerate(known.drawn)
        ]
        packs = policy.pack(sequences)
        return known, [_answer(policy, packs, known.drawn, ask) for ask in asks]
    finally:
        policy.close(leave=False)


def _with_room(settings: Settings, longest: int) -> Settings:
    """Packs long enough for every sequence and its padding; how sequences are packed changes no log-prob."""
    room = max(settings.batch.max_tokens, longest + PADDING)
    batch = settings.batch.model_copy(update={"max_tokens": room, "max_sequence": None})
    return settings.model_copy(update={"batch": batch})


def _answer(policy: Policy, packs: list[Pack], drawn: Sequence[Drawn], ask: Ask) -> Answer:
    watched = policy.architecture.is_moe
    with ExitStack() as stack:
        given = policy.rollout_routes(packs) if ask.replay else None
        replay = stack.enter_context(policy.replaying(given, record=given is None)) if watched else None
        values = policy.log_probs(packs, everywhere=True, temperature=ask.temperature)
    own = policy.per_sequence(packs, [each.log_probs for each in values])
    found = {index: array for each in policy.layout.everyone_has(own) for index, array in each.items()}
    routes = _routing(policy, packs, replay.routes, drawn) if replay is not None and given is None else None
    return Answer([found[index] for index in range(len(drawn))], routes)


def _routing(policy: Policy, packs: Sequence[Pack], routes: Sequence[Routes], drawn: Sequence[Drawn]) -> Routing:
    """Every rank's positions and layers, put together by sequence."""
    pieces: list[tuple[int, int, NDArray[np.int64], NDArray[np.int64]]] = []  # sequence, layer, positions, experts
    for pack, own in zip(packs, routes, strict=True):
        flat = policy.layout.sequence_part(torch.from_numpy(local_indices(pack, policy.layout))).numpy()
        start = 0
        for sequence, padded in zip(pack.sequences, pack.padded_lengths, strict=False):
            here = np.flatnonzero((flat >= start) & (flat < start + sequence.length))
            for layer, experts in own.experts.items():
                pieces.append((sequence.index, layer, flat[here] - start, experts.numpy()[here].astype(np.int64)))
            start += padded
    model = policy.architecture
    assert model.experts is not None
    layers = {layer: place for place, layer in enumerate(np.flatnonzero(model.moe_layers).tolist())}
    found = [np.zeros((len(each.tokens), len(layers), model.experts.top_k), np.int64) for each in drawn]
    for index, layer, positions, experts in (piece for each in policy.layout.everyone_has(pieces) for piece in each):
        found[index][positions, layers[layer]] = experts
    return found
