"""megatron_rl: reinforcement learning of mixture-of-experts language models on stock Megatron-core and SGLang.

    from megatron_rl import load_settings, train

    settings = load_settings("recipe.yaml", ["run.directory=runs/mine"])
    train(settings, observers=[MyObserver()])

What is offered here is loaded when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rl.config.load import load_settings
    from megatron_rl.config.settings import Settings
    from megatron_rl.observe import Observer, observers_of
    from megatron_rl.train.run import train

__version__ = "0.1.0"
__all__ = ["Observer", "Settings", "load_settings", "observers_of", "train"]
HOMES = {
    "Observer": "megatron_rl.observe",
    "Settings": "megatron_rl.config.settings",
    "load_settings": "megatron_rl.config.load",
    "observers_of": "megatron_rl.observe",
}


def __getattr__(name: str) -> Any:  # `train` is a room that can be called
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
