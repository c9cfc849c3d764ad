"""`megatron-rl toy`: a tiny model to try things out with."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_rl.cli.screen import make_console, told_to_the_user


def toy(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write; it must not exist.", show_default=False)],
    family: Annotated[
        Literal["qwen3_moe", "qwen3"], typer.Option("--family", help="qwen3_moe is a mixture of experts, qwen3 is dense.")
    ] = "qwen3_moe",
    layers: Annotated[int, typer.Option("--layers", help="Decoder layers.")] = 2,
    hidden: Annotated[int, typer.Option("--hidden", help="Width of the model, a multiple of 32.")] = 64,
    experts: Annotated[int, typer.Option("--experts", help="Experts of a layer; each token chooses two.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the weights.")] = 0,
) -> None:
    """Write a tiny language model with random weights as a Hugging Face checkpoint, without a download.

    It is a checkpoint like any other: config.json, weights in float32 (safetensors), a tokenizer with a chat template, and a
    generation config. transformers, SGLang and the policy (`policy.init: DIR`) load it. The tokenizer has a token for each
    byte and one for each role of a conversation, so that any text goes through it unchanged.

    **Examples**

    - `megatron-rl toy runs/toy`
    - `megatron-rl toy runs/toy-wide --hidden 256 --layers 4 --experts 16 --seed 7`
    - `megatron-rl sft configs/quickstart-sft.yaml policy.init=runs/toy` afterwards, to teach it something
    """
    with told_to_the_user():
        from megatron_rl.train.toy_model import write_toy_model
        from megatron_rl.weights.toy_model import ToyShape

        parameters = write_toy_model(folder, ToyShape(family, layers, hidden, experts), seed)
    make_console().print(f"{folder}: a {family} of {parameters:,} parameters, random (seed {seed})")
