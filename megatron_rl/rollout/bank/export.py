"""Samples of a bank as one file that others read: JSON lines or Parquet, with every column, also those added by others."""

import base64
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.config.errors import BankError
from megatron_rl.rollout.bank import files
from megatron_rl.rollout.bank.folder import FORMAT
from megatron_rl.rollout.bank.looking import NEEDS, Wanted
from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.rollout.bank.schema import REWARD
from megatron_rl.rollout.bank.sealed import METADATA

JSON_TEXTS = ("information", "prompt_messages", "prompt_fields")  # columns that hold JSON, spelled out in JSON lines
STEP = "sealed_step"  # a column that says which step a row was sealed for


def export(reader: BankReader, target: Path, wanted: Wanted, *, step: int | None = None, routing: bool = False) -> int:
    """Write the sealed samples that are wanted; returns how many. The file appears whole or not at all."""
    writers: dict[str, Callable[[Path, pa.Schema, Iterator[pa.Table]], int]]
    writers = {".jsonl": _write_json_lines, ".parquet": _write_parquet}
    if target.suffix not in writers:
        raise BankError(f"{target}: the ending says what is written. Use one of {', '.join(writers)}.")
    if not target.parent.is_dir():
        raise BankError(f"{target.parent} is not a folder. Make it first.")
    steps = reader.steps() if step is None else [step]
    if not steps:
        raise BankError("no step is sealed yet: there is nothing to export.")
    partial = files.beside(target)
    count = writers[target.suffix](partial, _schema(reader, steps, routing), _tables(reader, steps, wanted, routing))
    files.sync_file(partial)
    files.rename(partial, target)
    return count


def _schema(reader: BankReader, steps: Sequence[int], routing: bool) -> pa.Schema:
    """The columns of all steps; null where a step has none."""
    schemas = []
    for step in steps:
        with reader.step(step) as sealed:
            schemas.append(sealed.schema)
    fields = [
        field.with_nullable(True)
        for field in pa.unify_schemas(schemas, promote_options="permissive")
        if _kept(field.name, routing)
    ]
    about = {METADATA: json.dumps({"format": FORMAT, "steps": list(steps)})}
    return pa.schema([pa.field(STEP, pa.int64()), *fields], about)


def _kept(name: str, routing: bool) -> bool:
    return routing or not name.startswith("routing")


def _tables(reader: BankReader, steps: Sequence[int], wanted: Wanted, routing: bool) -> Iterator[pa.Table]:
    """One a row group; rows that are not wanted left out."""
    for step in steps:
        with reader.step(step) as sealed:
            for table in sealed.tables([name for name in sealed.column_names if _kept(name, routing)]):
                asked = [name for name in table.column_names if name in NEEDS or name.startswith(REWARD)]
                rows = table.filter(pa.array([wanted.fits(cells) for cells in table.select(asked).to_pylist()], pa.bool_()))
                yield rows.append_column(STEP, pa.array([step] * len(rows), pa.int64()))


def _write_json_lines(path: Path, _: pa.Schema, tables: Iterator[pa.Table]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for table in tables:
            for cells in table.to_pylist():
                file.write(json.dumps({name: _plain(name, cell) for name, cell in cells.items()}, allow_nan=False) + "\n")
                count += 1
    return count


def _plain(name: str, cell: Any) -> Any:
    """A cell as strict JSON has it: no NaN, bytes as base64."""
    if name in JSON_TEXTS and cell is not None:
        cell = json.loads(cell)
    return _strict(cell)


def _strict(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case bytes():
            return base64.b64encode(value).decode()
        case list():
            return [_strict(inner) for inner in value]
        case dict():
            return {name: _strict(inner) for name, inner in value.items()}
        case _:
            return value


def _write_parquet(path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> int:
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            whole = pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
            writer.write_table(whole.cast(schema))
            count += len(whole)
    return count
