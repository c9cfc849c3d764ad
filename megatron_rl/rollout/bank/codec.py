"""Groups as bytes and back, bit for bit: a JSON head for what is small, arrays as they lie in memory behind it.

    payload = head length u32 | head | arrays end to end

Floats survive JSON exactly (the shortest text that reads back as the same number; NaN and infinities by name). Values of
`prompt.fields` must be what JSON can hold, and come back as JSON holds them: a tuple as a list.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rl.config.errors import BankError
from megatron_rl.types import Group, Prompt, Sample, Segment

LENGTH = struct.Struct("<I")
TOKEN_DTYPE = np.dtype("<i4")  # on disk; in memory they are int64
LARGEST_TOKEN = np.iinfo(np.int32).max
DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("int32", "float32", "uint8", "uint16")}


def encode_group(group: Group) -> bytes:
    """Raises BankError for what could not be read back as it is."""
    arrays = _Arrays()
    prompt = group.prompt
    head = {
        "key": _text(group.key),
        "step": group.step,
        "information": {_text(name): float(value) for name, value in group.information.items()},
        "prompt": {
            "key": _text(prompt.key),
            "tokens": arrays.tokens(prompt.tokens, group.key),
            "messages": [dict(message) for message in prompt.messages],
            "fields": dict(prompt.fields),
            "max_new_tokens": prompt.max_new_tokens,
        },
        "samples": [_sample_head(sample, group.key, arrays) for sample in group.samples],
    }
    encoded = to_json(head, group.key).encode()
    return b"".join((LENGTH.pack(len(encoded)), encoded, *arrays.parts))


def decode_group(payload: bytes) -> Group:
    head, arrays = _opened(payload)
    prompt = head["prompt"]
    return Group(
        key=head["key"],
        prompt=Prompt(
            key=prompt["key"],
            tokens=_array(arrays, prompt["tokens"]).astype(np.int64),
            messages=tuple(prompt["messages"]),
            fields=prompt["fields"],
            max_new_tokens=prompt["max_new_tokens"],
        ),
        samples=tuple(_sample(entry, arrays) for entry in head["samples"]),
        step=head["step"],
        information=head["information"],
    )


def peek(payload: bytes) -> tuple[str, int, frozenset[str]]:
    """Key, step and names of rewards of an encoded group, arrays untouched."""
    (length,) = LENGTH.unpack_from(payload)
    head = json.loads(payload[LENGTH.size : LENGTH.size + length])
    return head["key"], head["step"], frozenset(name for sample in head["samples"] for name in sample["rewards"])


def to_json(value: Any, key: str) -> str:
    """ASCII alone, so that any text survives; a value that JSON does not know is refused by its group."""
    try:
        return json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise BankError(
            f"group {key} cannot be kept: {error}. Prompt fields, messages, rewards and information may hold text, "
            "numbers, true, false, null, and lists and named values of them."
        ) from error


class _Arrays:
    """Arrays end to end; the head says where each lies."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, array: NDArray[Any]) -> dict[str, Any]:
        data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        entry = {"at": self.size, "dtype": array.dtype.name, "shape": list(array.shape)}
        self.parts.append(data)
        self.size += len(data)
        return entry

    def tokens(self, tokens: NDArray[np.int64], key: str) -> dict[str, Any]:
        if len(tokens) and (tokens.min() < 0 or tokens.max() > LARGEST_TOKEN):
            raise BankError(
                f"group {key} cannot be kept: token ids lie in 0 to {LARGEST_TOKEN}, not {tokens.min()} to {tokens.max()}."
            )
        return self.add(tokens.astype(TOKEN_DTYPE))


def _sample_head(sample: Sample, key: str, arrays: _Arrays) -> dict[str, Any]:
    if len(sample.log_probs) != len(sample.tokens):
        raise BankError(f"group {key} cannot be kept: {len(sample.log_probs)} log-probs for {len(sample.tokens)} tokens.")
    if sample.routing is not None and sample.routing.dtype.name not in ("uint8", "uint16"):
        raise BankError(f"group {key} cannot be kept: routing is {sample.routing.dtype}; it must be uint8 or uint16.")
    return {
        "tokens": arrays.tokens(sample.tokens, key),
        "log_probs": arrays.add(sample.log_probs.astype(np.float32, copy=False)),
        "segments": [list(asdict(segment).values()) for segment in sample.segments],
        "finish": sample.finish,
        "rewards": {_text(name): float(value) for name, value in sample.rewards.items()},
        "reward": float(sample.reward),
        "failure": None if sample.failure is None else _text(sample.failure),
        "routing": None if sample.routing is None else arrays.add(sample.routing),
        "turn_rewards": [float(value) for value in sample.turn_rewards],
    }


def _sample(entry: Mapping[str, Any], arrays: memoryview) -> Sample:
    return Sample(
        tokens=_array(arrays, entry["tokens"]).astype(np.int64),
        log_probs=_array(arrays, entry["log_probs"]),
        segments=tuple(Segment(*values) for values in entry["segments"]),
        finish=entry["finish"],
        rewards=entry["rewards"],
        reward=entry["reward"],
        failure=entry["failure"],
        routing=None if entry["routing"] is None else _array(arrays, entry["routing"]),
        turn_rewards=tuple(entry["turn_rewards"]),
    )


def _opened(payload: bytes) -> tuple[dict[str, Any], memoryview]:
    (length,) = LENGTH.unpack_from(payload)
    return json.loads(payload[LENGTH.size : LENGTH.size + length]), memoryview(payload)[LENGTH.size + length :]


def _array(arrays: memoryview, entry: Mapping[str, Any]) -> NDArray[Any]:
    """An array of its own, in this machine's byte order."""
    dtype, count = DTYPES[entry["dtype"]], int(np.prod(entry["shape"], dtype=np.int64))
    read = np.frombuffer(arrays, dtype, count, entry["at"]).reshape(entry["shape"])
    return read.astype(dtype.newbyteorder("="), copy=True)


def _text(text: str) -> str:
    """Text that every file format holds: half of a surrogate pair, as broken output has, is written as its number."""
    return text.encode("utf-8", "backslashreplace").decode()
