"""A policy on one rank, in the test's own process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_rl.config.settings import Settings
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from tests.reference.tiny import write_tiny_config


def tiny_settings(folder: Path, family: str = "qwen3_moe", **sections: Any) -> Settings:
    """Settings for a tiny model of a family; sections replace the defaults'."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {
        "policy": {"config": write_tiny_config(family, folder)},
        "precision": {"dtype": "float32"},
        "optimizer": {"lr": 1e-3},
        "batch": {"max_tokens": 64},
    }
    return Settings.model_validate({**defaults, **sections})


@contextmanager
def opened(settings: Settings) -> Iterator[Policy]:
    policy = Policy.open(settings, Launch())
    try:
        yield policy
    finally:
        policy.close()
