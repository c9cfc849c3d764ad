"""What is started where: the part of a run that one script starts, in numbers and words."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import load_settings, names_settings_file
from megatron_rl.config.rules.launching import Part, machines, servers_of_a_machine
from megatron_rl.config.settings import Settings


@dataclass(frozen=True)
class Job:
    """One script's work. `words` are the settings files and overrides as given, `folder` is where they mean something.

    `checkout` is where this program's scripts are. A sweep has the words of each of its runs.
    """

    settings: Settings
    words: tuple[str, ...]
    folder: Path
    checkout: Path
    part: Part = "all"
    sweep: tuple[tuple[str, ...], ...] = ()

    @property
    def asked(self) -> tuple[str, ...]:
        """What ranks are asked that are started apart from their servers: servers.count then speaks of those machines."""
        return (*self.words, "servers.count=0") if self.part == "train" and self.settings.cluster.server_nodes else self.words

    @property
    def nodes(self) -> int:
        """Machines that train."""
        return 0 if self.part == "servers" else self._machines[0]

    @property
    def ranks_per_node(self) -> int:
        return self._machines[1]

    @property
    def server_nodes(self) -> int:
        """Machines that serve and do nothing else."""
        return 0 if self.part == "train" else self.settings.cluster.server_nodes

    @property
    def colocated(self) -> bool:
        """Have servers to be started beside the ranks? On one machine the run starts its own."""
        return self.settings.servers.colocated and self.nodes > 1

    @property
    def servers_per_node(self) -> int:
        return servers_of_a_machine(self.settings)

    @property
    def name(self) -> str:
        """In letters that every scheduler takes."""
        given = self.settings.launch.name or self.settings.run.directory.absolute().name
        return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in given).strip("-").lower() or "run"

    @property
    def run_directory(self) -> Path:
        return self.folder / self.settings.run.directory

    @property
    def logs(self) -> Path:
        return self.folder / (self.settings.launch.logs or self.run_directory / "launch")

    @property
    def python(self) -> str:
        """Of the environment, or of the container."""
        launch = self.settings.launch
        if launch.venv is not None:
            return str(self.folder / launch.venv / "bin/python")
        return "python" if launch.container is not None else str(self.checkout / ".venv/bin/python")

    @cached_property
    def _machines(self) -> tuple[int, int]:
        found = machines(self.settings)
        if found is None:
            raise SettingsError("it is not known on how many machines the ranks shall live. Set cluster.nodes.")
        return found


def sweep_of(text: str, words: Sequence[str], settings: Settings) -> tuple[tuple[str, ...], ...]:
    """The runs of a sweep: a line of overrides each; empty lines and those that begin with # aside.

    A run that names no run.directory gets one below that of the settings, by its number. Every run's settings are loaded.
    """
    runs: list[tuple[str, ...]] = []
    folders: dict[Path, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        own = _words_of(line, number)
        if not own:
            continue
        if not any(word.startswith("run.directory=") for word in own):
            own = (*own, f"run.directory={settings.run.directory / f'{len(runs):03}'}")
        changed = load_settings(words[0], [*words[1:], *own])
        asked, other = _asked_of_a_cluster(settings), _asked_of_a_cluster(changed)
        if wrong := [name for name in asked if asked[name] != other[name]]:
            raise SettingsError(
                f"line {number} of the sweep changes {', '.join(wrong)}: a job array has the same machines for all runs. Say "
                "it on the command line, for all of them, or launch this run by itself."
            )
        directory = changed.run.directory.absolute()
        if directory in folders:
            raise SettingsError(
                f"line {number} of the sweep has the run.directory of line {folders[directory]}: {directory}. Two runs cannot "
                "share one. Give it another, or none."
            )
        folders[directory] = number
        runs.append(own)
    if not runs:
        raise SettingsError("the sweep has no line. Write the overrides of one run a line: optimizer.lr=1e-6 run.seed=1")
    return tuple(runs)


def _asked_of_a_cluster(settings: Settings) -> dict[str, object]:
    """Whatever the one script of several runs says for all of them."""
    servers = settings.servers
    return {
        **{f"cluster.{name}": value for name, value in settings.cluster},
        **{f"launch.{name}": value for name, value in settings.launch},
        **{f"servers.{name}": getattr(servers, name) for name in ("placement", "urls_file", "api_key_file")},
        "layout.world_size": settings.layout.world_size,
        "the servers of a machine": servers_of_a_machine(settings),
        "checkpoint.grace_seconds": settings.checkpoint.grace_seconds,
    }


def _words_of(line: str, number: int) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(line, comments=True))
    except ValueError as error:
        raise SettingsError(f"line {number} of the sweep: {error}. Quote it as for a shell.") from error
    for word in words:
        if "=" not in word and not names_settings_file(word):
            raise SettingsError(f"line {number} of the sweep: {word} is neither an override (name=value) nor a settings file.")
    return words


def commented(text: str) -> Iterable[str]:
    """Lines of a comment; whatever the text holds, none of it leaves the comment."""
    return (f"# {line}" for line in "".join(letter if letter.isprintable() else "?" for letter in text).splitlines() or [""])
