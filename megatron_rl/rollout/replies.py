"""What servers answer, as types. Nothing a server says is believed before it was checked here."""

import base64
import binascii
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

type Finish = Literal["stop", "length", "abort"]
type State = Literal["whole", "unfinished", "asleep", "unsettled"]  # of a server's weights and memory
type Routing = NDArray[np.uint8] | NDArray[np.uint16]  # [positions, layers, chosen], experts by number

# Versions that are no version of a run: what others say of a server's weights, for whoever comes after them.
UNFINISHED = "-1"  # an update is under way, or was
ASLEEP = "asleep"  # all memory has been given back
UNSETTLED = "unsettled"  # memory is being given back or taken, or was when somebody died over it
STATES: Mapping[str, State] = {UNFINISHED: "unfinished", ASLEEP: "asleep", UNSETTLED: "unsettled"}

ROUNDING = 1e-3  # how far above 0 a log-probability may come out


class Untrusted(ValueError):
    """A reply that contradicts itself or what was asked; the client adds who said it."""


@dataclass(frozen=True)
class RoutingShape:
    """What a model's routing looks like: all its decoder layers, experts chosen per token, experts there are."""

    layers: int
    chosen: int
    experts: int


@dataclass(frozen=True)
class Span:
    """A run of tokens sampled under one version of the weights; None for a version that is not a number of ours."""

    version: int | None
    length: int


@dataclass(frozen=True)
class Piece:
    """What a stream has brought since the piece before. The last one has `finish` and, if asked for, the routing."""

    tokens: list[int]
    log_probs: list[float]  # of the tokens, under the sampling temperature
    version: int | None
    finish: Finish | None = None
    routing: Routing | None = None  # [prompt + tokens - 1, layers, chosen]
    cached: int = 0  # prompt tokens whose keys and values were there already


@dataclass(frozen=True)
class Generation:
    """A whole response."""

    tokens: NDArray[np.int64]  # [response]
    log_probs: NDArray[np.float32]  # [response], under the sampling temperature
    spans: tuple[Span, ...]  # they cover the response in order
    finish: Finish
    routing: Routing | None = None  # [prompt + response - 1, layers, chosen]
    cached: int = 0


@dataclass(frozen=True)
class ModelInfo:
    """Which model a server serves."""

    path: str
    version: int | None  # of the weights
    state: State
    family: str | None  # model_type of its config.json
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class ServerInfo:
    """What a server can do."""

    sglang: str
    model: str
    version: int | None  # of the weights
    state: State
    longest_input: int  # tokens of the longest prompt it takes
    pool_tokens: int  # tokens of all requests together whose keys and values it holds
    max_requests: int  # requests that it runs at once
    tensor_parallel: int
    returns_routing: bool
    deterministic: bool  # whether it heeds sampling seeds
    prefix_cache: bool
    dtype: str  # of weights and activations, as it was told: auto, float32, bfloat16 …
    quantization: str | None  # as it was told; a quantised checkpoint needs no telling
    overrides: Mapping[str, Any]  # what of its model's config.json it was told to read otherwise
    stride: int  # tokens that one step of its decoding adds to a response at most
    sleeps: bool  # whether it gives memory back when it is told to; on a CPU there is none to give, and it says that it did


class StreamReader:
    """Checks the events of one streamed generation and cuts them into pieces.

    A server streams what is new (`--incremental-streaming-output`) or everything so far; `completion_tokens` tells which.
    """

    def __init__(self, request: str, prompt: int, limit: int, vocabulary: int, shape: RoutingShape | None) -> None:
        self._request = request
        self._prompt = prompt
        self._limit = limit
        self._vocabulary = vocabulary
        self._shape = shape
        self._count = 0

    def read(self, event: Mapping[str, Any]) -> Piece:
        told = member(event, "meta_info", dict)
        if member(told, "id", str) != self._request:
            raise Untrusted(f"it answers request {told['id']}, not {self._request}")
        finish, version = _finish(told), version_number(member(told, "weight_version", str))
        if finish == "abort" and "prompt_tokens" not in told:
            # Ended while it waited in the queue, to be begun or to go on after a pause: such an answer counts no prompt, and
            # repeats a token that has been sent. What came before it stays, the rest was never sent.
            return Piece([], [], version, finish)
        if member(told, "prompt_tokens", int) != self._prompt:
            raise Untrusted(f"it counts {told['prompt_tokens']} prompt tokens of {self._prompt}")
        total = member(told, "completion_tokens", int)
        if total > self._limit:
            raise Untrusted(f"it generated {total} tokens of at most {self._limit}")
        tokens = self._new(member(event, "output_ids", list), total, "output_ids")
        log_probs = self._log_probs(self._new(member(told, "output_token_logprobs", list), total, "log-probs"), tokens)
        self._count = total
        return Piece(
            tokens,
            log_probs,
            version,
            finish,
            self._routing(told, finish) if finish is not None and self._shape is not None else None,
            member(told, "cached_tokens", int),
        )

    def _new(self, entries: list[Any], total: int, name: str) -> list[Any]:
        """The entries that were not there before, however the server streams."""
        if self._count + len(entries) == total:
            return entries
        if len(entries) == total:
            return entries[self._count :]
        raise Untrusted(f"it sent {len(entries)} {name} after {self._count}, and counts {total}")

    def _log_probs(self, entries: list[Any], tokens: list[Any]) -> list[float]:
        for token in tokens:
            if type(token) is not int or not 0 <= token < self._vocabulary:
                raise Untrusted(f"token {json.dumps(token)} is not in the vocabulary of {self._vocabulary}")
        if len(entries) != len(tokens):
            raise Untrusted(f"it sent {len(entries)} log-probs for {len(tokens)} tokens")
        return [_log_prob(entry, token) for entry, token in zip(entries, tokens, strict=True)]

    def _routing(self, told: Mapping[str, Any], finish: Finish) -> Routing | None:
        assert self._shape is not None
        encoded = told.get("routed_experts")
        if encoded is None and finish == "abort":
            return None  # aborted in the queue, where a paused server has put it back: nothing is kept there
        if not isinstance(encoded, str):
            raise Untrusted("it returned no routing. Start it with sglang.enable_return_routed_experts: true")
        return decode_routing(encoded, self._prompt + self._count - 1, self._shape)


def gather(pieces: Sequence[Piece]) -> Generation:
    """The pieces of a finished stream as a whole."""
    last = pieces[-1]
    assert last.finish is not None
    return Generation(
        tokens=np.array([token for piece in pieces for token in piece.tokens], dtype=np.int64),
        log_probs=np.array([value for piece in pieces for value in piece.log_probs], dtype=np.float32),
        spans=join_spans(Span(piece.version, len(piece.tokens)) for piece in pieces),
        finish=last.finish,
        routing=last.routing,
        cached=pieces[0].cached,
    )


def join_spans(spans: Iterable[Span], length: int | None = None) -> tuple[Span, ...]:
    """Neighbours of one version as one span, empty ones dropped; of the first `length` tokens, if given."""
    joined: list[Span] = []
    for span in spans:
        own = span.length if length is None else min(span.length, length - sum(each.length for each in joined))
        if joined and joined[-1].version == span.version:
            joined[-1] = Span(span.version, joined[-1].length + own)
        elif own:
            joined.append(Span(span.version, own))
    return tuple(joined)


def decode_routing(encoded: str, positions: int, shape: RoutingShape) -> Routing:
    """[positions, layers, chosen] expert numbers, from base64 of little-endian int32, in the smallest type that holds them."""
    try:
        numbers = np.frombuffer(base64.b64decode(encoded, validate=True), dtype="<i4")
    except (binascii.Error, ValueError) as error:
        raise Untrusted(f"its routing is not base64 of 32-bit numbers: {error}") from error
    if len(numbers) != positions * shape.layers * shape.chosen:
        raise Untrusted(
            f"its routing has {len(numbers)} numbers, not {positions} positions x {shape.layers} layers x {shape.chosen}"
        )
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= shape.experts):
        raise Untrusted(f"its routing names expert {numbers.min()} to {numbers.max()} of {shape.experts}")
    small = numbers.astype(np.uint8) if shape.experts <= 256 else numbers.astype(np.uint16)
    return small.reshape(positions, shape.layers, shape.chosen)


def read_score(reply: Mapping[str, Any], tokens: Sequence[int], vocabulary: int) -> NDArray[np.float32]:
    """[tokens] log-probs of given tokens; the first, which nothing stands before, has 0.

    SGLang 0.5.17 names the last token of the vocabulary 0 in what it says of given tokens; its log-prob is right.
    """
    entries = member(member(reply, "meta_info", dict), "input_token_logprobs", list)
    if len(entries) != len(tokens):
        raise Untrusted(f"it scored {len(entries)} tokens of {len(tokens)}")
    last = vocabulary - 1
    values = [
        _log_prob(entry, 0 if token == last and _names(entry, 0) else token)
        for entry, token in zip(entries[1:], tokens[1:], strict=True)
    ]
    return np.array([0.0, *values], dtype=np.float32)


def read_model_info(reply: Mapping[str, Any]) -> ModelInfo:
    architectures = reply.get("architectures") or []
    family = reply.get("model_type")
    return ModelInfo(
        path=member(reply, "model_path", str),
        version=version_number(member(reply, "weight_version", str)),
        state=_state(reply),
        family=family if isinstance(family, str) else None,
        architectures=tuple(map(str, architectures)),
    )


def read_server_info(reply: Mapping[str, Any]) -> ServerInfo:
    states = member(reply, "internal_states", list)
    if not states or not isinstance(states[0], dict):
        raise Untrusted("internal_states is empty")
    return ServerInfo(
        sglang=member(reply, "version", str),
        model=member(reply, "model_path", str),
        version=version_number(member(reply, "weight_version", str)),
        state=_state(reply),
        longest_input=member(reply, "max_req_input_len", int),
        pool_tokens=member(reply, "max_total_num_tokens", int) * len(states),
        max_requests=member(states[0], "effective_max_running_requests_per_dp", int) * len(states),
        tensor_parallel=member(reply, "tp_size", int),
        returns_routing=member(reply, "enable_return_routed_experts", bool),
        deterministic=member(reply, "enable_deterministic_inference", bool),
        prefix_cache=not member(reply, "disable_radix_cache", bool),
        dtype=member(reply, "dtype", str),
        quantization=reply.get("quantization"),
        overrides=_overrides(reply),
        stride=max(1, reply.get("speculative_num_draft_tokens") or 1),
        sleeps=member(reply, "enable_memory_saver", bool) or member(reply, "device", str) == "cpu",
    )


def read_checksums(reply: Mapping[str, Any]) -> list[dict[str, str]]:
    ranks = member(reply, "ranks", list)
    if not all(isinstance(rank, dict) for rank in ranks):
        raise Untrusted("ranks is not a list of mappings")
    return [{name: str(value) for name, value in member(rank, "checksums", dict).items()} for rank in ranks]


def read_workers(reply: Mapping[str, Any]) -> tuple[str, ...]:
    workers = member(reply, "workers", list)
    if not all(isinstance(worker, dict) for worker in workers):
        raise Untrusted("workers is not a list of mappings")
    return tuple(member(worker, "url", str).rstrip("/") for worker in workers)


def member[T](reply: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """A field that must be there and of its kind."""
    if name not in reply:
        raise Untrusted(f"{name} is missing")
    value = reply[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Untrusted(f"{name} is {json.dumps(value)[:100]}, not of type {kind.__name__}")
    return value


def version_number(text: str) -> int | None:
    """Our versions are numbers; a server that was never updated may call its weights anything."""
    return int(text) if text.isdecimal() else None


def _state(reply: Mapping[str, Any]) -> State:
    return STATES.get(member(reply, "weight_version", str), "whole")


def _overrides(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        found = json.loads(reply.get("json_model_override_args") or "{}")
    except (TypeError, ValueError) as error:
        raise Untrusted(f"json_model_override_args is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Untrusted("json_model_override_args is no mapping")
    return found


def _finish(told: Mapping[str, Any]) -> Finish | None:
    reason = told.get("finish_reason")
    if reason is None:
        return None
    kind = reason.get("type") if isinstance(reason, dict) else None
    if kind == "stop" or kind == "length" or kind == "abort":
        return kind
    raise Untrusted(f"finish_reason is {json.dumps(reason)[:100]}")


def _names(entry: Any, token: int) -> bool:
    return isinstance(entry, list) and len(entry) >= 2 and entry[1] == token


def _log_prob(entry: Any, token: int) -> float:
    """The first of [log-prob, token, text], which must be about this token."""
    if not _names(entry, token):
        raise Untrusted(f"the log-prob of token {token} is {json.dumps(entry)[:100]}")
    value = entry[0]
    if not isinstance(value, int | float) or not math.isfinite(value) or value > ROUNDING:
        raise Untrusted(f"the log-prob of token {token} is {json.dumps(value)[:100]}")
    return float(value)
