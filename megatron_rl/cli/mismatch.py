"""`megatron-rl mismatch`: how far policy and server are from each other, and why."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megatron_rl.cli.publish import require_urls
from megatron_rl.cli.screen import make_console, told_to_the_user
from megatron_rl.cli.starting import start_ranks
from megatron_rl.config.checks import require_valid
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import Settings
from megatron_rl.train.ranks import launched, speaks
from megatron_rl.train.upstream import quiet_upstream

if TYPE_CHECKING:
    from megatron_rl.fidelity.report import Report

DIFFERENT = 1  # exit code when policy and server differ by more than is allowed


Checkpoint = Annotated[
    Path,
    typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder or a checkpoint of ours (step_…).", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=VALUE]...", help="Settings of the policy, and of an own server.", show_default=False),
]
ServerUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="A server that runs; default: one is started.", show_default=False)
]
PromptText = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be given again.", show_default=False)]
PromptCount = Annotated[int, typer.Option(min=1, help="How many of the default prompts, where none is given.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens that the server samples for each.")]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.01, help="That the server samples at; default: policy.temperature.", show_default=False),
]
Allowed = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Largest mean |Δlogp|; a single token may be off by 100 times that. Default: 1e-4 in float32, 0.05 in "
        "bfloat16, 0.25 in FP8.",
        show_default=False,
    ),
]
Resend = Annotated[
    bool,
    typer.Option("--resend", help="Find differing weights: send the checkpoint's to --server, which then has them."),
]
Like = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The model the checkpoint was trained from.", show_default=False)
]
Out = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Write mismatch.html and mismatch.json here.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


def mismatch(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    server: ServerUrl = None,
    prompt: PromptText = None,
    prompts: PromptCount = 8,
    tokens: Tokens = 64,
    temperature: Temperature = None,
    tolerance: Allowed = None,
    resend: Resend = False,
    like: Like = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far the policy's log-probs are from a server's on the same tokens, and name what makes the difference.

    The server samples; the policy (Megatron-core) scores the very same tokens. |Δlogp| is told by position, by token
    probability and, for experts, by whether both sides chose the same ones in a layer. If it is more than rounding, one thing
    after another is made equal: temperature, config.json, number format, routing (R3), weights. What takes the difference away
    is named; what none of them does is left to kernels. FP8 layers of both sides are held against one another.

    Weights are compared by sending the checkpoint's again, tensor by tensor: those that change the server's scores were others.
    A server that is started for this is treated so when needed; one that runs only with --resend.

    The exit code is 0 when both agree, 1 when they do not, 2 when it could not be found out. See docs/fidelity.md.

    **Examples**

    - `megatron-rl mismatch Qwen3-30B-A3B --server http://127.0.0.1:30000 --out looked-at`
    - `megatron-rl mismatch runs/a/checkpoints/step_00000200 --server http://node1:30000 --resend`
    - `megatron-rl mismatch Qwen3-30B-A3B layout.expert=8 precision.fp8=transformer_engine --json`
    """
    with told_to_the_user():
        if server is not None:
            require_urls([server])
        if not launched():
            _require_folder(checkpoint)
        from megatron_rl.fidelity.setup import prompts_of, settings_of

        settings = settings_of(checkpoint, overrides or [], [server] if server is not None else [], like)
        if out is not None and speaks():
            _make(out)
        if not launched():
            require_valid(settings, read_architecture(settings.policy.config), settings.world_size or 1)
        start_ranks(settings)
        quiet_upstream()
        console = make_console()
        console.quiet = not speaks() or as_json
        asked, what = prompts_of(settings, prompt or (), prompts)
        console.print(f"{what}, {tokens} tokens sampled for each")
        drawn_at = settings.policy.temperature if temperature is None else temperature
        report = _look(settings, console, asked, tokens, drawn_at, tolerance, resend or server is None)
        if speaks():
            _tell(report, console, out, as_json)
    if speaks() and not report.within:  # a launcher ends all ranks with the first that ends so: the others leave well
        raise typer.Exit(DIFFERENT)


def _look(
    settings: Settings,
    console: Console,
    asked: list[list[int]],
    tokens: int,
    drawn_at: float,
    tolerance: float | None,
    may_send: bool,
) -> "Report":
    from megatron_rl.fidelity.bench import Draws, bench
    from megatron_rl.fidelity.examine import Wanted, examine
    from megatron_rl.fidelity.setup import opened_checkpoint, step_of
    from megatron_rl.policy.layout import Launch

    launch = Launch.from_environment()
    longest = max(map(len, asked)) + tokens
    with opened_checkpoint(settings) as source:
        wanted = Wanted(longest, drawn_at, may_send, tolerance, step_of(source))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)

        def tell(what: str) -> None:
            progress.update(task, description=what, total=None)
            if not console.is_terminal:
                console.print(what)

        if launch.rank != 0:
            return examine(settings, launch, None, wanted, tell)
        if not settings.servers.urls:
            tell("starting a server: half a minute on a small machine, minutes for a large model")
        draws = Draws(asked, tokens, drawn_at)
        with bench(settings, draws, lambda done, total: progress.update(task, completed=done, total=total)) as hands:
            return examine(settings, launch, hands, wanted, tell)


def _tell(report: "Report", console: Console, out: Path | None, as_json: bool) -> None:
    from megatron_rl.fidelity.picture import page

    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=1))
    else:
        _show(report, console)
    if out is not None:
        (out / "mismatch.json").write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
        (out / "mismatch.html").write_text(page(report), encoding="utf-8")
        console.print(f"the picture is {out / 'mismatch.html'}")


def _show(report: "Report", console: Console) -> None:
    table = Table("made equal", "mean |Δlogp|", "p99", "largest", "KL", "", box=None, pad_edge=False)
    for stage in (*report.stages, *report.aside):
        numbers = stage.compared.summary()
        cells = [f"{numbers[name]:.2e}" for name in ("mean", "p99", "max", "kl")]
        table.add_row(stage.name, *cells, "within tolerance" if stage.within else "")
    console.print(table)
    for line in report.notes:
        console.print(f"note: {line}", markup=False)
    for side, modules in report.quantized.items():
        for module, how in modules.items():
            console.print(f"FP8 in {side}: {module}, {how}", markup=False)
    console.print(report.verdict, markup=False, style="bold")


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--out {out} cannot be made: {error}. Name a folder.") from error


def _require_folder(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise SettingsError(f"{checkpoint} is no folder. Name a Hugging Face folder, or a checkpoint (step_…) of a run.")
