"""The folder of a run: its settings, by which it is known."""

from pathlib import Path

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import dump_settings
from megatron_rl.config.settings import Settings

SETTINGS = "settings.yaml"


def require_fresh(settings: Settings) -> None:
    """A new run does not begin in the folder of another, whose steps it would mix with its own."""
    folder = settings.run.directory
    if (folder / SETTINGS).exists():
        raise SettingsError(
            f"run.directory = {folder}: a run is there already. Continue it with `megatron-rl train --resume {folder}`, or "
            "choose another folder."
        )


def begin(settings: Settings) -> None:
    """Note the settings of a new run."""
    settings.run.directory.mkdir(parents=True, exist_ok=True)
    (settings.run.directory / SETTINGS).write_text(dump_settings(settings), encoding="utf-8")


def settings_file(folder: Path) -> Path:
    """The settings of the run in a folder."""
    path = folder / SETTINGS
    if not path.is_file():
        raise SettingsError(f"--resume {folder}: there is no run in it ({SETTINGS} is missing). Give a run.directory.")
    return path
