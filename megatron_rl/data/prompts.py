"""Prompts in their order: what rollouts draw from.

Rows are tokenised once, into an Arrow file beside the rows; the same rows, template and tokenizer find it again. A stream has
one number of its own, its position. Whatever stands at a position follows from the settings, so that any process on any
number of ranks finds the same prompt there.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
from numpy.typing import NDArray

from megatron_rl.config.data_settings import DataSettings
from megatron_rl.config.errors import DataError
from megatron_rl.config.settings import Settings
from megatron_rl.data.conversations import Renderer
from megatron_rl.data.order import Interleave, epoch_order, held_out
from megatron_rl.data.sources import Source, digest, shown_to_people
from megatron_rl.data.tokenizer import Tokenizer, read_chat_template
from megatron_rl.types import Prompt

type Part = Literal["train", "validation"]

TOKENISED = datasets.Features({"tokens": datasets.List(datasets.Value("int32")), "length": datasets.Value("int32")})
EPOCHS_HELD = 2  # orders in memory for each source: of this epoch and its neighbour


class Draw(NamedTuple):
    """A prompt and where it stood. A position comes once: with the prompt's key it names a group for good."""

    position: int
    epoch: int  # how often its source had been gone through before
    prompt: Prompt


class PromptSource:
    """The usable rows of one source, as prompts."""

    def __init__(self, source: Source, renderer: Renderer, settings: DataSettings, part: Part, share: float) -> None:
        self.name, self.weight = source.name, source.settings.weight
        self._source = source
        source.require_columns()
        self._tokenised = self._tokenise(renderer)
        lengths = self._tokenised.data.column("length").to_numpy()
        chosen = (
            held_out(len(lengths), self.name, share) == (part == "validation") if share else np.ones(len(lengths), np.bool_)
        )
        longest = settings.max_prompt_tokens or np.iinfo(np.int32).max
        self.counts = {
            "rows": int(chosen.sum()),
            "empty": int((chosen & (lengths == 0)).sum()),
            "too long": int((chosen & (lengths > longest)).sum()),
        }
        if self.counts["too long"] and settings.too_long == "error":
            row = int(np.flatnonzero(chosen & (lengths > longest))[0])
            raise DataError(
                f"data source {source.settings.path}: {self.counts['too long']:,} prompts are longer than "
                f"data.max_prompt_tokens = {longest}; the first is row {row} with {lengths[row]} tokens. "
                "Raise the limit, or set data.too_long=drop."
            )
        self.kept: NDArray[np.int64] = np.flatnonzero(chosen & (lengths > 0) & (lengths <= longest))
        self.lengths: NDArray[np.int64] = lengths[self.kept].astype(np.int64)
        self.counts["kept"] = len(self.kept)
        if not len(self.kept):
            told = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
            raise DataError(
                f"data source {source.settings.path} has no rows left for {part}: {told}. {_way_out(self.counts, part)}"
            )

    def prompt(self, place: int) -> Prompt:
        """The prompt of the place-th usable row."""
        row = int(self.kept[place])
        cells = self._source.rows[row]
        limit = self._source.settings.max_new_tokens
        return Prompt(
            key=f"{self.name}/{row}",
            tokens=np.array(self._tokenised[row]["tokens"], dtype=np.int64),
            messages=tuple(self._messages(cells)),
            fields={name: cells[column] for name, column in self._source.field_columns.items()},
            max_new_tokens=None if limit is None or cells[limit] is None else int(cells[limit]),
        )

    def evenly(self, most: int | None) -> Iterator[Prompt]:
        """Every usable row once, or at most so many, evenly spread over them: the same ones every time."""
        count = len(self.kept) if most is None else min(most, len(self.kept))
        return (self.prompt(place * len(self.kept) // count) for place in range(count))

    def _tokenise(self, renderer: Renderer) -> datasets.Dataset:
        rows, own = self._source.rows, self._source.settings
        self._messages = renderer.conversation_of(self._source)
        relevant = own.model_dump(include={"path", "prompt", "messages", "wording", "system"})
        with shown_to_people():
            return rows.map(
                renderer.tokens_of_rows,
                fn_kwargs={"source": own.path, "messages": self._messages},
                with_indices=True,
                batched=True,
                remove_columns=self._source.columns,
                features=TOKENISED,
                new_fingerprint=digest(rows._fingerprint, relevant, renderer.fingerprint()),
                desc=f"tokenising {self.name}",
            )


class PromptStream:
    """Prompts without end, or one after the other by position. Drawing moves `position`, and nothing else ever changes."""

    def __init__(self, sources: Sequence[PromptSource], *, seed: int, shuffle: bool) -> None:
        self.sources, self._seed, self._shuffle = sources, seed, shuffle
        self._interleave = Interleave.of([source.weight or len(source.kept) for source in sources])
        self._order = lru_cache(EPOCHS_HELD * len(sources))(self._make_order)
        self.position = 0

    def __len__(self) -> int:
        """Usable rows of all sources."""
        return sum(len(source.kept) for source in self.sources)

    @property
    def counts(self) -> Mapping[str, int]:
        """Rows by what became of them, of all sources together."""
        total: Counter[str] = Counter()
        for source in self.sources:
            total.update(source.counts)
        return total

    @property
    def shares(self) -> list[float]:
        """How much of all prompts each source gives."""
        return [weight / self._interleave.period for weight in self._interleave.weights]

    def at(self, position: int) -> Draw:
        """What stands at a position."""
        number, epoch, place = self.place(position)
        return Draw(position, epoch, self.sources[number].prompt(place))

    def place(self, position: int) -> tuple[int, int, int]:
        """Where that is: the number of the source, the epoch, and the place among its usable rows. Reads no row."""
        number, turn = self._interleave.at(position)
        epoch, place = divmod(turn, len(self.sources[number].kept))
        return number, epoch, int(self._order(number, epoch)[place]) if self._shuffle else place

    def take(self, count: int, *, rank: int = 0, ranks: int = 1) -> list[Draw]:
        """The next so many, of which a rank among several gets its share: all ranks together get them all, once."""
        first, self.position = self.position, self.position + count
        return [self.at(position) for position in range(first, self.position) if position % ranks == rank]

    def once(self) -> Iterator[Draw]:
        """Every usable row once, as validation wants it."""
        place = 0
        for source in self.sources:
            for own in range(len(source.kept)):
                yield Draw(place, 0, source.prompt(own))
                place += 1

    def state(self) -> dict[str, Any]:
        """Where the stream stands, and of what; JSON."""
        return {"position": self.position, **self._identity()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream stood. Raises DataError if it was one of other prompts or another order."""
        identity = json.loads(json.dumps(self._identity()))
        for name, value in identity.items():
            if state.get(name) != value:
                raise DataError(
                    f"data: the saved position belongs to {name} = {json.dumps(state.get(name))}, and now it is "
                    f"{json.dumps(value)}: the same position would be another prompt. "
                    "Restore the settings and files under data, or start a new run."
                )
        self.position = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        """What a position means something for."""
        usable = {source.name: len(source.kept) for source in self.sources}
        return {"seed": self._seed, "shuffle": self._shuffle, "rows": usable, "weights": list(self._interleave.weights)}

    def _make_order(self, number: int, epoch: int) -> NDArray[np.int64]:
        source = self.sources[number]
        return epoch_order(len(source.kept), source.name, self._seed, epoch)


def open_tokenizer(settings: Settings, *, vocab: int | None = None) -> Tokenizer:
    """The tokenizer of the settings, checked against the number of tokens that the model knows, where that is given."""
    config = settings.policy.config
    own = str(config if config.is_dir() else config.parent)
    template = settings.data.chat_template
    tokenizer = Tokenizer(
        settings.data.tokenizer or own, chat_template=None if template is None else read_chat_template(Path(template))
    )
    if vocab is not None:
        tokenizer.require_fits(vocab)
    if settings.data.template == "chat":
        tokenizer.require_template(settings.data.chat_template_kwargs)
    return tokenizer


def open_prompts(settings: Settings, tokenizer: Tokenizer, part: Part = "train") -> PromptStream:
    """The prompts of the settings: read, tokenised, filtered. Everything that can be wrong with them is told here."""
    data = settings.data
    wanted = [(source, data.validation_share) for source in data.sources if part == "train" or data.validation_share]
    if part == "validation":
        wanted += [(source, 0.0) for source in data.validation_sources]
    if not wanted:
        advice = "Name one, such as data.sources=[{path: task:arithmetic}]"
        advice = advice if part == "train" else "Set data.validation_share or data.validation_sources"
        raise DataError(f"data: there are no sources of {part} prompts. {advice}.")
    renderer = Renderer(tokenizer, data)
    sources = [PromptSource(Source(own, data.cache), renderer, data, part, share) for own, share in wanted]
    _require_distinct_names(sources)
    seed = settings.run.seed if data.seed is None else data.seed
    return PromptStream(sources, seed=seed, shuffle=data.shuffle and part == "train")


def _require_distinct_names(sources: Sequence[PromptSource]) -> None:
    names = Counter(source.name for source in sources)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise DataError(f"data: two sources are called {twice[0]}: their prompts could not be told apart. Set `name` of one.")


def _way_out(counts: Mapping[str, int], part: Part) -> str:
    if not counts["rows"]:
        return "Raise data.validation_share." if part == "validation" else "Lower data.validation_share."
    if counts["too long"] > counts["empty"]:
        return "Raise data.max_prompt_tokens."
    return "Look at the column that prompts are made of."
