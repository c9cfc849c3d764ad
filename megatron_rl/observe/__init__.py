"""What a run tells: records, the observers that are told, and the page that shows them. Nothing here imports torch."""

from rich.console import Console

from megatron_rl.config.settings import Settings
from megatron_rl.observe.observer import Everyone, Observer

__all__ = ["Everyone", "Observer", "everyone", "observers_of"]


def observers_of(settings: Settings, console: Console | None = None) -> list[Observer]:
    """The observers that the settings ask for. Make them before work starts: what is missing for one is said here."""
    from megatron_rl.observe.journal import Journal

    directory, observe = settings.run.directory, settings.observe
    observers: list[Observer] = [Journal(directory)]  # first: what others say can be lost, this not
    if observe.tensorboard:
        from megatron_rl.observe.tensorboard import TensorBoardObserver

        observers.append(TensorBoardObserver(directory / "tensorboard"))
    if observe.wandb_project is not None and observe.wandb_mode != "disabled":
        from megatron_rl.observe.wandb import WandbObserver

        observers.append(WandbObserver(directory, observe))
    if observe.console != "off":
        from megatron_rl.observe.console import ConsoleObserver

        observers.append(ConsoleObserver(console or Console(highlight=False), observe))
    return observers


def everyone(observers: list[Observer]) -> Observer:
    """One observer that tells all of them, in order."""
    return Everyone(observers)
