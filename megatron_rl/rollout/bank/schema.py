"""The columns of a sealed step: one row a sample, groups side by side, in the order in which they were finished.

What belongs to a group is repeated in its rows (compression makes that cheap), so that every row stands for itself. Columns
are only added from one program to the next; docs/bank.md says what each means.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_rl.rollout.bank.codec import to_json
from megatron_rl.types import Group, Prompt, Sample, Segment

type Decode = Callable[[Sequence[int]], str]

SEGMENT = pa.struct(
    [
        pa.field("start", pa.int32(), nullable=False),
        pa.field("stop", pa.int32(), nullable=False),
        pa.field("author", pa.string(), nullable=False),
        pa.field("version", pa.int64()),
        pa.field("turn", pa.int32(), nullable=False),
        pa.field("learned", pa.bool_(), nullable=False),
    ]
)
# Of a group, repeated in its rows.
GROUP_COLUMNS = {
    "group": pa.string(),
    "step": pa.int64(),
    "group_size": pa.int32(),
    "information": pa.string(),
    "prompt_key": pa.string(),
    "prompt_tokens": pa.list_(pa.int32()),
    "prompt_messages": pa.string(),
    "prompt_fields": pa.string(),
    "prompt_max_new_tokens": pa.int64(),
}
# Of a sample: small numbers first, which planning reads alone.
PLAN_COLUMNS = {
    "sample": pa.int32(),
    "length": pa.int32(),
    "prompt_length": pa.int32(),
    "loss_tokens": pa.int32(),
    "oldest_version": pa.int64(),
    "newest_version": pa.int64(),
    "finish": pa.string(),
    "failure": pa.string(),
    "reward": pa.float64(),
}
SAMPLE_COLUMNS = {
    "turn_rewards": pa.list_(pa.float64()),
    "tokens": pa.list_(pa.int32()),
    "log_probs": pa.list_(pa.float32()),
    "loss_mask": pa.list_(pa.bool_()),
    "segments": pa.list_(SEGMENT),
    "routing": pa.large_binary(),
    "routing_shape": pa.list_(pa.int32()),
    "routing_dtype": pa.string(),
    "prompt_text": pa.string(),
    "response_text": pa.string(),
}
REWARD = "reward_"  # a component's column: reward_exact
NULLABLE = {
    "prompt_max_new_tokens", "oldest_version", "newest_version", "failure",
    "routing", "routing_shape", "routing_dtype", "prompt_text", "response_text",
}  # fmt: skip


def schema(rewards: Sequence[str]) -> pa.Schema:
    """Columns of a step whose samples have these reward components."""
    named = {**GROUP_COLUMNS, **PLAN_COLUMNS, **{f"{REWARD}{name}": pa.float64() for name in sorted(rewards)}, **SAMPLE_COLUMNS}
    return pa.schema([pa.field(name, kind, nullable=name in NULLABLE or _component(name)) for name, kind in named.items()])


def _component(name: str) -> bool:
    return name.startswith(REWARD)


def rows(pairs: Sequence[tuple[Group, int]], columns: pa.Schema, decode: Decode | None) -> pa.Table:
    """Samples, each its group and its place in it, as rows."""
    parts = [cells_of_sample(group, index, decode) for group, index in pairs]
    return pa.Table.from_arrays([_column(field, parts) for field in columns], schema=columns)


def cells_of_sample(group: Group, index: int, decode: Decode | None) -> dict[str, Any]:
    """One sample's cells by column; arrays stay arrays. What a sample has none of is left out."""
    sample, prompt = group.samples[index], group.prompt
    versions = [segment.version for segment in sample.segments if segment.version is not None]
    cells: dict[str, Any] = {
        "group": group.key,
        "step": group.step,
        "group_size": len(group.samples),
        "information": to_json(dict(group.information), group.key),
        "prompt_key": prompt.key,
        "prompt_tokens": prompt.tokens,
        "prompt_messages": to_json([dict(message) for message in prompt.messages], group.key),
        "prompt_fields": to_json(dict(prompt.fields), group.key),
        "prompt_max_new_tokens": prompt.max_new_tokens,
        "sample": index,
        "length": sample.length,
        "prompt_length": sample.prompt_length,
        "loss_tokens": int(sample.loss_mask.sum()),
        "oldest_version": min(versions, default=None),
        "newest_version": max(versions, default=None),
        "finish": sample.finish,
        "failure": sample.failure,
        "reward": sample.reward,
        **{f"{REWARD}{name}": value for name, value in sample.rewards.items()},
        "turn_rewards": np.array(sample.turn_rewards, dtype=np.float64),
        "tokens": sample.tokens,
        "log_probs": sample.log_probs,
        "loss_mask": sample.loss_mask,
        "segments": [vars(segment) for segment in sample.segments],
    }
    if sample.routing is not None:
        cells |= {
            "routing": np.ascontiguousarray(sample.routing).astype(sample.routing.dtype.newbyteorder("<")).tobytes(),
            "routing_shape": np.array(sample.routing.shape),
            "routing_dtype": sample.routing.dtype.name,
        }
    if decode is not None:
        prompt_length = sample.prompt_length
        cells["prompt_text"] = decode(sample.tokens[:prompt_length].tolist())
        cells["response_text"] = decode(sample.tokens[prompt_length:].tolist())
    return cells


def _column(field: pa.Field, parts: Sequence[Mapping[str, Any]]) -> pa.Array:
    cells = [part.get(field.name) for part in parts]
    if pa.types.is_list(field.type) and not pa.types.is_struct(field.type.value_type):
        return _lists(cells, field.type)
    return pa.array(cells, field.type)


def _lists(cells: Sequence[NDArray[Any] | None], kind: pa.ListType) -> pa.ListArray:
    """Arrays end to end, without a Python object a number."""
    offsets = np.cumsum([0, *(0 if cell is None else len(cell) for cell in cells)], dtype=np.int32)
    dtype = kind.value_type.to_pandas_dtype()
    values = np.concatenate([np.empty(0, dtype), *(cell.astype(dtype, copy=False) for cell in cells if cell is not None)])
    absent = np.array([cell is None for cell in cells])
    return pa.ListArray.from_arrays(
        offsets, pa.array(values, kind.value_type), type=kind, mask=pa.array(absent) if absent.any() else None
    )


# -- and back ----------------------------------------------------------------------------------------------------------

SAMPLE_NEEDS = ("tokens", "log_probs", "segments", "finish", "failure", "reward", "turn_rewards")
ROUTING_NEEDS = ("routing", "routing_shape", "routing_dtype")
SEGMENT_NAMES = tuple(field.name for field in SEGMENT)


def sample_of(cells: Mapping[str, Any]) -> Sample:
    """A sample from the cells of its row; without the routing columns it has no routing."""
    return Sample(
        tokens=cells["tokens"].astype(np.int64),
        log_probs=cells["log_probs"].astype(np.float32),
        segments=tuple(Segment(**{name: segment[name] for name in SEGMENT_NAMES}) for segment in cells["segments"]),
        finish=cells["finish"],
        rewards={name.removeprefix(REWARD): value for name, value in cells.items() if _component(name) and value is not None},
        reward=cells["reward"],
        failure=cells["failure"],
        routing=_routing(cells) if cells.get("routing") is not None else None,
        turn_rewards=tuple(cells["turn_rewards"].tolist()),
    )


def group_of(parts: Sequence[Mapping[str, Any]]) -> Group:
    """A group from its rows."""
    first = parts[0]
    return Group(
        key=first["group"],
        prompt=Prompt(
            key=first["prompt_key"],
            tokens=first["prompt_tokens"].astype(np.int64),
            messages=tuple(json.loads(first["prompt_messages"])),
            fields=json.loads(first["prompt_fields"]),
            max_new_tokens=first["prompt_max_new_tokens"],
        ),
        samples=tuple(sample_of(cells) for cells in parts),
        step=first["step"],
        information=json.loads(first["information"]),
    )


def cells_of(table: pa.Table, row: int) -> dict[str, Any]:
    """The cells of a row: lists of numbers as arrays, the rest as Python has it."""
    cells = {}
    for name in table.column_names:
        cell = table.column(name)[row]
        numbers = pa.types.is_list(cell.type) and not pa.types.is_nested(cell.type.value_type) and cell.is_valid
        cells[name] = cell.values.to_numpy(zero_copy_only=False) if numbers else cell.as_py()
    return cells


def _routing(cells: Mapping[str, Any]) -> NDArray[Any]:
    dtype = np.dtype(cells["routing_dtype"])
    stored = np.frombuffer(cells["routing"], dtype.newbyteorder("<"))
    return stored.astype(dtype, copy=True).reshape(cells["routing_shape"])
