"""What every command shows its user alike: the console, and errors that the user can mend."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from megatron_rl.config.errors import UserError
from megatron_rl.train import ranks

WRONG_SETTINGS = 2  # exit code, as for a command line that cannot be understood
PIPE_WIDTH = 160  # columns when the output is no terminal, which would tell its own


@contextmanager
def told_to_the_user() -> Iterator[None]:
    """Errors that the user can mend end the program with a message, not with a traceback."""
    try:
        yield
    except UserError as error:
        if ranks.speaks():
            for line in str(error).splitlines():
                typer.echo(f"error: {line}", err=True)
        raise typer.Exit(WRONG_SETTINGS) from error


def tell_warnings(warnings: Iterable[str]) -> None:
    """What is allowed and unwise, said once and not by every rank; standard output stays what was asked for."""
    if ranks.speaks():
        for line in warnings:
            typer.echo(f"warning: {line}", err=True)


def make_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)
