"""Settings of how a run is started on a cluster: what is asked of SLURM or Kubernetes, and what programs run in there."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_rl.config.section import Section


class LaunchSettings(Section):
    """How `megatron-rl launch` starts a run on the machines of the section `cluster`. See docs/launching.md."""

    name: str | None = Field(None, description="Name of the job; default: that of the run's folder.")
    partition: str | None = Field(None, description="SLURM: the partition; default: the cluster's own.")
    account: str | None = Field(None, description="SLURM: the account that pays.")
    qos: str | None = Field(None, description="SLURM: quality of service.")
    time: str | None = Field(None, description="SLURM: the time limit, such as 24:00:00 or 7-00; default: the partition's.")
    gres: str | None = Field(
        None,
        description="SLURM: what each node must have, such as gpu:h100:8; default: gpu:N of cluster.gpus_per_node where "
        "cluster.gpu is set; none: nothing is asked.",
    )
    exclusive: bool = Field(True, description="SLURM: whole nodes, with all their cores and memory.")
    cpus_per_rank: PositiveInt | None = Field(None, description="SLURM: cores of a rank; default: all that the job has there.")
    sbatch: tuple[str, ...] = Field((), description="SLURM: further options, each as one word: --constraint=h100.")
    requeue: NonNegativeInt = Field(
        20,
        description="How often a job that was told to stop goes back into the queue; 0: never, nor when it has lost a node.",
    )
    signal_seconds: PositiveInt | None = Field(
        None,
        description="Seconds before the end of its time at which a job is told to stop; default: checkpoint.grace_seconds and "
        "a minute.",
    )
    container: str | None = Field(
        None, description="Image that everything runs in: a registry's name, a .sqsh (pyxis) or .sif (apptainer) file."
    )
    runtime: Literal["pyxis", "apptainer"] = Field("pyxis", description="SLURM: what runs the container.")
    mounts: tuple[str, ...] = Field(
        (), description="SLURM: folders that the container sees besides this one, as HOST:CONTAINER."
    )
    venv: Path | None = Field(
        None,
        description="The Python environment, as the nodes see it; default: the container's, without one .venv of checkout.",
    )
    checkout: Path | None = Field(
        None, description="The folder of megatron-rl's scripts, as the nodes see it; default: where this program lies."
    )
    modules: tuple[str, ...] = Field((), description="SLURM: environment modules to load first, such as cuda/13.0.")
    environment: tuple[str, ...] = Field(
        (), description="Variables of all processes, as NAME=value. No secrets: they are saved."
    )
    logs: Path | None = Field(
        None, description="Folder of the jobs' logs, seen by all nodes; default: launch in run.directory."
    )
    at_once: PositiveInt | None = Field(None, description="Most runs of a sweep at the same time; default: as many as fit.")
    claim: str | None = Field(None, description="Kubernetes: the volume claim that all pods see, with the run's folder in it.")
    claim_path: Path = Field(Path("/shared"), description="Kubernetes: where the pods see it.")
    key_secret: str | None = Field(
        None, description="Kubernetes: the secret whose entry `key` is the API key of the servers, where they have nodes."
    )
