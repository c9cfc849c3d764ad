"""Starting the ranks of a run on this machine, where no launcher has."""

import sys
from collections.abc import Callable

import typer

from megatron_rl.config.checks import require_valid
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import Settings
from megatron_rl.train import ranks

LOCAL_RANKS = 16  # no machine has more GPUs


def start_ranks(settings: Settings, check: Callable[[Settings], None] = lambda settings: None) -> None:
    """Where several ranks are wanted and no launcher has started them, run this same command as these, and end as they end.

    Returns in a process that is a rank, or the only one. `check` refuses more of the settings, before torch is loaded so many
    times.
    """
    world_size = settings.world_size or 1
    if world_size == 1 or ranks.launched():
        return
    if world_size > LOCAL_RANKS:
        raise SettingsError(
            f"these settings ask for {world_size} ranks: one machine starts {LOCAL_RANKS} at most by itself. "
            "Launch the ranks with torchrun or SLURM, or look with --dry-run."
        )
    require_valid(settings, read_architecture(settings.policy.config), world_size)
    check(settings)
    raise typer.Exit(ranks.start_local_ranks(world_size, sys.argv[1:], settings.checkpoint.grace_seconds))
