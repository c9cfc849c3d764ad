"""Convert a checkpoint: `megatron-rl convert` as a script, for where the package is not installed.

python tools/convert_checkpoint.py --from Qwen3-30B-A3B --to qwen3-tp2 --format megatron layout.tensor=2
"""

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rl.cli.convert import convert

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.command(no_args_is_help=True)(convert)
    app()
