"""The arguments that every command with settings takes alike."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="Settings file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE.yaml|NAME=VALUE]...",
        help="Further settings files and single settings, laid over CONFIG in this order; the later wins.",
        show_default=False,
    ),
]
