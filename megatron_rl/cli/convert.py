"""`megatron-rl convert`: checkpoints from Hugging Face to Megatron, back, and from one number format to another."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from megatron_rl.cli.screen import ByteProgress, make_console, told_to_the_user
from megatron_rl.config.errors import CheckpointError, SettingsError
from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import LayoutSettings
from megatron_rl.train.upstream import quiet_upstream

if TYPE_CHECKING:
    from megatron_rl.weights.convert import Conversion, Plan

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
LARGEST_LOGIT_DIFFERENCE = 1e-4  # as a share of the largest logit, both sides in float32


def convert(
    source: Annotated[Path, typer.Option("--from", metavar="DIR", help="A Hugging Face folder, or a checkpoint (step_…).")],
    target: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to be made.")],
    format: Annotated[Literal["megatron", "hf"], typer.Option("--format", help="What to make.")],
    layout: Annotated[
        list[str] | None,
        typer.Argument(metavar="[layout.NAME=VALUE]...", help="The layout of a Megatron checkpoint.", show_default=False),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32", "fp8"] | None,
        typer.Option(help="Number format. Default: float32 where the source is float32, else bfloat16."),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of a Hugging Face checkpoint.")] = "5GB",
    processes: Annotated[int, typer.Option(min=1, help="Files are dealt to so many processes.")] = 1,
    like: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder whose config.json and tokenizer a run's checkpoint gets, if not its own."),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every tensor's checksum with the source's.")] = False,
    check_logits: Annotated[
        bool, typer.Option("--verify-logits", help="Compare Megatron's logits with transformers', whole model in memory.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
) -> None:
    """Convert a checkpoint. **Training needs none of this**: `policy.init` takes a Hugging Face folder as it is, and
    `checkpoint.export_every` writes such folders while a run trains.

    **To Megatron**: one file a rank of the layout, which loads under every other layout too. **To Hugging Face**: the form in
    which models are published, with config.json, tokenizer and chat template. From Hugging Face to Hugging Face it changes
    the number format; FP8 is e4m3 in blocks of 128 × 128 with scales, as DeepSeek-V3's, and is read and written.

    Files are streamed: memory does not grow with the model. What is written has the name `DIR.partial` until all of it is
    there. A conversion that was interrupted goes on when the same command is given again. An error leaves nothing behind.

    **Examples**

    - `megatron-rl convert --from Qwen3-30B-A3B --to qwen3-tp2 --format megatron layout.tensor=2 layout.expert=8`
    - `megatron-rl convert --from runs/math/checkpoints/step_00000200 --to math-200 --format hf --processes 8 --verify`
    - `megatron-rl convert --from Qwen3-30B-A3B --to Qwen3-30B-A3B-FP8 --format hf --dtype fp8`
    """
    with told_to_the_user():
        settings = _layout(layout or [], format)
        shards = _bytes(shard_size)
        quiet_upstream()
        from megatron_rl.weights.convert import Conversion

        conversion = Conversion(source, target, format, settings, dtype, shards, like)
        _run(conversion, processes=processes, overwrite=overwrite, checksums=verify, logits=check_logits)


def _run(conversion: "Conversion", *, processes: int, overwrite: bool, checksums: bool, logits: bool) -> None:
    """Convert, prove what was asked to be proven before the folder gets its name, and say so."""
    from megatron_rl.weights.convert import convert as run

    console = make_console()
    with ByteProgress(console, "written") as progress:

        def proof(plan: "Plan", folder: Path) -> None:
            progress.end()
            if checksums:
                _verify(plan, folder, processes, console)
            if logits:
                _verify_logits(conversion, folder, console)

        run(
            conversion,
            processes=processes,
            overwrite=overwrite,
            tell=console.print,
            begun=progress.begin,
            moved=progress.move,
            proof=proof,
        )
    console.print(f"{conversion.target} is there")


def _verify(plan: "Plan", folder: Path, processes: int, console: Console) -> None:
    from megatron_rl.weights.verify import verify

    with ByteProgress(console, "verified") as progress:
        progress.begin(plan.bytes)
        count = verify(plan, folder, processes, progress.move)
        progress.end()
    console.print(f"{count} tensors: every checksum is the source's")


def _verify_logits(conversion: "Conversion", folder: Path, console: Console) -> None:
    from megatron_rl.policy.verify_logits import verify_logits

    megatron, hf = (conversion.source, folder) if conversion.format == "hf" else (folder, conversion.source)
    found = verify_logits(megatron, hf)
    if not found <= LARGEST_LOGIT_DIFFERENCE:
        raise CheckpointError(
            f"logits of Megatron and transformers differ by {found:.1e} of the largest logit, where "
            f"{LARGEST_LOGIT_DIFFERENCE:.0e} is allowed"
        )
    console.print(f"logits of Megatron and transformers differ by {found:.1e} of the largest")


def _layout(overrides: list[str], format: str) -> LayoutSettings:
    """Layout settings from `layout.name=value`, checked as a run's are."""
    others = [each for each in overrides if not each.startswith("layout.")]
    if others:
        raise SettingsError(f"{others[0]}: only the layout is chosen here, such as layout.tensor=2")
    if overrides and format == "hf":
        raise SettingsError(f"{overrides[0]}: a Hugging Face checkpoint has no layout. Leave it out, or use --format megatron.")
    return load_settings(None, ["policy.config=config.json", *overrides]).layout


def _bytes(text: str) -> int:
    """A size such as 5GB, as huggingface_hub counts them."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]B)", text.strip().upper())
    if not match or int(match[1]) == 0:
        raise SettingsError(f"--shard-size {text}: expected a number and KB, MB, GB or TB, such as 5GB")
    return int(match[1]) * UNITS[match[2]]
