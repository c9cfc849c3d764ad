"""One server, spoken to over HTTP. Nothing else in the package knows SGLang's endpoints.

What would kill a server cannot be said here. Measured on SGLang 0.5.17, each of these ends the scheduler process:
tokens outside the vocabulary (so the client knows its size); an update of the weights that flushes the cache while requests
are queued (so updates never flush: `flush_cache` is a call of its own, which a busy server refuses); tensors that name another
process's memory (so tensors travel by value); an update over a group that the server has not joined (so joining comes first);
memory released while requests run, or resumed when it was not released (so `sleep` empties the server first, `wake` asks it).
"""

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from megatron_rl.rollout import replies
from megatron_rl.rollout.connection import Connection, Key, Patience
from megatron_rl.rollout.errors import Refused, TimedOut
from megatron_rl.rollout.replies import Generation, ModelInfo, Piece, RoutingShape, ServerInfo, StreamReader
from megatron_rl.rollout.sleep import Memory, Sleep

if TYPE_CHECKING:
    from torch import Tensor

type PauseMode = Literal["abort", "retract", "in_place"]

EMPTYING = 10.0  # seconds in which a server that is paused must be done with its last requests


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Log-probs are those of softmax(logits / temperature), before top-p, top-k and min-p cut it."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy; log-probs are then those of temperature 1
    top_p: float = 1.0
    top_k: int = -1  # -1: all
    min_p: float = 0.0
    min_new_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()  # besides those of the model's generation config
    stop: tuple[str, ...] = ()  # texts; their tokens stay in the response
    ignore_end: bool = False  # go on past every stop token
    seed: int | None = None  # heeded by servers with sglang.enable_deterministic_inference alone
    piece: int = 128  # tokens to a piece of the stream: what a server that dies costs at most

    def request(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "min_new_tokens": self.min_new_tokens,
            "stop_token_ids": list(self.stop_tokens) or None,
            "stop": list(self.stop) or None,
            "no_stop_trim": True,
            "ignore_eos": self.ignore_end,
            "sampling_seed": self.seed,
            "stream_interval": self.piece,
            "skip_special_tokens": False,
        }


class Client:
    """Speaks to the server at `url`. Use it as a context, or `close` it."""

    def __init__(self, url: str, vocabulary: int, api_key: Key = None, patience: Patience | None = None) -> None:
        self.vocabulary = vocabulary
        self.patience = patience or Patience()
        self._connection = Connection(url, api_key, self.patience)
        self._sleep = Sleep(self._connection)
        self._groups: set[str] = set()

    @property
    def url(self) -> str:
        return self._connection.url

    @property
    def asleep(self) -> frozenset[Memory]:
        """What memory the server has given back, as far as we know."""
        return self._sleep.gone

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._connection.close()

    # Sampling and scoring.

    async def generate(
        self,
        prompt: Sequence[int] | NDArray[np.int64],
        sampling: Sampling,
        *,
        request: str | None = None,
        routing: RoutingShape | None = None,
        cache_key: str | None = None,
    ) -> Generation:
        """One response, whole. See `stream`."""
        stream = self.stream(prompt, sampling, request=request, routing=routing, cache_key=cache_key)
        return replies.gather([piece async for piece in stream])

    async def stream(
        self,
        prompt: Sequence[int] | NDArray[np.int64],
        sampling: Sampling,
        *,
        request: str | None = None,
        routing: RoutingShape | None = None,
        cache_key: str | None = None,
    ) -> AsyncGenerator[Piece]:
        """One response as it is made: what came is ours, also when the server dies before the rest.

        `request` is an id of ours to abort it by (from `new_request`); requests of different `cache_key` share no prefix cache,
        so that responses of new weights never read keys and values of old ones. Leaving the stream early aborts the request.
        """
        tokens, name = self._checked(prompt), request or new_request()
        body = {
            "input_ids": tokens,
            "sampling_params": sampling.request(),
            "rid": name,
            "stream": True,
            "return_logprob": True,
            "return_routed_experts": routing is not None,
            "extra_key": cache_key,
        }
        reader = StreamReader(name, len(tokens), sampling.max_new_tokens, self.vocabulary, routing)
        async with aclosing(self._connection.events("/generate", body)) as events:
            async for event in events:
                with self._connection.trusting("/generate"):
                    piece = reader.read(event)
                yield piece
                if piece.finish is not None:
                    return
        with self._connection.trusting("/generate"):
            raise replies.Untrusted("the stream ended before the response did")

    async def score(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """[tokens] log-probs of given tokens at temperature 1 (a server scales only what it samples); 0 for the first."""
        given = self._checked(tokens)
        body = {
            "input_ids": given,
            "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "rid": new_request(),
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        reply = await self._connection.call("/generate", body, self.patience.silence)
        with self._connection.trusting("/generate"):
            return replies.read_score(reply, given, self.vocabulary)

    async def abort(self, request: str) -> None:
        """End a request; its stream finishes with what there is. One that has ended, or never was, is passed over."""
        await self._connection.tell("/abort_request", {"rid": request}, self.patience.answer)

    async def abort_all(self) -> None:
        """End every request, whoever made it."""
        await self._connection.tell("/abort_request", {"abort_all": True}, self.patience.answer)

    # Control: not repeated by anybody, since a call that got no answer may have been carried out.

    async def pause(self, mode: PauseMode) -> None:
        """Stop generating; new requests wait until `resume`.

        `abort` ends all requests with what they have and leaves the server empty; `retract` puts them back in the queue and
        `in_place` freezes them where they are. Responses that go on after an update read keys and values of the old weights:
        all of them with `in_place`, those that the prefix cache still has with `retract`. Only `abort` mixes nothing.
        """
        self._connection.hold()
        try:
            await self._connection.call("/pause_generation", {"mode": mode}, self.patience.update)
            if mode != "abort":
                await self.server_info()  # the scheduler answers it after it has paused; a pause is answered before
        except BaseException:
            self._connection.release()
            raise

    async def resume(self) -> None:
        """Generate again. A server that sleeps, in part or wholly, would end over it: `wake` comes first."""
        if self.asleep:
            raise ValueError(f"{self.url} sleeps: it has given back {', '.join(sorted(self.asleep))}")
        await self._connection.call("/continue_generation", {}, self.patience.answer)
        self._connection.release()

    async def update_from_disk(self, path: str, version: int) -> None:
        """Load the weights of a checkpoint folder that the server sees under this path.

        Named as files of a checkpoint: a server that was started with random weights looks else for more of those, and fails.
        """
        body = {"model_path": path, "load_format": "auto"}
        await self._update("/update_weights_from_disk", body, version)

    async def update_from_tensors(self, tensors: Mapping[str, "Tensor"], version: int, tensor_parallel: int = 1) -> None:
        """Send weights by value, under their Hugging Face names. Each tensor-parallel rank gets all and takes its part."""
        from megatron_rl.rollout.by_value import by_value  # torch: seconds that other calls need not wait

        packed = by_value(tensors)
        await self._update("/update_weights_from_tensor", {"serialized_named_tensors": [packed] * tensor_parallel}, version)

    async def update_from_handles(self, handles: Sequence[str], version: int) -> None:
        """Take a flattened bucket from the memory of GPUs that the server shares with us: a handle for each of its ranks.

        `weights.publish.transports.gpu_handle` makes them, of GPU memory alone: a handle of anything else ends the server.
        """
        body = {"serialized_named_tensors": list(handles), "load_format": "flattened_bucket"}
        await self._update("/update_weights_from_tensor", body, version)

    async def update_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group: str,
        version: int,
        bucket: bool = False,
    ) -> None:
        """Receive weights that rank 0 of the group broadcasts, one by one in this order, or flattened into one bucket."""
        if not len(names) == len(dtypes) == len(shapes):
            raise ValueError(f"{len(names)} names, {len(dtypes)} dtypes, {len(shapes)} shapes: one of each for every tensor")
        if group not in self._groups:
            raise ValueError(f"{self.url} has not joined the group {group} through this client; join_group comes first")
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group,
            "load_format": "flattened_bucket" if bucket else None,
        }
        await self._update("/update_weights_from_distributed", body, version)

    async def join_group(
        self, group: str, address: str, port: int, rank: int, world_size: int, backend: Literal["gloo", "nccl"]
    ) -> None:
        """Become ranks `rank` … of a process group over which weights come; returns when all have joined."""
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank,
            "world_size": world_size,
            "group_name": group,
            "backend": backend,
        }
        await self._succeed("/init_weights_update_group", body)
        self._groups.add(group)

    async def leave_group(self, group: str) -> None:
        """The end of that group on the server."""
        self._groups.discard(group)
        await self._succeed("/destroy_weights_update_group", {"group_name": group})

    async def set_version(self, version: int) -> None:
        """Name the weights that the server has; its requests go on."""
        await self._succeed("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    async def flush_cache(self) -> None:
        """Drop all cached prefixes. A server with requests running or queued refuses, also while it is paused."""
        await self._connection.tell("/flush_cache", None, self.patience.answer)

    # Sleep, see sleep.py.

    async def sleep(self) -> None:
        """End all requests, then give all memory back. New requests wait; weights, keys and values are lost."""
        await self.pause("abort")
        await self._emptied()
        await self._sleep.begin()

    async def wake(self, *memory: Memory) -> None:
        """Take memory again, all of it or what is named. Weights come back empty: update them, then `resume`.

        Only for servers that end with us may it be one after the other: who finds a server that has been given new weights, and
        not yet its cache, takes it for a whole one.
        """
        await self._sleep.end(*memory)

    async def rouse(self) -> None:
        """Have it generate again, however somebody has left it: paused, or asleep. `model_info` says what its weights are."""
        await self._sleep.find_out()
        if self.asleep:
            await self.wake()
        await self.resume()

    # Questions: safe to ask again.

    async def healthy(self) -> bool:
        """Whether the server generates: it is asked for a token, unless it is busy making some."""
        return await self._connection.status("/health_generate") == HTTPStatus.OK

    async def model_info(self) -> ModelInfo:
        reply = await self._connection.ask("/model_info")
        with self._connection.trusting("/model_info"):
            return replies.read_model_info(reply)

    async def behind(self) -> tuple[str, ...] | None:
        """The servers behind this one, if it is a router that tells; None if it is a server, or another kind of router."""
        try:
            reply = await self._connection.ask("/workers")
        except Refused as refused:
            if refused.status == HTTPStatus.NOT_FOUND:
                return None
            raise
        with self._connection.trusting("/workers"):
            return replies.read_workers(reply)

    async def vocabulary_size(self) -> int:
        """How many tokens the server's model has. It tells when it refuses a bias for a token that no model has."""
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "logit_bias": {str(2**31 - 1): 0.0}}}
        try:
            await self._connection.call("/generate", body, self.patience.answer)
        except Refused as refused:
            told = re.search(r"keys in \[0, (\d+)\]", refused.what)
            if told:
                return int(told[1]) + 1
        with self._connection.trusting("/generate"):
            raise replies.Untrusted("it did not tell the size of its vocabulary")

    async def server_info(self) -> ServerInfo:
        reply = await self._connection.ask("/server_info")
        with self._connection.trusting("/server_info"):
            return replies.read_server_info(reply)

    async def checksums(self) -> list[dict[str, str]] | None:
        """For each tensor-parallel rank the checksums of its tensors by SGLang's names; None where it computes none (a CPU)."""
        try:
            reply = await self._connection.call("/weights_checker", {"action": "checksum"}, self.patience.update)
        except Refused:
            return None
        with self._connection.trusting("/weights_checker"):
            return replies.read_checksums(reply)

    async def _emptied(self) -> None:
        """A paused server is done with its last requests a moment after they have ended: until then it refuses to flush."""
        deadline = asyncio.get_running_loop().time() + EMPTYING
        while True:
            try:
                return await self.flush_cache()
            except Refused as refused:
                if asyncio.get_running_loop().time() > deadline:
                    raise TimedOut(self.url, refused.endpoint, f"still not empty: {refused.what}") from refused
                await asyncio.sleep(0.05)

    async def _update(self, endpoint: str, body: Mapping[str, Any], version: int) -> None:
        """Weights, whichever way they come. Never with a flush: a queue that is not empty would end the server."""
        await self._succeed(endpoint, {**body, "weight_version": str(version), "flush_cache": False})

    async def _succeed(self, endpoint: str, body: Mapping[str, Any]) -> None:
        reply = await self._connection.call(endpoint, body, self.patience.update)
        with self._connection.trusting(endpoint):
            if not replies.member(reply, "success", bool):
                raise Refused(self.url, endpoint, replies.member(reply, "message", str), HTTPStatus.BAD_REQUEST)

    def _checked(self, tokens: Sequence[int] | NDArray[np.int64]) -> list[int]:
        """Tokens that the server survives: at least one, all of the vocabulary."""
        given = [int(token) for token in tokens]
        wrong = next((token for token in given if not 0 <= token < self.vocabulary), None)
        if not given:
            raise ValueError("there are no tokens to continue; a prompt needs at least one")
        if wrong is not None:
            raise ValueError(f"token {wrong} is not in the vocabulary of {self.vocabulary}; it would end the server")
        return given


def new_request() -> str:
    """An id for a request. All have one length: a server takes an id for the beginning of those to abort."""
    return uuid.uuid4().hex
