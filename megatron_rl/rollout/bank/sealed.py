"""Sealed steps: written row group by row group, read by column and by row.

A trainer rank first reads the small columns of all rows (`plan`), decides with all others which rows are its own, and then
reads those (`samples`). Row groups are small, so that it meets little of its neighbours'; `bytes_read` tells how much it was.
"""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_rl import __version__
from megatron_rl.config.errors import BankError
from megatron_rl.rollout.bank import files
from megatron_rl.rollout.bank.folder import FORMAT, require_format
from megatron_rl.rollout.bank.schema import (
    GROUP_COLUMNS,
    PLAN_COLUMNS,
    REWARD,
    ROUTING_NEEDS,
    SAMPLE_NEEDS,
    Decode,
    cells_of,
    group_of,
    rows,
    sample_of,
    schema,
)
from megatron_rl.types import Group, Sample

METADATA = b"megatron_rl.bank"
ROW_GROUP_BYTES = 1 << 18  # of tokens, log-probs and routing: small against what a rank reads, large against a row group's own


def write_step(path: Path, step: int, groups: Iterable[Group], rewards: Iterable[str], decode: Decode | None = None) -> None:
    """Write a step durably to a path. Memory holds one row group at a time."""
    about = {"format": FORMAT, "step": step, "program": f"megatron-rl {__version__}"}
    columns = schema(sorted(set(rewards))).with_metadata({METADATA: json.dumps(about).encode()})
    with pq.ParquetWriter(
        path,
        columns,
        compression="zstd",
        use_dictionary=[field.name for field in columns if field.type == pa.string()],
        # Numbers of one distribution compress when their bytes of like significance stand together.
        column_encoding={"log_probs.list.element": "BYTE_STREAM_SPLIT"},
        write_statistics=[*GROUP_COLUMNS, *PLAN_COLUMNS],  # of the rest nobody asks for the smallest value
    ) as writer:
        for batch in _batches(groups):
            writer.write_table(rows(batch, columns, decode))
    files.sync_file(path)


def _batches(groups: Iterable[Group]) -> Iterator[list[tuple[Group, int]]]:
    """Samples, cut where a row group is full."""
    batch: list[tuple[Group, int]] = []
    size = 0
    for group in groups:
        for index, sample in enumerate(group.samples):
            own = sample.tokens.nbytes + (0 if sample.routing is None else sample.routing.nbytes)
            if batch and size + own > ROW_GROUP_BYTES:
                yield batch
                batch, size = [], 0
            batch.append((group, index))
            size += own
    if batch:
        yield batch


class SealedStep:
    """The samples of one training step. Opening reads the file's footer alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = _CountingFile(path)
            self._parquet = pq.ParquetFile(pa.PythonFile(self._file, mode="r"), pre_buffer=False)
        except (OSError, pa.ArrowException) as error:
            raise BankError(f"{path} cannot be read as a sealed step: {error}. Restore it from a copy.") from error
        about = json.loads((self._parquet.schema_arrow.metadata or {}).get(METADATA, b"{}"))
        require_format(path, about.get("format"))
        self.step: int = about["step"]

    @property
    def rows(self) -> int:
        return int(self._parquet.metadata.num_rows)

    @property
    def bytes_read(self) -> int:
        """Bytes that have come off the file so far."""
        return self._file.bytes_read

    @property
    def schema(self) -> pa.Schema:
        """All columns, also those that this program does not know."""
        return self._parquet.schema_arrow.remove_metadata()

    @property
    def column_names(self) -> list[str]:
        return list(self._parquet.schema_arrow.names)

    @property
    def reward_names(self) -> list[str]:
        return [name.removeprefix(REWARD) for name in self.column_names if name.startswith(REWARD)]

    def columns(self, names: Sequence[str], row_group: int | None = None) -> pa.Table:
        """These columns alone, of all rows or of one row group. Columns that this program does not know are columns too."""
        missing = [name for name in names if name not in self.column_names]
        if missing:
            raise BankError(f"{self.path} has no column {missing[0]}. It has {', '.join(self.column_names)}.")
        read = self._parquet.read if row_group is None else lambda **options: self._parquet.read_row_group(row_group, **options)
        try:
            return read(columns=list(names), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise BankError(f"{self.path} is damaged: {error}. Restore it from a copy.") from error

    def tables(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """These columns, a row group at a time."""
        for number in range(self._parquet.num_row_groups):
            yield self.columns(names, number)

    def plan(self) -> pa.Table:
        """The small columns of every row: group, length, reward and the like."""
        return self.columns(["group", *PLAN_COLUMNS, *(f"{REWARD}{name}" for name in self.reward_names)])

    def lengths(self) -> NDArray[np.int64]:
        """[rows] tokens of each sample."""
        return self.columns(["length"]).column("length").to_numpy().astype(np.int64)

    def keys(self) -> list[str]:
        """Keys of the groups, in their order."""
        return list(dict.fromkeys(self.columns(["group"]).column("group").to_pylist()))

    def samples(self, indices: Sequence[int], *, routing: bool = True) -> list[Sample]:
        """The samples of these rows, in the order asked for. Row groups without any of them are not touched."""
        wrong = [index for index in indices if not 0 <= index < self.rows]
        if wrong:
            raise BankError(f"{self.path} has rows 0 to {self.rows - 1}, and row {wrong[0]} was asked for.")
        needs = [*SAMPLE_NEEDS, *(f"{REWARD}{name}" for name in self.reward_names), *(ROUTING_NEEDS if routing else ())]
        rows = np.unique(np.asarray(indices, dtype=np.int64))
        owners = np.searchsorted(self._row_group_starts, rows, side="right") - 1
        found: dict[int, Sample] = {}
        for owner, owned in groupby(zip(owners.tolist(), rows.tolist(), strict=True), key=itemgetter(0)):
            table, start = self.columns(needs, owner), int(self._row_group_starts[owner])
            for _, row in owned:
                found[row] = sample_of(cells_of(table, row - start))
        return [found[index] for index in indices]

    def groups(self) -> Iterator[Group]:
        """All groups, bit for bit as they were appended, one row group in memory at a time."""
        for _, cells in groupby(self.cells(), key=lambda cells: cells["group"]):
            yield group_of(list(cells))

    def cells(self, names: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Row after row, these columns or all."""
        for table in self.tables(self.column_names if names is None else names):
            for row in range(table.num_rows):
                yield cells_of(table, row)

    @cached_property
    def _row_group_starts(self) -> NDArray[np.int64]:
        """[row groups] the first row of each."""
        about = self._parquet.metadata
        sizes = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
        return np.cumsum([0, *sizes[:-1]], dtype=np.int64)

    def close(self) -> None:
        self._parquet.close(force=True)
        self._file.close()

    def __enter__(self) -> "SealedStep":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _CountingFile(io.FileIO):
    """A file that counts what is read of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "r")
        self.bytes_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self.bytes_read += len(data)
        return data
