"""Jobs to plan in tests."""

from pathlib import Path
from typing import Any

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.settings import Settings
from megatron_rl.plan.job import Job, Workload
from megatron_rl.plan.machine import Machine, find_machine

WORK = Workload(groups=64, group_size=8, prompt=500, response=1000, longest=4000)


def job(
    architecture: Architecture, ranks: int = 8, *, machine: Machine | str = "h100", work: Workload = WORK, **sections: Any
) -> Job:
    """A job of a model with some sections of settings."""
    settings = Settings.model_validate({"policy": {"config": Path("model")}, **sections})
    return Job(settings, architecture, ranks, find_machine(machine) if isinstance(machine, str) else machine, work)
