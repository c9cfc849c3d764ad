"""`megatron-rl rewards`: what rewards there are, and what the sandbox for programs can hold on this machine."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from megatron_rl.cli.screen import make_console, told_to_the_user
from megatron_rl.config.errors import SettingsError

if TYPE_CHECKING:
    from megatron_rl.rewards.registry import Entry

NOT_SAFE = 1  # exit code of --check where programs cannot be held


def rewards(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show this one in full: a name, or package.module:function.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Try to break out of the sandbox for programs, and tell what held.")
    ] = False,
) -> None:
    """List every reward with its options and an example. A name shows one of them in full.

    A run names its rewards in the section `rewards:` of its settings; the reward of a sample is their weighted sum:

        rewards:
          - {name: math, weight: 1.0, options: {boxed: true}}
          - {name: format, weight: 0.1, options: {tags: [think, answer]}}
          - {name: 'my_rewards:brevity', weight: 0.2, as: short}

    - `megatron-rl rewards code`
    - `megatron-rl rewards --check` ends with code 1 where programs cannot be held on this machine
    """
    from megatron_rl.rewards.registry import catalogue, entry

    with told_to_the_user():
        if check and name is not None:
            raise SettingsError("--check looks at this machine, not at a reward. Leave the name or --check out.")
        if check:
            _check()
        elif name is None:
            make_console().print(_table(catalogue()))
        else:
            try:
                found = entry(name)
            except ValueError as error:
                raise SettingsError(f"{name}: {error}") from error
            make_console().print(_in_full(found))


def _table(entries: Iterable["Entry"]) -> Table:
    table = Table("reward", "what it is", "options", box=box.SIMPLE_HEAD, pad_edge=False)
    for entry in entries:
        options = "\n".join(f"{option.name} = {option.default}" for option in entry.options)
        text = f"{entry.text.partition('\n')[0]}\n\n{entry.example}"
        table.add_row(*map(Text, (entry.name, text, options)))
        table.add_section()
    return table


def _in_full(entry: "Entry") -> Group:
    options = Table("option", "allowed", "default", "meaning", box=box.SIMPLE_HEAD, pad_edge=False)
    for option in entry.options:
        options.add_row(*map(Text, (option.name, option.allowed, option.default, option.text)))
    head = Text(f"reward {entry.name}", style="bold")
    return Group(head, "", Text(entry.text), "", Text(f"rewards: [{entry.example}]"), "", options)


def _check() -> None:
    """Exit code 0: everything that is essential holds."""
    import asyncio

    from megatron_rl.rewards.sandbox.probe import ESSENTIAL, MEANING, stand
    from megatron_rl.rewards.sandbox.runner import SandboxError

    try:
        standing = asyncio.run(stand())
    except SandboxError as error:
        raise SettingsError(str(error)) from error
    table = Table("limit", "holds", "what it means", box=box.SIMPLE_HEAD, pad_edge=False)
    for limit, meaning in MEANING.items():
        verdict = "yes" if limit in standing.held else "NO" if limit in ESSENTIAL else "no"
        table.add_row(limit, verdict, meaning)
    console = make_console()
    console.print(Text(f"walls: {standing.walls}"), table)
    for fault in standing.faults:
        console.print(Text(f"could not be built here: {fault}"))
    missing = [limit for limit in ESSENTIAL if limit not in standing.held]
    if missing:
        console.print(Text(f"Programs cannot be held here: {', '.join(missing)}. The reward `code` is refused."))
        raise typer.Exit(NOT_SAFE)
    console.print(Text("Programs can be held here: time and output with these walls too, and nothing is left running."))
