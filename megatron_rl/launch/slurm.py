"""A batch script for SLURM: what is asked for, and one call of `launch/slurm/job.sh`, which does the rest on the nodes."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config.rules.launching import gres, signal_seconds
from megatron_rl.launch.job import Job, commented

SCRIPT = "launch/slurm/job.sh"


def batch_script(job: Job) -> str:
    """The script as sbatch takes it. Nothing of the settings reaches the shell unquoted."""
    environment = [each.partition("=") for each in job.settings.launch.environment]
    lines = [
        "#!/usr/bin/env bash",
        *commented(f"megatron-rl launch {shlex.join(job.words)} --slurm --part {job.part}"),
        *commented(f"{job.logs} has to be there before this is submitted; --submit sees to it."),
        *(f"#SBATCH {option}" for option in _options(job)),
        "set -euo pipefail",
        *(f"export {name}={shlex.quote(value)}" for name, _, value in environment),
        *(f"module load {shlex.quote(module)}" for module in job.settings.launch.modules),
        *_sweep(job),
        _call(job),
    ]
    return "\n".join(lines) + "\n"


def _options(job: Job) -> Iterator[str]:
    launch = job.settings.launch
    runs = len(job.sweep)
    yield f"--job-name={job.name}{'-servers' if job.part == 'servers' else ''}"
    yield f"--nodes={job.nodes + job.server_nodes}"
    yield f"--ntasks-per-node={job.ranks_per_node if job.nodes else 1}"
    for name in ("partition", "account", "qos", "time"):
        if (value := getattr(launch, name)) is not None:
            yield f"--{name}={value}"
    if (devices := gres(job.settings)) is not None:
        yield f"--gres={devices}"
    if launch.cpus_per_rank is not None:
        yield f"--cpus-per-task={launch.cpus_per_rank}"
    if launch.exclusive:
        yield "--exclusive"
        yield "--mem=0"
    if runs:
        yield f"--array=0-{runs - 1}{f'%{launch.at_once}' if launch.at_once else ''}"
    yield f'--chdir="{job.folder}"'
    yield f'--output="{job.logs}/slurm-{"%A_%a" if runs else "%j"}.log"'
    yield "--open-mode=append"  # started again, a job goes on in the same log
    yield "--requeue" if launch.requeue else "--no-requeue"
    yield f"--signal=B:TERM@{signal_seconds(job.settings)}"
    yield from launch.sbatch


def _sweep(job: Job) -> Iterator[str]:
    """The words of each run of a job array, by its number."""
    if job.sweep:
        yield 'case "$SLURM_ARRAY_TASK_ID" in'
        for number, words in enumerate(job.sweep):
            yield f"    {number}) run=({shlex.join(words)}) ;;"
        yield "esac"


def _call(job: Job) -> str:
    """One line an argument, so that people can read it."""
    settings, launch = job.settings, job.settings.launch
    served = settings.cluster.server_nodes > 0 or job.colocated  # by servers that are launched, in this job or beside it
    # Servers of this job are its own: in a file that another run knows too, both would sample from both's.
    shared = settings.servers.urls_file if job.part != "all" else None
    given: list[tuple[str, object | None]] = [
        ("--nodes", job.nodes),
        ("--ranks-per-node", job.ranks_per_node),
        ("--cpus-per-rank", launch.cpus_per_rank),
        ("--server-nodes", job.server_nodes),
        ("--servers-per-node", job.servers_per_node if job.server_nodes or job.colocated else None),
        ("--urls", _beside(job, shared) if served else None),
        ("--api-key-file", _beside(job, settings.servers.api_key_file) if served else None),
        ("--logs", job.logs),
        ("--python", job.python),
        ("--requeue", launch.requeue),
        ("--container", launch.container),
        ("--runtime", launch.runtime if launch.container else None),
        *(("--mount", mount) for mount in _mounts(job)),
    ]
    words = [f"{name} {shlex.quote(str(value))}" for name, value in given if value is not None]
    if job.colocated:
        words.append("--colocated")
    asked = shlex.join(job.asked) + (' "${run[@]}"' if job.sweep else "")
    return " \\\n    ".join([f"exec {shlex.quote(str(job.checkout / SCRIPT))}", *words, f"-- {asked}"])


def _beside(job: Job, path: object | None) -> object | None:
    return None if path is None else job.folder / str(path)


def _mounts(job: Job) -> Iterator[str]:
    """The container sees this folder, the run's and the logs, whatever else it is given."""
    if job.settings.launch.container is None:
        return
    seen: list[Path] = []
    for path in (job.folder, job.run_directory, job.logs):
        if not any(path.is_relative_to(other) for other in seen):
            seen.append(path)
            yield f"{path}:{path}"
    yield from job.settings.launch.mounts
