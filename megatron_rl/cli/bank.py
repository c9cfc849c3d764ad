"""`megatron-rl bank`: look inside a bank of rollouts."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_rl.cli.screen import make_console, told_to_the_user
from megatron_rl.config.errors import BankError, DataError, SettingsError

if TYPE_CHECKING:
    from megatron_rl.data.tokenizer import Tokenizer
    from megatron_rl.rollout.bank.looking import Found, Summary, Wanted
    from megatron_rl.rollout.bank.reader import BankReader
    from megatron_rl.rollout.bank.schema import Decode

# Colours of a token by the probability with which it was drawn.
COLOURS = ((0.9, "green"), (0.5, "cyan"), (0.1, "yellow"), (0.01, "magenta"), (0.0, "bold red"))
OTHERS = {"prompt": "dim", "environment": "blue"}

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

Bank = Annotated[Path, typer.Argument(metavar="BANK", help="The bank's folder, or the run's.", show_default=False)]
Step = Annotated[int | None, typer.Option("--step", min=0, help="This training step alone.")]
TokenizerName = Annotated[
    str | None, typer.Option("--tokenizer", help="Folder or hub name. Default: the one that the bank names.")
]
Least = Annotated[float | None, typer.Option("--min-reward", help="Samples with at least this reward.")]
Most = Annotated[float | None, typer.Option("--max-reward", help="Samples with at most this reward.")]
Component = Annotated[
    str | None, typer.Option("--reward", metavar="NAME", help="The two limits mean this component, not the whole reward.")
]
Finish = Annotated[
    Literal["stop", "length", "abort", "budget", "error"] | None, typer.Option("--finish", help="Samples that ended so.")
]
Failed = Annotated[bool, typer.Option("--failed", help="Samples without an honest reward.")]
Key = Annotated[str | None, typer.Option("--group", metavar="KEY", help="The samples of this group.")]


@app.callback()
def bank() -> None:
    """Look inside a bank of rollouts: what was asked and said, how likely each token was, what it earned.

    BANK is the folder of a bank, or of a run that has one. A bank can be looked at while a run writes it. Its sealed steps are
    Parquet files that `datasets`, pandas and duckdb open directly: `BANK/steps/*.parquet` (docs/bank.md has the columns).
    """


@app.command(no_args_is_help=True)
def show(
    bank: Bank,
    step: Step = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many samples at most.")] = 4,
    group: Key = None,
    least: Least = None,
    most: Most = None,
    reward: Component = None,
    finish: Finish = None,
    failed: Failed = False,
    tokenizer: TokenizerName = None,
    ids: Annotated[bool, typer.Option("--ids", help="Token ids; no tokenizer is loaded.")] = False,
) -> None:
    """Print samples: prompt, response with every token coloured by its probability, rewards, weight versions, segments.

    - `megatron-rl bank show runs/my-run --step 12`
    - `megatron-rl bank show runs/my-run --min-reward 1 -n 2`
    - `megatron-rl bank show runs/my-run --group arithmetic/17@301`
    """
    from megatron_rl.rollout.bank.looking import samples

    with told_to_the_user(), _opened(bank) as reader:
        decoder = None if ids else _tokenizer(reader, tokenizer)
        wanted = _wanted(reader, step, group, least, most, reward, finish, failed)
        console = make_console()
        console.print(_legend())
        shown = 0
        for found in islice(samples(reader, wanted, step=step), number):
            _print_sample(console, found, decoder)
            shown += 1
        _say_if_none(shown)


@app.command(no_args_is_help=True)
def grep(
    bank: Bank,
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="A regular expression (Python's).", show_default=False)],
    step: Step = None,
    prompts: Annotated[bool, typer.Option("--prompts", help="Search prompts, not responses.")] = False,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", "-i", help="Capitals do not matter.")] = False,
    count: Annotated[bool, typer.Option("--count", "-c", help="Print only how many samples match.")] = False,
    least: Least = None,
    most: Most = None,
    reward: Component = None,
    finish: Finish = None,
    failed: Failed = False,
    tokenizer: TokenizerName = None,
) -> None:
    r"""Search the texts of a bank, by regular expression and by reward. Ends with code 1 when nothing matches.

    - `megatron-rl bank grep runs/my-run '\\boxed' --max-reward 0`
    - `megatron-rl bank grep runs/my-run 'wait|hmm' -i -c --step 12`
    - `megatron-rl bank grep runs/my-run . --reward format --min-reward 1`
    """
    from megatron_rl.rollout.bank.looking import NEEDS, TEXTS, matches, require_texts, samples
    from megatron_rl.rollout.bank.schema import REWARD

    with told_to_the_user(), _opened(bank) as reader:
        try:
            expression = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
        except re.error as error:
            raise SettingsError(
                f"PATTERN = {pattern}: {error}. Write a regular expression; `\\` takes a sign as it is."
            ) from error
        text = "prompt_text" if prompts else "response_text"
        names = [*NEEDS, *TEXTS, "sample", "prompt_length", "tokens"]
        wanted = _wanted(reader, step, None, least, most, reward, finish, failed)
        names += [f"{REWARD}{reward}"] if reward else []
        console, hits = make_console(), 0
        for found in samples(reader, wanted, step=step, names=names, decode=_decode(reader, tokenizer)):
            require_texts(found.cells, [text])
            lines = matches(found.cells[text], expression)
            hits += bool(lines)
            if lines and not count:
                console.print(Text(f"{found.place}  reward {found.cells['reward']:g}", style="bold"))
                for before, inside, after in lines:
                    console.print(Text.assemble("    ", before, (inside, "bold red"), after), soft_wrap=True)
        console.print(f"{hits} samples match")
    if not hits:
        raise typer.Exit(1)


@app.command(no_args_is_help=True)
def export(
    bank: Bank,
    target: Annotated[Path, typer.Argument(metavar="FILE", help="What to write: .jsonl or .parquet.", show_default=False)],
    step: Step = None,
    group: Key = None,
    least: Least = None,
    most: Most = None,
    reward: Component = None,
    finish: Finish = None,
    failed: Failed = False,
    routing: Annotated[bool, typer.Option("--routing", help="With the experts of every token, which are large.")] = False,
) -> None:
    """Write sealed samples to one file, every column kept, also columns that others have added to the steps.

    In JSON lines NaN and infinity are null, bytes base64, and columns that hold JSON are spelled out.

    - `megatron-rl bank export runs/my-run good.jsonl --min-reward 1`
    - `megatron-rl bank export runs/my-run step12.parquet --step 12 --routing`
    """
    from megatron_rl.rollout.bank.export import export as export_samples

    with told_to_the_user(), _opened(bank) as reader:
        wanted = _wanted(reader, step, group, least, most, reward, finish, failed)
        count = export_samples(reader, target, wanted, step=step, routing=routing)
    make_console().print(f"{count:,} samples written to {target}")


@app.command(no_args_is_help=True)
def stats(bank: Bank) -> None:
    """One line a training step: groups, rewards, lengths, how responses ended, weight versions; then what is not sealed yet.

    *equal* counts groups whose samples all earned the same: they teach nothing.
    """
    from megatron_rl.rollout.bank.looking import summaries

    with told_to_the_user(), _opened(bank) as reader:
        found = summaries(reader)
    names = sorted({name for summary in found for name in summary.components})
    table = Table(
        "", "groups", "samples", "reward", "±", *names, "equal", "new tokens", "longest", "ended", "failed", "versions",
        box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for summary in found:
        table.add_row(*_row(summary, names))
    console = make_console()
    console.print(table)
    _say_if_none(len(found))


def _row(summary: "Summary", names: list[str]) -> list[str]:
    components = [summary.components.get(name, []) for name in names]
    return [
        summary.where,
        f"{len(summary.by_group):,}",
        f"{len(summary.rewards):,}",
        f"{summary.mean_reward:.3f}",
        f"{summary.spread:.3f}",
        *(f"{sum(values) / len(values):.3f}" if values else "-" for values in components),
        f"{summary.equal_groups}",
        f"{sum(summary.lengths) / len(summary.lengths):.0f}",
        f"{max(summary.lengths)}",
        " ".join(f"{name} {count}" for name, count in summary.finishes.most_common()),
        f"{summary.failures}",
        _versions(min(summary.versions, default=None), max(summary.versions, default=None)),
    ]


@contextmanager
def _opened(path: Path) -> "Iterator[BankReader]":
    """The bank of a folder, or of a run's folder."""
    from megatron_rl.rollout.bank.reader import BankReader

    inside = path / "bank"
    with BankReader(inside if not (path / "bank.json").exists() and inside.is_dir() else path) as reader:
        yield reader


def _wanted(
    reader: "BankReader",
    step: int | None,
    group: str | None,
    least: float | None,
    most: float | None,
    reward: str | None,
    finish: str | None,
    failed: bool,
) -> "Wanted":
    from megatron_rl.rollout.bank.looking import Wanted, require_reward

    if least is not None and most is not None and least > most:
        raise BankError(f"--min-reward {least:g} is above --max-reward {most:g}: no sample can be both.")
    if reward is not None:
        require_reward(reader, reward, step)
    return Wanted(group, least, most, reward, finish, failed or None)


def _tokenizer(reader: "BankReader", name: str | None) -> "Tokenizer | None":
    """The tokenizer asked for, or the one that the bank names, if it names one."""
    path = name or reader.tokenizer
    if path is None:
        return None
    from megatron_rl.data.tokenizer import Tokenizer

    try:
        return Tokenizer(path)
    except DataError as error:
        raise BankError(f"{error} Here it is --tokenizer that names one; `bank show --ids` needs none.") from error


def _decode(reader: "BankReader", name: str | None) -> "Decode | None":
    """Ids to text by that tokenizer, which is loaded for the first text that the bank has not kept."""
    if (name or reader.tokenizer) is None:
        return None
    loaded = cache(partial(_tokenizer, reader, name))

    def decode(ids: Sequence[int]) -> str:
        tokenizer = loaded()
        assert tokenizer is not None, "one is named"
        return tokenizer.decode(ids)

    return decode


def _print_sample(console: Console, found: "Found", decoder: "Tokenizer | None") -> None:
    cells = found.cells
    console.rule(Text(found.place, style="bold"), align="left")
    rewards = {name.removeprefix("reward_"): value for name, value in cells.items() if name.startswith("reward_")}
    named = "  ".join(f"{name} {value:g}" for name, value in rewards.items() if value is not None)
    console.print(Text.assemble(("reward ", "bold"), (f"{cells['reward']:g}", "bold"), f"  {named}"))
    new = cells["length"] - cells["prompt_length"]
    versions = _versions(cells["oldest_version"], cells["newest_version"])
    console.print(
        Text(f"{cells['prompt_length']} + {new} tokens, {cells['loss_tokens']} learned, {cells['finish']}, versions {versions}")
    )
    if cells["failure"] is not None:
        console.print(Text(f"failed: {cells['failure']}", style="red"))
    console.print(Text("segments: " + "  ".join(_segment(segment) for segment in cells["segments"])))
    console.print(_coloured(cells, decoder), soft_wrap=True)
    console.print()


def _coloured(cells: Mapping[str, Any], decoder: "Tokenizer | None") -> Text:
    """The tokens of a sample: the policy's by probability, others by author. Ids where nothing decodes them."""
    ids = cells["tokens"].tolist()
    pieces = decoder.pieces(ids) if decoder else [f"{token} " for token in ids]
    text = Text()
    for segment in cells["segments"]:
        for place in range(segment["start"], segment["stop"]):
            style = OTHERS.get(segment["author"]) or _colour(float(cells["log_probs"][place]))
            text.append(pieces[place], style)
    if decoder is None and cells.get("response_text") is not None:
        text = Text.assemble((cells["prompt_text"], "dim"), cells["response_text"], "\n", text)
    return text


def _colour(log_prob: float) -> str:
    probability = math.exp(min(log_prob, 0.0)) if not math.isnan(log_prob) else 0.0
    return next(colour for least, colour in COLOURS if probability >= least)


def _legend() -> Text:
    text = Text("probability of a token: ")
    for least, colour in COLOURS:
        text.append(f"≥ {least:g} " if least else "less ", colour)
    text.append("  prompt", OTHERS["prompt"]).append("  environment", OTHERS["environment"])
    return text


def _segment(segment: Mapping[str, Any]) -> str:
    version = "" if segment["version"] is None else f" v{segment['version']}"
    learned = "" if segment["learned"] or segment["author"] != "policy" else " not learned"
    return f"[{segment['start']}, {segment['stop']}) {segment['author']}{version}{learned}"


def _versions(oldest: int | None, newest: int | None) -> str:
    if oldest is None:
        return "-"
    return f"{oldest}" if oldest == newest else f"{oldest}-{newest}"


def _say_if_none(shown: int) -> None:
    if not shown:
        typer.echo("no sample fits", err=True)
