"""A policy's weights on their way to servers: what ties the policy, the publisher and the client together."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_rl.policy.policy import Policy
from megatron_rl.policy.slices import model_slices
from megatron_rl.types import Sequence as TokenSequence
from megatron_rl.weights.boxes import Slice
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.publish.live import LiveWeights
from megatron_rl.weights.publish.ports import Connect
from megatron_rl.weights.publish.probe import Scores
from megatron_rl.weights.publish.publisher import Publisher


def open_publisher(policy: Policy, connect: Connect, served: Path | None = None) -> Publisher:
    """What publishes a policy's weights, under any layout. Every rank opens it.

    `connect` opens a client for a server's URL: `lambda url: Client(url, policy.architecture.vocab, api_key)`. `served` is the
    folder of the model that the servers were started with, whose config.json says what they take in FP8.
    """
    layout, settings = policy.layout, policy.settings

    def finished_slices() -> Iterator[Slice]:
        policy.optimizer.gather_weights()
        return model_slices(policy.model, layout)

    weight_map = WeightMap(policy.architecture)
    weights = LiveWeights(
        weight_map,
        settings.layout,
        layout.world_size,
        finished_slices,
        policy.model.config.params_dtype,
        layout.device.torch_device,
    )
    machines = -(-layout.world_size // layout.launch.local_world_size)
    return Publisher(weights, settings.publish, connect, layout, lambda sequences: score(policy, sequences), machines=machines)


def score(policy: Policy, sequences: Sequence[Sequence[int]]) -> Scores:
    """Log-probs of given tokens at temperature 1, token-aligned, the same on every rank."""
    given = [
        TokenSequence(index, np.asarray(tokens, np.int64), np.zeros(len(tokens), np.bool_))
        for index, tokens in enumerate(sequences)
    ]
    packs = policy.pack(given)
    values = policy.log_probs(packs, everywhere=True, temperature=1.0)
    own = policy.per_sequence(packs, [each.log_probs for each in values])
    found = {index: array for each in policy.layout.everyone_has(own) for index, array in each.items()}
    return [found[index] for index in range(len(given))]
