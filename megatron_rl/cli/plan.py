"""`megatron-rl plan`: what a run would take, before anything is started."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.cli.arguments import Config, Overrides
from megatron_rl.cli.screen import make_console, told_to_the_user
from megatron_rl.config.checks import require_valid
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.layout_map import smallest_world_size
from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import Settings
from megatron_rl.plan.job import Job, Workload, workload_of
from megatron_rl.plan.machine import Machine, find_machine, known_machines, read_machine
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.show import as_json, render_plan, render_suggestions, settings_text
from megatron_rl.plan.suggest import suggestions, with_ranks

DOES_NOT_FIT = 1  # exit code

Gpus = Annotated[
    int | None,
    typer.Option("--gpus", min=1, help="GPUs of the policy; default: layout.world_size, or cluster's.", show_default=False),
]
Gpu = Annotated[str | None, typer.Option("--gpu", help="Kind of GPU, such as h100; default: cluster.gpu.", show_default=False)]
MachineFile = Annotated[
    Path | None,
    typer.Option("--machine", metavar="FILE", help="A machine file of your own in place of --gpu.", show_default=False),
]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        "--prompt-tokens", min=1, help="Mean tokens of a prompt; default: data.max_prompt_tokens, or 512.", show_default=False
    ),
]
ResponseTokens = Annotated[
    int | None,
    typer.Option(
        "--response-tokens", min=1, help="Mean tokens of a response; default: half of what is allowed.", show_default=False
    ),
]
Sft = Annotated[
    bool | None,
    typer.Option(
        "--sft/--train",
        help="Plan `megatron-rl sft`, which has no servers, or `train`; default: as `supervised:` and `rewards:` are set.",
        show_default=False,
    ),
]


def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Gpus = None,
    gpu: Gpu = None,
    machine: MachineFile = None,
    sft: Sft = None,
    suggest: Annotated[bool, typer.Option("--suggest", help="Rank the layouts that fit by predicted time.")] = False,
    top: Annotated[int, typer.Option("--top", min=1, help="With --suggest: so many.")] = 8,
    prompt_tokens: PromptTokens = None,
    response_tokens: ResponseTokens = None,
    json: Annotated[bool, typer.Option("--json", help="Every number, for programs: bytes and seconds.")] = False,
) -> None:
    """What a run would take, before the first GPU-hour: memory of every rank and server, whether it fits, the time of a step.

    **Parameters** of every rank, and with them weights, gradients and optimizer state, are exact. **Activations** are reckoned
    for a full pack (`batch.max_tokens`) with the settings' recomputation, for as many packs as a pipeline stage has in flight.
    **Times** come from a model of the machine: peaks, bandwidths and the shares of them that are reached. docs/clusters.md says
    how it is made and how far off it is: read times as good to some 30 %, and differences between layouts as hints.

    **GPUs**: `--gpus` and `--gpu`, else the section `cluster` of the settings. `--machine FILE` takes your own numbers, in a
    copy of one of the files in megatron_rl/plan/machines.

    **Supervised fine-tuning** has no servers: files with a section `supervised` and without rewards are planned as `megatron-rl
    sft` runs them; `--sft` and `--train` say it otherwise.

    **How long responses will be** nobody knows before; say it with `--response-tokens` when you do.

    **Examples**

    - `megatron-rl plan recipe.yaml --gpus 256 --gpu h100`
    - `megatron-rl plan recipe.yaml recompute.mode=full batch.max_tokens=16384`
    - `megatron-rl plan configs/recipes/sft.yaml configs/pairs/qwen3-30b-a3b-4x8-h100.yaml`
    - `megatron-rl plan recipe.yaml --gpus 64 --gpu h200 --suggest` for layouts to write into the settings
    - `megatron-rl plan recipe.yaml --json | jq .step_seconds`

    Ends with 1 when it does not fit, with 2 when the settings cannot work at all.
    """
    with told_to_the_user():
        settings = load_settings(config, overrides or [])
        if gpus is not None:
            settings = with_ranks(settings, gpus)
        work = workload_of(settings, prompt_tokens, response_tokens, supervised=sft)
        job = _job(settings, _machine(settings, gpu, machine), work, guess=not suggest)
        if suggest:
            _suggest(job, top, json)
            return
        require_valid(settings, job.architecture, job.world_size)
        made = Plan(job)
        if made.samples and made.servers < 1:
            raise SettingsError("\n".join(f"{problem}." for problem in made.server_problems))
        if json:
            typer.echo(as_json(made))
        else:
            make_console().print(render_plan(made))
        if not made.fits:
            _refuse(made)


def _machine(settings: Settings, gpu: str | None, file: Path | None) -> Machine:
    if file is not None:
        if gpu is not None:
            raise SettingsError(f"--gpu {gpu} and --machine {file} both say what the GPUs are. Give one of them.")
        return read_machine(file)
    name = gpu or settings.cluster.gpu or ("cpu" if settings.device.kind == "cpu" else None)
    if name is None:
        raise SettingsError(
            f"it is not known what GPUs to plan for. Give --gpu ({', '.join(known_machines())}), --machine FILE, or set "
            "cluster.gpu."
        )
    return find_machine(name)


def _job(settings: Settings, machine: Machine, work: Workload, *, guess: bool) -> Job:
    architecture = read_architecture(settings.policy.config)
    ranks = settings.world_size
    if ranks is None:
        if not guess:
            raise SettingsError("it is not known how many GPUs to suggest a layout for. Give --gpus, or set cluster.nodes.")
        ranks = smallest_world_size(settings.layout)
    return Job(settings, architecture, ranks, machine, work)


def _suggest(job: Job, most: int, json: bool) -> None:
    found = suggestions(job, most)
    if json:
        typer.echo(as_json(None, found))
    elif found:
        make_console().print(render_suggestions(found))
    if not found:
        typer.echo(f"error: {_no_layout(job)}", err=True)
        raise typer.Exit(DOES_NOT_FIT)


def _no_layout(job: Job) -> str:
    return (
        f"no layout of {job.world_size} x {job.machine.name} holds this {job.architecture.family} with packs of {job.pack:,} "
        "tokens. Take more GPUs (--gpus), lower batch.max_tokens, or plan one layout without --suggest to see what it takes."
    )


def _refuse(made: Plan) -> None:
    """Say why it does not fit and what would, and end."""
    for problem in made.problems:
        typer.echo(f"does not fit: {problem}.", err=True)
    if made.policy_problems:
        found = suggestions(made.job, 1)
        if found:
            typer.echo("what fits, and is fastest among what does:", err=True)
            typer.echo(settings_text(found[0].settings), err=True)
        else:
            typer.echo(_no_layout(made.job), err=True)
    raise typer.Exit(DOES_NOT_FIT)
