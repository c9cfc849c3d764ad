"""Settings of a tiny model that could be launched, for tests of what launching writes."""

from pathlib import Path

from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import Settings
from tests.config.test_cli import TINY

ROOT = Path(__file__).parents[2]
CLUSTER = ("cluster.nodes=2", "cluster.gpus_per_node=4", "cluster.server_nodes=1")


def recipe(folder: Path) -> Path:
    """A settings file and its model in a folder."""
    (folder / "config.json").write_text(TINY)
    path = folder / "tiny.yaml"
    path.write_text("policy: {config: config.json}\nrun: {directory: runs/tiny}\n")
    return path


def settings_of(folder: Path, *overrides: str) -> Settings:
    return load_settings(recipe(folder), [*CLUSTER, *overrides])
