"""`megatron-rl launch`: a run on a cluster, as a script that is printed or submitted."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_rl.cli.arguments import Config, Overrides
from megatron_rl.cli.screen import make_console, tell_warnings, told_to_the_user
from megatron_rl.cli.train import require_buildable
from megatron_rl.config.checks import require_valid, warnings
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.load import load_settings
from megatron_rl.config.rules.launching import Part, Way, launch_problems
from megatron_rl.config.settings import Settings
from megatron_rl.launch.job import Job, sweep_of
from megatron_rl.launch.kubernetes import manifest
from megatron_rl.launch.slurm import SCRIPT, batch_script
from megatron_rl.launch.torchrun import machine_script
from megatron_rl.plan.job import is_supervised
from megatron_rl.rollout.bank.files import private_folder

HERE = Path(__file__).parents[2]  # the checkout that this program runs from
WRITERS = {"slurm": batch_script, "torchrun": machine_script, "kubernetes": manifest}


def launch(
    config: Config,
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="A batch script for sbatch.")] = False,
    torchrun: Annotated[bool, typer.Option("--torchrun", help="A script to start on each machine.")] = False,
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="A JobSet for kubectl.")] = False,
    part: Annotated[
        Literal["all", "train", "servers"],
        typer.Option("--part", help="all: one job. train, servers: one of two jobs that find each other by servers.urls_file."),
    ] = "all",
    sweep: Annotated[
        Path | None,
        typer.Option(
            "--sweep", metavar="FILE", help="SLURM: a job array, a run for each line of overrides.", show_default=False
        ),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Run sbatch on the script instead of printing it.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the script there.", show_default=False)
    ] = None,
) -> None:
    """Start a run on a cluster: check everything that a dry run checks, then print the script that would be executed.

    How many machines is the section `cluster:` of the settings, what is asked of the cluster the section `launch:`. Servers
    have machines of their own (`cluster.server_nodes`), share the trainer's GPUs (`servers.placement=colocated`), or are a
    job of their own that runs find by `servers.urls_file` (`--part servers`, `--part train`).

    Told to stop, by preemption or at the end of its time, a job saves and goes back into the queue; started again it goes
    on where it was. docs/launching.md has the rest.

    **Examples**

    - `megatron-rl launch recipe.yaml cluster.nodes=4 cluster.server_nodes=2 launch.gres=gpu:8 --slurm`
    - `megatron-rl launch recipe.yaml cluster.nodes=4 launch.time=24:00:00 launch.requeue=50 --slurm --submit`
    - `megatron-rl launch recipe.yaml cluster.nodes=1 --slurm --sweep runs.txt --submit` with lines such as `optimizer.lr=1e-6`
    - `megatron-rl launch recipe.yaml cluster.nodes=2 --torchrun -o start.sh`
    - `megatron-rl launch recipe.yaml cluster.nodes=4 --kubernetes > run.yaml`
    """
    with told_to_the_user():
        way = _way(slurm=slurm, torchrun=torchrun, kubernetes=kubernetes)
        _require_sense(way, sweep, submit)
        words = (str(config), *(overrides or []))
        settings = load_settings(config, words[1:])
        unwise = _require_launchable(settings, way, part)
        runs = () if sweep is None else sweep_of(_text(sweep), words, settings)
        _require_servers_of_their_own(settings, part, runs)
        unwise += [line for own in runs for line in _require_launchable(load_settings(config, [*words[1:], *own]), way, part)]
        if way == "torchrun" and part == "all" and settings.cluster.server_nodes:
            part = "train"  # of one script for each machine, servers have another
        checkout = Path.cwd() / (settings.launch.checkout or HERE)
        job = Job(settings, words, Path.cwd(), checkout, part, runs)
        script = WRITERS[way](job)
        tell_warnings(dict.fromkeys(unwise))  # runs of a sweep have most in common
        if submit:
            _submit(job, script, output)
        elif output is not None:
            _write(output, script)
            make_console().print(f"{output}: not submitted")
        else:
            typer.echo(script, nl=False)


def _way(**asked: bool) -> Way:
    chosen = [name for name, wanted in asked.items() if wanted]
    ways: dict[str, Way] = {"slurm": "slurm", "torchrun": "torchrun", "kubernetes": "kubernetes"}
    if len(chosen) != 1:
        raise SettingsError("where to launch is not said. Give one of --slurm, --torchrun and --kubernetes.")
    return ways[chosen[0]]


def _require_sense(way: Way, sweep: Path | None, submit: bool) -> None:
    if sweep is not None and way != "slurm":
        raise SettingsError(f"--sweep makes a job array of SLURM's, and --{way} has none. Launch each run by itself.")
    if submit and way != "slurm":
        then = "kubectl create -f FILE" if way == "kubernetes" else "start it on each machine"
        raise SettingsError(f"--submit is for --slurm. Write the script with -o FILE, then {then}.")
    if submit and shutil.which("sbatch") is None:
        raise SettingsError(
            "sbatch is not on this machine's PATH, so nothing can be submitted here. Do it on the cluster's login node, or "
            "write the script with -o FILE and take it there."
        )


def _require_launchable(settings: Settings, way: Way, part: Part) -> list[str]:
    """All that a dry run asks of settings, model and layout, and what launching asks besides; told at once. Returns what is
    allowed and unwise."""
    if is_supervised(settings):
        raise SettingsError(
            "these settings are of supervised fine-tuning (supervised without rewards), and what is launched is `megatron-rl "
            "train`. Start `megatron-rl sft` with them by srun or torchrun; docs/sft.md says how."
        )
    problems = list(launch_problems(settings, way, part))
    if problems:
        raise SettingsError("\n".join(problems))
    architecture, world_size = read_architecture(settings.policy.config), settings.world_size
    assert world_size is not None  # or launch_problems has said so
    require_valid(settings, architecture, world_size)
    require_buildable(settings)
    return warnings(settings, architecture, world_size)


def _require_servers_of_their_own(settings: Settings, part: Part, runs: Sequence[object]) -> None:
    """Runs at the same time that publish to the same servers would sample from each other's weights."""
    if runs and part == "servers":
        raise SettingsError("--sweep with --part servers: these are servers, and no runs. Remove --sweep.")
    servers = settings.servers
    elsewhere = (part == "train" or not settings.cluster.server_nodes) and not servers.starts_any and not servers.colocated
    if len(runs) > 1 and elsewhere and settings.bank.replay is None and settings.launch.at_once != 1:
        raise SettingsError(
            "the runs of a sweep would bring their weights to the same servers, each over the others'. Give each its own "
            "(cluster.server_nodes, without --part), or let one run at a time (launch.at_once=1)."
        )


def _write(path: Path, script: str) -> None:
    try:
        path.write_text(script)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}. Name a file in a folder that is there.") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"--sweep {path}: it cannot be read: {error}. Name a file with the overrides of a run a line."
        ) from error


def _submit(job: Job, script: str, output: Path | None) -> None:
    """What is submitted stays beside the logs."""
    _require_on_this_machine(job)
    for folder in (job.run_directory, job.logs):
        try:
            private_folder(folder)
        except OSError as error:
            raise SettingsError(f"{folder} cannot be made: {error.strerror}. Set run.directory, or launch.logs.") from error
    file = output or job.logs / f"{job.name}-{job.part}.sbatch"
    _write(file, script)
    answer = subprocess.run(["sbatch", "--parsable", str(file.absolute())], capture_output=True, text=True)
    if answer.returncode != 0:
        raise SettingsError(
            f"sbatch refused {file}: {answer.stderr.strip()}\nCorrect the section launch, or ask who runs the cluster."
        )
    number = answer.stdout.strip().partition(";")[0]
    logs = job.logs / f"slurm-{number}{'_N' if job.sweep else ''}.log"
    make_console().print(f"job {number} is submitted ({file}); its log: {logs}; scancel {number} ends it")


def _require_on_this_machine(job: Job) -> None:
    """Where a job is submitted, its nodes see the same files: what is missing here is missing there."""
    launch = job.settings.launch
    needed = {"launch.checkout": job.checkout / SCRIPT}
    if launch.venv is not None or launch.container is None:
        needed["launch.venv"] = Path(job.python)
    if launch.container is not None and launch.container.startswith((os.sep, ".")):
        needed["launch.container"] = job.folder / launch.container
    missing = [f"{name}: {path} is not there. Correct {name}." for name, path in needed.items() if not path.exists()]
    if missing:
        raise SettingsError("\n".join(missing))
