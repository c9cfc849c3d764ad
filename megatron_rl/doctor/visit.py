"""What the doctor is told: the settings of a run, if there are any, and which process of how many this is."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import UserError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import Settings
from megatron_rl.train.ranks import launched

PATIENCE = 300.0  # seconds that what runs in a process of its own may take


@dataclass(frozen=True)
class Place:
    """Which process of how many, as the launcher says it; the only one, where nobody launched it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """torchrun's variables. Numbers that are none are the fault of who set them, and told as what they are."""
        if not launched(environment):
            return cls()
        rank, size = environment.get("RANK", "0"), environment["WORLD_SIZE"]
        local = environment.get("LOCAL_RANK", rank), environment.get("LOCAL_WORLD_SIZE", size)
        try:
            return cls(int(rank), int(size), *map(int, local))
        except ValueError as wrong:
            raise UserError(
                f"RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE in the environment is no number: {wrong}. Launch with "
                "torchrun, or unset them."
            ) from wrong


@dataclass(frozen=True)
class Visit:
    """One examination. Without settings the machine alone is looked at."""

    settings: Settings | None = None
    problem: str | None = None  # why there are no settings although some were named
    named: str = "no settings"  # what was named
    config: Path | None = None  # the file that was
    urls: tuple[str, ...] = ()  # servers to ask besides the settings'
    place: Place = Place()
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    seconds: float = PATIENCE
    step: bool = True  # whether a policy shall learn and servers generate

    @classmethod
    def of(cls, config: Path | None, overrides: Sequence[str], urls: Sequence[str], seconds: float, step: bool) -> Self:
        """Settings that cannot be read are a finding like any other: the machine is looked at all the same."""
        environment = dict(os.environ)
        settings, problem, named = None, None, "no settings"
        if config is not None or overrides:
            named = str(config or "command line")
            try:
                settings = load_settings(config, overrides)
            except UserError as told:
                problem = str(told)
        return cls(settings, problem, named, config, tuple(urls), Place.of(environment), environment, seconds, step)

    @property
    def launched(self) -> bool:
        return launched(self.environment)

    @property
    def folder(self) -> Path:
        """Where the run would write; without settings the folder in which it would make its runs."""
        return self.settings.run.directory if self.settings is not None else Path.cwd()

    @property
    def architecture(self) -> Architecture | None:
        """Of the model, where it can be read; what is wrong with it the check of settings tells."""
        try:
            return read_architecture(self.settings.policy.config) if self.settings is not None else None
        except UserError:
            return None

    @property
    def ranks_here(self) -> int:
        """Ranks that this machine shall carry."""
        if self.launched:
            return self.place.local_world_size
        if self.settings is None:
            return 1
        return min(self.settings.world_size or 1, self.settings.cluster.gpus_per_node)
