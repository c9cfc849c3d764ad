"""A server without memory: given back while the trainer learns on the same GPUs, and taken again for the next responses.

SGLang does not tell whether a server sleeps, and a request, a second release or a second resume would end one. So it is written
where it outlives us: in the name of the server's weights (`replies.STATES`). Whoever comes next, after a run that died while
its servers slept, reads it there. On a CPU the server answers all of it as on a GPU, and keeps its memory.
"""

from typing import Literal, get_args

from megatron_rl.rollout import replies
from megatron_rl.rollout.connection import Connection
from megatron_rl.rollout.errors import ServerError, Unsettled

Memory = Literal["weights", "kv_cache", "cuda_graph"]

ALL: frozenset[Memory] = frozenset(get_args(Memory))


class Sleep:
    """Of one server, spoken to over its client's connection."""

    def __init__(self, connection: Connection) -> None:
        self.gone: frozenset[Memory] = frozenset()  # what the server has given back, as far as we know
        self._connection = connection

    async def begin(self) -> None:
        """Give all memory back. The server must be paused, and empty of requests."""
        if self.gone:
            raise ValueError(f"{self._connection.url} sleeps already; wake comes next")
        await self._call_weights(replies.UNSETTLED)
        await self._change("/release_memory_occupation", ALL)
        self.gone = ALL
        await self._call_weights(replies.ASLEEP)

    async def end(self, *memory: Memory) -> None:
        """Take memory again, all of it or what is named. Weights come back empty."""
        wanted = frozenset(memory) or self.gone
        if not wanted or not wanted <= self.gone:
            missing = ", ".join(sorted(wanted - self.gone)) or "any memory"
            raise ValueError(f"{self._connection.url} has not given back {missing}")
        if "weights" in wanted:
            if (state := await self._state()) != "asleep":
                raise ServerError(self._connection.url, "/model_info", f"it does not sleep any more: its weights are {state}")
            await self._call_weights(replies.UNSETTLED)
        await self._change("/resume_memory_occupation", wanted)
        self.gone -= wanted
        if "weights" in wanted:
            await self._call_weights(replies.UNFINISHED)

    async def find_out(self) -> None:
        """How somebody has left the server, perhaps we ourselves."""
        state = await self._state()
        if state == "unsettled":
            told = "it was left while it gave its memory back or took it, and nobody knows how far it came. Start it again"
            raise Unsettled(self._connection.url, "/model_info", told)
        if state == "asleep":
            self.gone = ALL
        elif self.gone == ALL:
            self.gone = frozenset()  # somebody has started it anew

    async def _state(self) -> replies.State:
        reply = await self._connection.ask("/model_info")
        with self._connection.trusting("/model_info"):
            return replies.read_model_info(reply).state

    async def _call_weights(self, name: str) -> None:
        body = {"new_version": name, "abort_all_requests": False}
        await self._connection.tell("/update_weight_version", body, self._connection.patience.answer)

    async def _change(self, endpoint: str, memory: frozenset[Memory]) -> None:
        await self._connection.tell(endpoint, {"tags": sorted(memory)}, self._connection.patience.update)
