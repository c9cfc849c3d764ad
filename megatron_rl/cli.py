"""The command line: `megatron-rl`. Commands import what they run when they run it, so that looking costs no torch."""

import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from megatron_rl import __version__
from megatron_rl.config.checks import require_valid
from megatron_rl.config.errors import SettingsError, UserError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.layout_map import smallest_world_size
from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import Settings
from megatron_rl.config.show import render_layout, render_setting_list, render_settings
from megatron_rl.train import ranks as ranks_module
from megatron_rl.train.upstream import quiet_upstream

if TYPE_CHECKING:
    from megatron_rl.objectives.catalogue import Entry

WRONG_SETTINGS = 2  # exit code, as for a command line that cannot be understood
PIPE_WIDTH = 160  # columns when the output is no terminal, which would tell its own
LOCAL_RANKS = 16  # no machine has more GPUs
PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "sglang",
    "sglang-router",
    "transformers",
    "datasets",
    "safetensors",
    "pydantic",
)

app = typer.Typer(
    name="megatron-rl",
    help="Reinforcement learning of mixture-of-experts language models on stock Megatron-core and SGLang.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.command(no_args_is_help=True)
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Settings file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=VALUE]...", help="Settings that differ from the file.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the settings and the layout, start nothing.")] = False,
    ranks: Annotated[bool, typer.Option("--ranks", help="With --dry-run: a row for every rank.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in run.directory.")] = False,
) -> None:
    """Train a policy, or see with `--dry-run` what would be trained and which rank would hold what.

    **Settings** come from CONFIG, from the files it names under `include:`, and from overrides on the command line;
    the later wins. `megatron-rl settings` lists them all.

    **Overrides** are a dotted name, `=` and a value as in YAML: numbers (`4`, `1e-6`), `true`, `false`, `null` for "not
    set", lists in quotes for the shell's sake (`'layout.pipeline_layers=[7,8]'`). A name that does not exist is an error
    that names the nearest one.

    **Examples**

    - `megatron-rl train recipe.yaml --dry-run`
    - `megatron-rl train recipe.yaml optimizer.lr=1e-6 run.steps=200`
    - `megatron-rl train recipe.yaml layout.tensor=4 layout.expert=8 layout.world_size=64 --dry-run --ranks`
    Ranks are started on this machine when no launcher has; for several machines use torchrun or SLURM:

    - `torchrun --nproc-per-node 8 -m megatron_rl.cli train recipe.yaml`
    """
    with _told_to_the_user():
        if "=" in str(config) and not config.exists():
            raise SettingsError(f"{config} is an override where the settings file should stand. Put the file first.")
        if ranks and not dry_run:
            raise SettingsError("--ranks shows the layout of a dry run. Add --dry-run.")
        settings = load_settings(config, overrides or [])
        if dry_run:
            _show_run(settings, ranks)
            return
        world_size = settings.layout.world_size or 1
        if world_size > 1 and not ranks_module.launched():
            _start_ranks(settings, world_size)
        quiet_upstream()
        from megatron_rl.train import objective, toy

        objective.build(settings.objective)
        toy.main(settings, resume=resume)


@app.command("settings")
def list_settings() -> None:
    """List every setting: its name, what it may be, its default and its meaning."""
    _console().print(render_setting_list())


@app.command("objectives")
def list_objectives(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show this one in full: a name, or package.module:Class.")
    ] = None,
) -> None:
    """List every advantage, surrogate, weight and penalty with its formula, source, options and their defaults.

    A run chooses among them in the section `objective:` of its settings. A name shows one of them in full; your own is
    named by its dotted path.

    - `megatron-rl objectives gspo`
    - `megatron-rl train recipe.yaml objective.surrogate=gspo objective.options.clip_low=3e-4 --dry-run`
    """
    from megatron_rl.objectives.catalogue import catalogue, look_up

    console = _console()
    if name is None:
        for kind, of_kind in groupby(catalogue(), key=lambda entry: entry.kind):
            console.print(_table_of_objectives(kind, of_kind))
        return
    with _told_to_the_user():
        try:
            entries = look_up(name)
        except ValueError as error:
            raise SettingsError(f"{error} `megatron-rl objectives` lists all.") from error
    for entry in entries:
        console.print(_objective_in_full(entry))


@app.command()
def version() -> None:
    """Print the versions of this program and of what it stands on."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("megatron-rl", __version__)
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        table.add_row(package, _installed_version(package))
    _console().print(table)


def main() -> None:
    """The console script."""
    app(prog_name="megatron-rl")


def _start_ranks(settings: Settings, world_size: int) -> None:
    """Run this same command as ranks of this machine, and end as they end."""
    if world_size > LOCAL_RANKS:
        raise SettingsError(
            f"layout.world_size = {world_size}: one machine starts {LOCAL_RANKS} ranks at most by itself. "
            "Launch the ranks with torchrun or SLURM, or look with --dry-run."
        )
    require_valid(settings, read_architecture(settings.policy.config), world_size)  # before torch is loaded so many times
    raise typer.Exit(ranks_module.start_local_ranks(world_size, sys.argv[1:]))


def _show_run(settings: Settings, all_ranks: bool) -> None:
    console = _console()
    console.print(render_settings(settings))
    architecture = read_architecture(settings.policy.config)
    world_size = settings.layout.world_size or smallest_world_size(settings.layout)
    require_valid(settings, architecture, world_size)
    if settings.layout.world_size is None:
        console.print(f"\nlayout.world_size is not set: shown for {world_size} ranks, the fewest that hold this layout")
    console.print()
    console.print(render_layout(settings, architecture, world_size, all_ranks=all_ranks))


def _table_of_objectives(kind: str, entries: Iterable["Entry"]) -> Table:
    from megatron_rl.objectives.catalogue import written

    table = Table(kind, "formula", "source", "options", box=box.SIMPLE_HEAD, pad_edge=False)
    for entry in entries:
        options = "\n".join(f"{option.name} = {written(option.default)}" for option in entry.options)
        table.add_row(*map(Text, (entry.name, entry.formula, "\n".join(entry.papers), options)))
    return table


def _objective_in_full(entry: "Entry") -> Group:
    from megatron_rl.objectives.catalogue import written

    options = Table("option", "allowed", "default", "meaning", box=box.SIMPLE_HEAD, pad_edge=False)
    for option in entry.options:
        options.add_row(*map(Text, (option.name, option.type_name, written(option.default), option.text)))
    head = Text(f"{entry.kind} {entry.name}" + (f"   {entry.source}" if entry.papers else ""), style="bold")
    shown = (head, "", Text(entry.text), "", Text(entry.background), "")
    return Group(*shown, options if entry.options else Text("no options"), "")


@contextmanager
def _told_to_the_user() -> Iterator[None]:
    """Errors that the user can mend end the program with a message, not with a traceback."""
    try:
        yield
    except UserError as error:
        if ranks_module.speaks():
            for line in str(error).splitlines():
                typer.echo(f"error: {line}", err=True)
        raise typer.Exit(WRONG_SETTINGS) from error


def _installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


if __name__ == "__main__":
    main()
