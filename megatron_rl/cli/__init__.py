"""The command line: `megatron-rl`. Commands import what they run when they run it, so that looking costs no torch."""

import typer

from megatron_rl.cli import bank, data, look
from megatron_rl.cli.convert import convert
from megatron_rl.cli.doctor import doctor
from megatron_rl.cli.evaluate import evaluate
from megatron_rl.cli.launch import launch
from megatron_rl.cli.mismatch import mismatch
from megatron_rl.cli.plan import plan
from megatron_rl.cli.publish import publish
from megatron_rl.cli.report import report
from megatron_rl.cli.rewards import rewards
from megatron_rl.cli.rollout import rollout
from megatron_rl.cli.serve import serve
from megatron_rl.cli.sft import sft
from megatron_rl.cli.toy import toy
from megatron_rl.cli.train import train

app = typer.Typer(
    name="megatron-rl",
    help="Reinforcement learning of mixture-of-experts language models on stock Megatron-core and SGLang.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command(no_args_is_help=True)(train)
app.command(no_args_is_help=True)(plan)
app.command(no_args_is_help=True)(launch)
app.command(no_args_is_help=True)(convert)
app.command(no_args_is_help=True)(publish)
app.command(no_args_is_help=True)(serve)
app.command(no_args_is_help=True)(mismatch)
app.command(no_args_is_help=True)(toy)
app.command(no_args_is_help=True)(sft)
app.command("eval", no_args_is_help=True)(evaluate)
app.command("settings")(look.list_settings)
app.command("objectives")(look.list_objectives)
app.command()(rewards)
app.command()(doctor)
app.command(no_args_is_help=True)(rollout)
app.command(no_args_is_help=True)(report)
app.command()(look.version)
app.add_typer(data.app, name="data")
app.add_typer(bank.app, name="bank")


def main() -> None:
    """The console script."""
    app(prog_name="megatron-rl")
