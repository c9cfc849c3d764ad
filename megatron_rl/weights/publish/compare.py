"""Which weights of a server differ from given ones: each is sent again, and those that change what the server says differed.

No server tells its tensors' checksums on a CPU, and on a GPU they are those of SGLang's fused tensors. Sending works
everywhere, and what was found is mended on the way: afterwards the server has the given weights.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.publish.crew import Crew
from megatron_rl.weights.publish.errors import PublishError
from megatron_rl.weights.publish.gate import OwnGate
from megatron_rl.weights.publish.plan import families, plan_stream, units
from megatron_rl.weights.publish.ports import Server
from megatron_rl.weights.publish.probe import Scores, difference, server_scores
from megatron_rl.weights.publish.protocol import Delivery
from megatron_rl.weights.publish.publisher import Publisher
from megatron_rl.weights.publish.stream import send_stream
from megatron_rl.weights.publish.transports import Broadcast, ByValue

LARGE = 2 * 2**30  # bytes of weights that are too many to go by value
MOST_PARTS = 512  # sendings, each with a look at the scores: beyond them tensors are sent together
LOOKS = 3  # at the same weights, whose differences are noise
ABOVE_NOISE = 4.0  # times the largest of those
_NUMBER = re.compile(r"\.(\d+)(?=\.)")


@dataclass(frozen=True)
class Part:
    """Tensors that were sent together."""

    names: tuple[str, ...]
    change: float  # mean |difference| of the scores that sending made, of the sequence that changed most
    differed: bool

    @property
    def title(self) -> str:
        """The tensor, or what all of them are called."""
        return self.names[0] if len(self.names) == 1 else f"{_NUMBER.sub('.*', self.names[0])} ({len(self.names)} tensors)"


def parts(weight_map: WeightMap, most: int = MOST_PARTS) -> list[tuple[str, ...]]:
    """What is sent at once: one tensor each, if that is not too much; else one kind's of a layer; else one kind's of all."""
    for numbers in (None, 1, 0):  # of a name that tell parts apart: all of them, the layer's, none
        found: dict[tuple[str, ...], list[str]] = {}
        for kind, names in families(weight_map).items():
            for name in names:
                found.setdefault((kind, *_NUMBER.findall(name)[:numbers]), []).append(name)
        if len(found) <= most:
            break
    return [tuple(names) for names in found.values()]


async def compare(
    publisher: Publisher,
    server: Server,
    sequences: Sequence[Sequence[int]],
    version: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
    most: int = MOST_PARTS,
) -> list[Part]:
    """Send all weights of a publisher of one rank, part by part, and score the sequences after each.

    The server pauses for a moment each time; its weights are called `version` from the first part on.
    """
    weights = publisher.weights
    crew = Crew(weights, publisher.wire, publisher.ranks, lambda done, total: None)
    facts = await server.server_info()
    delivery = Delivery(server, facts.tensor_parallel, publisher.pause, publisher.seconds)
    before, *others = [await server_scores(server, sequences) for _ in range(LOOKS)]
    noise = max(difference(before, other) for other in others)
    found: list[Part] = []
    todo = parts(weights.weight_map, most)
    try:
        for number, names in enumerate(todo):
            plan = plan_stream(units(weights.weight_map, weights.dtype, names), publisher.settings.bucket_bytes, [0])
            transport = ByValue() if publisher.bytes < LARGE else Broadcast(weights.device, publisher.seconds)
            await send_stream(crew, plan, transport, [delivery], OwnGate(version))
            after: list[Scores] = []
            await delivery.prove(partial(_score, delivery, sequences, after))
            if delivery.failure is not None:
                break
            change = difference(before, after[0])
            found.append(Part(names, change, change > ABOVE_NOISE * noise))
            before = after[0]
            tell(number + 1, len(todo))
        delivery.trust()
    finally:
        await delivery.settle()
    if delivery.failure is not None:
        raise PublishError(
            f"{server.url}: weights could not be compared: {delivery.failure}. Some of its weights may be new and others old: "
            "publish to it again, or start it anew."
        )
    return found


async def _score(delivery: Delivery, sequences: Sequence[Sequence[int]], found: list[Scores]) -> None:
    found.append(await server_scores(delivery.server, sequences))
