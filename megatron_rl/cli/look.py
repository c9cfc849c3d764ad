"""Commands that look and change nothing: settings, objectives, version."""

import platform
from collections.abc import Iterable
from importlib import metadata
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from megatron_rl import __version__
from megatron_rl.cli.screen import make_console, told_to_the_user
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.show import render_setting_list

if TYPE_CHECKING:
    from megatron_rl.objectives.catalogue import Entry

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

SOURCE_WIDTH = 20  # columns, enough for an arXiv number


def list_settings() -> None:
    """List every setting: its name, what it may be, its default and its meaning."""
    make_console().print(render_setting_list())


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

    console = make_console()
    if name is None:
        for kind, of_kind in groupby(catalogue(), key=lambda entry: entry.kind):
            console.print(_table_of_objectives(kind, of_kind))
        return
    with told_to_the_user():
        try:
            entries = look_up(name)
        except ValueError as error:
            raise SettingsError(f"{error} `megatron-rl objectives` lists all.") from error
    for entry in entries:
        console.print(_objective_in_full(entry))


def version() -> None:
    """Print the versions of this program and of what it stands on."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("megatron-rl", __version__)
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        table.add_row(package, _installed_version(package))
    make_console().print(table)


def _table_of_objectives(kind: str, entries: Iterable["Entry"]) -> Table:
    from megatron_rl.objectives.catalogue import written

    table = Table(kind, "formula", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("source", max_width=SOURCE_WIDTH)
    table.add_column("options")
    for entry in entries:
        options = "\n".join(f"{option.name} = {written(option.default)}" for option in entry.options)
        table.add_row(*map(Text, (entry.name, entry.formula, entry.source, options)))
    return table


def _objective_in_full(entry: "Entry") -> Group:
    from megatron_rl.objectives.catalogue import written

    options = Table("option", "allowed", "default", "meaning", box=box.SIMPLE_HEAD, pad_edge=False)
    for option in entry.options:
        options.add_row(*map(Text, (option.name, option.type_name, written(option.default), option.text)))
    head = Text(f"{entry.kind} {entry.name}" + (f"   {entry.source}" if entry.source else ""), style="bold")
    shown = (head, "", Text(entry.text), "", Text(entry.background), "")
    return Group(*shown, options if entry.options else Text("no options"), "")


def _installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
