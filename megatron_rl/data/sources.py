"""Sources of rows through `datasets`: files, the hub, a function of yours, a built-in task. All come as memory-mapped Arrow."""

import difflib
import hashlib
import importlib
import json
import re
import string
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from megatron_rl.config.data_settings import SourceSettings
from megatron_rl.config.errors import DataError
from megatron_rl.data.tasks import PREFIX, REVISION, task_options, task_rows

READERS: Mapping[str, Callable[..., datasets.Dataset]] = {
    "jsonl": datasets.Dataset.from_json,
    "json": datasets.Dataset.from_json,
    "parquet": datasets.Dataset.from_parquet,
    "csv": datasets.Dataset.from_csv,
    "tsv": partial(datasets.Dataset.from_csv, sep="\t"),
}
FILE = re.compile(r"(?P<stem>[^/]*?)\.(?P<kind>jsonl|json|parquet|csv|tsv)(\.(gz|zst|bz2|xz))?$")
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class Source:
    """Rows with their columns. Only the rows that are asked for come into memory."""

    def __init__(self, settings: SourceSettings, cache: Path | None) -> None:
        self.settings = settings
        self.name = settings.name or _default_name(settings.path)
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # of rows that may differ from one start to the next
        with shown_to_people():
            self.rows: datasets.Dataset = self._open(cache)
        if len(self.rows) == 0:
            raise DataError(f"data source {settings.path} has no rows.")

    @property
    def columns(self) -> list[str]:
        return list(self.rows.column_names)

    def require_columns(self) -> None:
        """Every column that the settings name is there."""
        settings = self.settings
        named = {"prompt": self.prompt_column, "messages": settings.messages, "answer": settings.answer}
        named |= {"max_new_tokens": settings.max_new_tokens}
        named |= {f"fields.{name}": column for name, column in settings.fields.items()}
        named |= {f"wording ({{{column}}})": column for column in wording_columns(settings)}
        for setting, column in named.items():
            if column is not None and column not in self.columns:
                raise DataError(
                    f"data source {settings.path}: {setting} names the column {column}, which is not there. "
                    f"{_nearest(column, self.columns)}Columns are {', '.join(self.columns)}."
                )
        for column in self.field_columns.values():
            kind = self.rows.features.arrow_schema.field(column).type
            if not _is_plain(kind):
                raise DataError(
                    f"data source {settings.path}: the column {column} holds {kind}, which cannot be handed to rewards nor "
                    "kept in the bank. Make it text, numbers, or lists and structures of them."
                )

    @property
    def prompt_column(self) -> str | None:
        """The column of questions, where they are one."""
        settings = self.settings
        return settings.prompt or (None if settings.messages or settings.wording else "prompt")

    @property
    def field_columns(self) -> dict[str, str]:
        """What rewards read, by their name for it. A built-in task hands over all that it has."""
        settings = self.settings
        if settings.path.startswith(PREFIX):
            return {column: column for column in self.columns if column != "prompt"} | settings.fields
        return ({} if settings.answer is None else {"answer": settings.answer}) | settings.fields

    def _open(self, cache: Path | None) -> datasets.Dataset:
        path, folder = self.settings.path, None if cache is None else str(cache)
        if path.startswith(PREFIX):
            name = path.removeprefix(PREFIX)
            options = task_options(name, self.settings.options)
            made = partial(task_rows, name, options)
            return datasets.Dataset.from_generator(made, cache_dir=folder, fingerprint=digest(name, repr(options), REVISION))
        if FUNCTION.fullmatch(path):
            if cache is not None:
                cache.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix="megatron-rl-rows-", dir=folder, ignore_cleanup_errors=True)
            made = partial(_rows_of, path, self.settings.options)
            with _told(path):
                return datasets.Dataset.from_generator(made, cache_dir=self._folder.name, fingerprint=uuid.uuid4().hex)
        if self.settings.options:
            raise DataError(f"data source {path}: options are for built-in tasks and for functions of yours. Remove them.")
        with _told(path):
            return self._load(path, folder)

    def _load(self, path: str, folder: str | None) -> datasets.Dataset:
        file = FILE.search(path)
        if file is not None:
            # Not by load_dataset, which tells the hub of every local file that is read, and waits where there is no network.
            return READERS[file["kind"]](path, cache_dir=folder)
        if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(path)
            return loaded[self.settings.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        settings = self.settings
        return datasets.load_dataset(path, settings.subset, split=settings.split, revision=settings.revision, cache_dir=folder)


def wording_columns(settings: SourceSettings) -> list[str]:
    """The columns that a wording takes in."""
    if settings.wording is None:
        return []
    try:
        return [name for _, name, _, _ in string.Formatter().parse(settings.wording) if name is not None]
    except ValueError as error:
        raise DataError(
            f"data source {settings.path}: wording cannot be read: {error}. Columns stand in braces; a brace itself is "
            "written twice."
        ) from error


def digest(*parts: Any) -> str:
    """A name for what depends on all of these."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


@contextmanager
def shown_to_people() -> Iterator[None]:
    """Progress bars of `datasets` on a terminal, none in log files."""
    hide = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Whatever a reader, the hub or a user's function throws is told with the source it comes from."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        advice = "Give the path of a file that exists, a hub name that can be reached, or my_package.my_module:rows"
        raise DataError(f"data source {path} cannot be read: {first}. {advice}.") from error


def _rows_of(path: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a user's function or iterable."""
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    made: Iterable[Any] = found(**options) if callable(found) else found
    for row in made:
        if not isinstance(row, dict):
            raise DataError(f"data source {path} gives a {type(row).__name__} where a row is expected: a dict of columns.")
        yield row


def _default_name(path: str) -> str:
    file = FILE.search(path)
    return file["stem"].replace("*", "all") if file else path.removeprefix(PREFIX).rstrip("/")


def _nearest(column: str, columns: list[str]) -> str:
    found = difflib.get_close_matches(column, columns, 1)
    return f"Did you mean {found[0]}? " if found else ""


def _is_plain(kind: pa.DataType) -> bool:
    """Is it what JSON can hold?"""
    types = pa.types
    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean, types.is_null)
    return any(test(kind) for test in tests)
