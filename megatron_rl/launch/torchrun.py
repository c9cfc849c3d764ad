"""A script that is started on every machine by hand, or by whatever starts things there: one call of `launch/torchrun.sh`."""

import shlex
from collections.abc import Iterator

from megatron_rl.launch.job import Job, commented

SCRIPT = "launch/torchrun.sh"


def machine_script(job: Job) -> str:
    """For one machine of the part: the ranks of a machine, or its servers."""
    lines = [
        "#!/usr/bin/env bash",
        *commented(f"megatron-rl launch {shlex.join(job.words)} --torchrun --part {job.part}"),
        *(_servers(job) if job.part == "servers" else _ranks(job)),
    ]
    return "\n".join(lines) + "\n"


def _ranks(job: Job) -> Iterator[str]:
    if job.nodes > 1:
        yield f"# To be started on each of {job.nodes} machines, with NODE_RANK=0 on the first, 1 on the second, and so on,"
        yield "# and with MASTER_ADDR=the address of the first on all of them."
    yield from _beginning(job)
    options = [f"--nnodes={job.nodes}", f"--nproc-per-node={job.ranks_per_node}"]
    if job.nodes > 1:
        yield ': "${MASTER_ADDR:?the address of the first machine}" "${NODE_RANK:?the number of this machine, from 0}"'
    python = ["--python", job.python]
    yield f"exec {shlex.join([str(job.checkout / SCRIPT), *python, *options, *job.asked])}"


def _servers(job: Job) -> Iterator[str]:
    """They listen where the others reach this machine, and end with Ctrl-C or SIGTERM."""
    yield f"# To be started on each of {job.server_nodes} machines, with HOST=the address at which the others reach it."
    yield from _beginning(job)
    yield ': "${HOST:?the address at which the others reach this machine}"'
    urls = job.folder / str(job.settings.servers.urls_file)
    words = [job.python, "-m", "megatron_rl.cli", "serve", *job.words]
    rest = ["--servers", str(job.servers_per_node), "--urls", str(urls)]
    logs = f'"servers.logs="{shlex.quote(str(job.logs))}"/servers-$HOST"'
    yield f'exec {shlex.join(words)} "servers.host=$HOST" {logs} {shlex.join(rest)}'


def _beginning(job: Job) -> Iterator[str]:
    yield "set -euo pipefail"
    yield f"cd {shlex.quote(str(job.folder))}"
    for name, _, value in (each.partition("=") for each in job.settings.launch.environment):
        yield f"export {name}={shlex.quote(value)}"
