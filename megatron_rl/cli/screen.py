"""What every command shows its user alike: the console, and errors that the user can mend."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_rl.config.errors import UserError
from megatron_rl.train import ranks

WRONG_SETTINGS = 2  # exit code, as for a command line that cannot be understood
STOPPED = 143  # exit code of a run that was told to stop: the shell's for SIGTERM
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


class ByteProgress:
    """A bar with a rate where there is a terminal, and a line when the work is done."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(TextColumn(name), *columns, console=console, transient=True, disable=not console.is_terminal)
        self._done = 0
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, total: int) -> None:
        self._start = time.monotonic()
        self._task = self._bar.add_task(self._name, total=total)
        self._bar.start()

    def move(self, count: int) -> None:
        self._done += count
        self._bar.advance(self._task, count)

    def end(self) -> None:
        self._bar.stop()
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self._done / 1e6 / seconds
        self._console.print(f"{self._name}: {self._done / 1e6:,.1f} MB in {seconds:.1f} s, {rate:,.0f} MB/s")
