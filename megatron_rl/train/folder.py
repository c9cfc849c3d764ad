"""The folder of a run: its settings, by which it is known, and what kind of run it is."""

from pathlib import Path

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import dump_settings
from megatron_rl.config.settings import Settings
from megatron_rl.rollout.bank import files

SETTINGS = "settings.yaml"
KIND = "kind"  # a file with one of these words
REINFORCEMENT, SUPERVISED_RUN = "train", "sft"
GO_ON = {REINFORCEMENT: "megatron-rl train --resume {folder}", SUPERVISED_RUN: "megatron-rl sft CONFIG --resume"}


def require_fresh(settings: Settings) -> None:
    """A new run does not begin in the folder of another, whose steps it would mix with its own."""
    folder = settings.run.directory
    if (folder / SETTINGS).exists():
        raise SettingsError(
            f"run.directory = {folder}: a run is there already. Continue it with `megatron-rl train --resume {folder}`, or "
            "choose another folder."
        )


def require_kind(settings: Settings, kind: str) -> None:
    """A run of one kind is not gone on with as if it were of the other, also before its first checkpoint."""
    folder = settings.run.directory
    found = (folder / KIND).read_text().strip() if (folder / KIND).is_file() else kind
    if found != kind:
        raise SettingsError(
            f"run.directory = {folder}: the run in it was begun by megatron-rl {found}, not by {kind}. Go on with it by "
            f"`{GO_ON.get(found, GO_ON[REINFORCEMENT]).format(folder=folder)}`, or choose another folder."
        )


def begin(settings: Settings, kind: str) -> None:
    """Note the settings of a run, new or resumed, and its kind."""
    files.private_folder(settings.run.directory)
    files.write_file(settings.run.directory / KIND, f"{kind}\n".encode())
    files.write_file(settings.run.directory / SETTINGS, dump_settings(settings).encode())  # a kill leaves no half of them


def settings_file(folder: Path) -> Path:
    """The settings of the run in a folder."""
    path = folder / SETTINGS
    if not path.is_file():
        raise SettingsError(
            f"--resume {folder}: there is no run in it ({SETTINGS} is missing). Give a run.directory; a run that ended before "
            "its servers were up left none, and is begun again with its settings file."
        )
    return path
