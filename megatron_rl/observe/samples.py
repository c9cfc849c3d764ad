"""What the model said, for the page: groups of the bank's sealed steps joined to what learning did with them.

Texts are untrusted: they go into the page as data, and the page shows them as text alone.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray

from megatron_rl.config.errors import BankError, DataError
from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.observe.lines import Line
from megatron_rl.observe.reading import RunReader
from megatron_rl.rollout.bank.folder import Folder as BankFolder
from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.rollout.bank.schema import REWARD, cells_of
from megatron_rl.rollout.bank.sealed import SealedStep

COLUMNS = (
    "group", "sample", "prompt_length", "length", "finish", "failure", "reward", "oldest_version", "newest_version",
    "tokens", "log_probs", "segments", "prompt_text", "response_text",
)  # fmt: skip
LOG_PROB_DIGITS = 3  # behind the point
AUTHORS = {"policy": "p", "environment": "e", "prompt": "e"}

type Trace = Mapping[str, Any]


@dataclass(frozen=True)
class Bounds:
    """How much of what was said the page holds, so that it stays a page."""

    groups: int = 24  # the newest
    samples: int = 16  # of a group
    tokens: int = 2048  # of a response, its first
    letters: int = 20_000  # of a prompt, and of a response that is kept as text
    all_tokens: int = 200_000  # of all responses together


@dataclass
class SampleBrowser:
    """Finds groups for the page. What a step said does not change: a group is prepared once, and kept for the next page."""

    bank: Path | None
    tokenizer_name: str | None = None  # default: the one that the bank names
    bounds: Bounds = field(default_factory=Bounds)
    _known: "OrderedDict[tuple[int, str], Line]" = field(default_factory=OrderedDict)
    _tokenizer: Tokenizer | None = None
    _tried: bool = False
    _note: str = ""
    _starts: int = 0

    def shown(self, run: RunReader) -> dict[str, Any]:
        """Groups, the newest first, and a sentence about what is missing."""
        if self._starts != len(run.starts):  # a resumed run may have done a step again, and otherwise
            self._known.clear()
            self._starts = len(run.starts)
        if self.bank is None or not (self.bank / "bank.json").exists():
            where = f" at {self.bank}" if self.bank else ""
            return {"groups": [], "note": f"There is no bank{where}: what the model said is not known here."}
        with BankReader(self.bank) as reader:
            steps = reader.steps()
            if not steps:
                return {"groups": [], "note": "No step is sealed in the bank yet: samples appear with the first."}
            self._open_tokenizer(reader)
            traced = [step for step in run.folder.traced() if step in set(steps)]
            groups = list(self._groups(self.bank, run, reader, traced[::-1] or steps[:-2:-1]))
        for place in list(self._known)[: -4 * self.bounds.groups]:
            del self._known[place]
        return {"groups": groups, "note": self._note if traced else f"{_untraced(run)} {self._note}".strip()}

    def _groups(self, bank: Path, run: RunReader, reader: BankReader, steps: Sequence[int]) -> Iterator[Line]:
        """As many of the newest as fit."""
        count, tokens = 0, 0
        for step in steps:
            traces: dict[str, dict[int, Trace]] = {}
            for trace in run.traces(step):
                traces.setdefault(trace["group"], {})[trace["row"]] = trace
            try:
                groups = list(self._prepared(reader, step, traces))
            except BankError:
                if step in BankFolder(bank).sealed():
                    raise
                continue  # the run has removed the step meanwhile (bank.keep_steps)
            for group in groups:
                tokens += sum(len(sample["ids"]) for sample in group["samples"])
                if count == self.bounds.groups or (count and tokens > self.bounds.all_tokens):
                    return
                count += 1
                yield group

    def _prepared(self, reader: BankReader, step: int, traces: Mapping[str, Mapping[int, Trace]]) -> Iterator[Line]:
        """The traced groups of a step, or where there are none as many as may be shown."""
        keys = list(traces)
        if not keys or any((step, key) not in self._known for key in keys):
            with reader.step(step) as sealed:
                keys = keys or sealed.keys()[: self.bounds.groups]
                missing = {key for key in keys if (step, key) not in self._known}
                for key, rows in _rows_of(sealed, missing).items():
                    self._known[step, key] = self._group(step, key, rows, traces.get(key, {}))
        yield from (self._known[step, key] for key in keys if (step, key) in self._known)

    def _group(self, step: int, key: str, rows: Sequence[tuple[int, Line]], traces: Mapping[int, Trace]) -> Line:
        first = rows[0][1]
        start = first["prompt_length"]
        prompt = first["prompt_text"] if first.get("prompt_text") is not None else None
        if prompt is None and self._tokenizer is not None:
            prompt = self._tokenizer.decode(first["tokens"][:start].tolist())
        return {
            "id": f"{step}:{key}",
            "step": step,
            "key": key,
            "traced": bool(traces),
            "prompt": self._cut(prompt if prompt is not None else " ".join(map(str, first["tokens"][:start].tolist()))),
            "size": len(rows),
            "samples": [self._sample(cells, traces.get(row)) for row, cells in rows[: self.bounds.samples]],
        }

    def _sample(self, cells: Line, trace: Trace | None) -> Line:
        start = cells["prompt_length"]
        stop = min(cells["length"], start + self.bounds.tokens)
        ids = cells["tokens"][start:stop].tolist()
        shown = {
            "index": cells["sample"],
            "reward": _number(cells["reward"]),
            "rewards": {name: _number(value) for name, value in _components(cells).items()},
            "finish": cells["finish"],
            "failure": cells["failure"],
            "versions": [cells["oldest_version"], cells["newest_version"]],
            "length": cells["length"] - start,
            "ids": ids,
            "pieces": self._tokenizer.pieces(ids) if self._tokenizer is not None else None,
            "text": self._cut(cells["response_text"]) if self._tokenizer is None and cells.get("response_text") else None,
            "log_probs": _rounded(cells["log_probs"][start:stop], LOG_PROB_DIGITS),
            "authors": _authors(cells["segments"], start, stop),
        }
        if trace is None:
            return shown
        own = trace["token_advantage"]
        return shown | {
            "advantage": _number(trace["advantage"]),
            "ratio": _number(trace["ratio"], 8),
            "clipped": trace["clipped"],
            "log_ratio": _rounded(trace["log_ratio"][start:stop], 5),
            "token_advantage": None if own is None else _rounded(own[start:stop], 4),
        }

    def _cut(self, text: str) -> str:
        rest = len(text) - self.bounds.letters
        return text if rest <= 0 else f"{text[: self.bounds.letters]} … and {rest:,} letters more"

    def _open_tokenizer(self, reader: BankReader) -> None:
        """Once: what cannot be opened now cannot be a moment later."""
        if self._tried:
            return
        self._tried = True
        name = self.tokenizer_name or reader.tokenizer
        if name is None:
            self._note = "The bank names no tokenizer: tokens are shown as ids (give one with --tokenizer)."
            return
        try:
            self._tokenizer = Tokenizer(name)
        except DataError as error:
            if self.tokenizer_name is not None:
                raise DataError(str(error).replace("data.tokenizer =", "--tokenizer")) from error
            self._note = f"The tokenizer {name} cannot be opened here: tokens are shown as ids (give one with --tokenizer)."


def bank_of(run: RunReader) -> Path | None:
    """The folder of the run's bank: in its directory, or where its settings say."""
    inside = run.folder.path / "bank"
    if inside.is_dir():
        return inside
    section = (yaml.safe_load(run.start["settings"]) or {}).get("bank") or {}
    return Path(section["directory"]) if section.get("directory") else None


def _untraced(run: RunReader) -> str:
    if run.folder.traced():
        return "The bank no longer holds the steps that were traced: the newest step is shown without them."
    return "No groups are traced (observe.traces): log-ratios, advantages and clipping are not known."


def _rows_of(sealed: SealedStep, keys: set[str]) -> dict[str, list[tuple[int, Line]]]:
    """Rows of these groups with their numbers in the step, a list a group."""
    names = [name for name in sealed.column_names if name in COLUMNS or name.startswith(REWARD)]
    found: dict[str, list[tuple[int, Line]]] = {}
    row = 0
    try:
        for table in sealed.tables(names):
            groups = table.column("group").to_pylist()
            for place, group in enumerate(groups):
                if group in keys:
                    found.setdefault(group, []).append((row + place, cells_of(table, place)))
            row += len(groups)
    except pa.ArrowException as error:
        raise BankError(f"{sealed.path} cannot be read: {error}. Restore it from a copy.") from error
    return found


def _components(cells: Line) -> dict[str, float]:
    return {name.removeprefix(REWARD): value for name, value in cells.items() if name.startswith(REWARD) and value is not None}


def _authors(segments: Sequence[Line], start: int, stop: int) -> list[list[Any]]:
    """[first, behind the last, author, version] of each segment of the response, counted from its beginning."""
    found = []
    for segment in segments:
        first, last = max(segment["start"], start), min(segment["stop"], stop)
        if first < last:
            unlearned = segment["author"] == "policy" and not segment["learned"]
            author = "d" if unlearned else AUTHORS[segment["author"]]
            found.append([first - start, last - start, author, segment["version"]])
    return found


def _rounded(values: NDArray[np.float32], digits: int) -> list[float | None]:
    return [_number(value, digits) for value in values.tolist()]


def _number(value: float, digits: int = 6) -> float | None:
    """JSON knows no other numbers than finite ones."""
    return round(value, digits) if math.isfinite(value) else None
