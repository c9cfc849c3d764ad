"""First weights from a checkpoint: a Hugging Face folder, or a Megatron checkpoint whose weights alone are taken."""

from dataclasses import asdict
from pathlib import Path

from megatron_rl.config.errors import CheckpointError
from megatron_rl.policy.checkpoint import Checkpoint
from megatron_rl.policy.layout import Layout
from megatron_rl.policy.model import Model
from megatron_rl.policy.slices import model_slices
from megatron_rl.weights.checkpoint_files import MANIFEST, differences
from megatron_rl.weights.load import load_hf


def load_pretrained(model: Model, layout: Layout, folder: Path) -> int:
    """Fill this rank's weights from its own part of the checkpoint; returns the bytes it read.

    What fails on one rank fails on all, which would otherwise wait for it.
    """
    if (folder / MANIFEST).is_file():
        return _load_megatron(model, layout, folder)
    read, failure = 0, None
    try:
        read = load_hf(model_slices(model, layout), model.architecture, folder)
    except CheckpointError as error:
        failure = str(error)
    failures = [found for found in layout.everyone_has(failure) if found]
    if failures:
        raise CheckpointError(failures[0])
    return read


def _load_megatron(model: Model, layout: Layout, folder: Path) -> int:
    checkpoint = Checkpoint(folder)
    problems = differences(checkpoint.manifest["architecture"], asdict(model.architecture))
    if problems:
        raise CheckpointError(f"checkpoint {folder} is of another model: {'; '.join(problems)}")
    checkpoint.verify(layout)
    checkpoint.fill(model_slices(model, layout), layout, any_format=True)
    return checkpoint.bytes_read
