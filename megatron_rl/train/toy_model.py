"""A toy model for trying things out: weights and tokenizer in one folder, as a published checkpoint has them."""

from pathlib import Path

from megatron_rl.config.errors import CheckpointError
from megatron_rl.data.toy_tokenizer import END, PAD, SIZE, write_toy_tokenizer
from megatron_rl.weights.checkpoint_files import PARTIAL, put_in_place, suffixed
from megatron_rl.weights.toy_model import ToyShape, toy_config, write_toy_weights


def write_toy_model(folder: Path, shape: ToyShape | None = None, seed: int = 0) -> int:
    """Write a Hugging Face checkpoint with random weights in float32; returns how many parameters it has.

    The folder appears when all of it is there. What it holds follows from shape and seed alone.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} is there already. Name a folder that is not, or remove it.")
    partial = suffixed(folder, PARTIAL)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        parameters = write_toy_weights(partial, toy_config(shape or ToyShape(), vocabulary=SIZE, end=END, pad=PAD), seed)
        write_toy_tokenizer(partial)
        put_in_place(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}. Name a folder that can.") from error
    return parameters
