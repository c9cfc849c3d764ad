"""`megatron-rl data`: look at prompts before anybody pays for answers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_rl.cli.arguments import Config, Overrides
from megatron_rl.cli.screen import make_console, told_to_the_user
from megatron_rl.config.checks import require_valid
from megatron_rl.config.families import read_architecture
from megatron_rl.config.layout_map import smallest_world_size
from megatron_rl.config.load import load_settings

if TYPE_CHECKING:
    from megatron_rl.data.prompts import Draw, PromptStream

BARS = 10  # of a histogram
BAR_WIDTH = 40

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def data() -> None:
    """Look at the prompts of a run."""


@app.command(no_args_is_help=True)
def show(
    config: Config,
    overrides: Overrides = None,
    number: Annotated[int, typer.Option("--number", "-n", min=0, help="How many prompts to print.")] = 3,
    start: Annotated[int, typer.Option("--start", min=0, help="The position of the first: 0 is what a run draws first.")] = 0,
    part: Annotated[Literal["train", "validation"], typer.Option("--part", help="Which prompts.")] = "train",
) -> None:
    """Print prompts as the model will see them, with counts and a histogram of their lengths.

    Prompts are read, tokenised and filtered exactly as a run would; then the first of them are decoded again from their token
    ids, special tokens visible, with the fields that rewards will read. Everything that is wrong with a source
    (a missing column, no rows left, no chat template, a tokenizer of another model) is told here as it would be at start-up.

    **Sources** are named in the settings file:

        data:
          sources:
            - {path: train.jsonl, prompt: question, answer: solution}
            - {path: openai/gsm8k, subset: main, prompt: question, answer: answer, weight: 3}
            - {path: "my_package.my_module:rows", messages: messages}
            - {path: "task:countdown", options: {difficulty: 3, rows: 5000}}

    **Examples**

    - `megatron-rl data show recipe.yaml -n 5`
    - `megatron-rl data show recipe.yaml --part validation`
    - `megatron-rl data show recipe.yaml data.chat_template_kwargs.enable_thinking=false -n 1`
    """
    with told_to_the_user():
        settings = load_settings(config, overrides or [])
        architecture = read_architecture(settings.policy.config)
        require_valid(settings, architecture, settings.world_size or smallest_world_size(settings.layout))
        from megatron_rl.data.prompts import open_prompts, open_tokenizer

        tokenizer = open_tokenizer(settings, vocab=architecture.vocab)
        stream = open_prompts(settings, tokenizer, part)
        draws = [stream.at(position) for position in range(start, start + number)]
        texts = [tokenizer.decode(draw.prompt.tokens.tolist()) for draw in draws]
    console = make_console()
    for draw, text in zip(draws, texts, strict=True):
        _print_prompt(console, draw, text)
    console.print(_counts(stream))
    console.print(_histogram([length for source in stream.sources for length in source.lengths.tolist()]))


def _print_prompt(console: Console, draw: "Draw", text: str) -> None:
    prompt = draw.prompt
    limit = "" if prompt.max_new_tokens is None else f", at most {prompt.max_new_tokens} new"
    console.rule(
        Text(f"position {draw.position}   {prompt.key}   {len(prompt.tokens)} tokens{limit}", style="bold"), align="left"
    )
    console.print(Text(text), soft_wrap=True)
    for name, value in prompt.fields.items():
        console.print(Text.assemble((f"{name} = ", "cyan"), str(value)), soft_wrap=True)
    console.print()


def _counts(stream: "PromptStream") -> RenderableType:
    """What became of the rows, source by source."""
    kinds = list(stream.counts)
    table = Table("source", "share", *kinds, box=box.SIMPLE_HEAD, pad_edge=False)
    for source, share in zip(stream.sources, stream.shares, strict=True):
        table.add_row(Text(source.name), f"{share:.1%}", *(f"{source.counts[kind]:,}" for kind in kinds))
    return table


def _histogram(lengths: Sequence[int]) -> RenderableType:
    """Prompts by length, in equal steps from the shortest to the longest."""
    ordered = sorted(lengths)
    shortest, longest = ordered[0], ordered[-1]
    width = -(-(longest - shortest + 1) // BARS)
    counts = [0] * ((longest - shortest) // width + 1)
    for length in lengths:
        counts[(length - shortest) // width] += 1
    title = f"tokens of a prompt: shortest {shortest}, median {ordered[len(ordered) // 2]}, longest {longest}"
    table = Table("tokens", "prompts", "", box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for number, count in enumerate(counts):
        bar = "█" * round(BAR_WIDTH * count / max(counts))
        first = shortest + number * width
        table.add_row(f"{first}" if width == 1 else f"{first}-{first + width - 1}", f"{count:,}", bar)
    return table
