"""`megatron-rl publish`: the weights of a checkpoint to servers that run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from megatron_rl.cli.screen import make_console, told_to_the_user
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.publish_settings import PublishSettings

if TYPE_CHECKING:
    from megatron_rl.rollout.client import Client
    from megatron_rl.rollout.replies import ServerInfo
    from megatron_rl.weights.publish.report import Report
    from megatron_rl.weights.sources import Source

FAILED = 1  # exit code when a server does not have the weights


Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A Megatron checkpoint (step_…) or a Hugging Face folder.", show_default=False)
]
Servers = Annotated[list[str], typer.Option("--server", metavar="URL", help="A server, http://host:port; may be given again.")]
Version = Annotated[
    int | None,
    typer.Option(
        help="Number of these weights; default: a run's step, else one above the servers'.",
        show_default=False,
    ),
]
Travel = Annotated[Literal["auto", "disk", "broadcast", "tensor"], typer.Option(help="How they travel: see docs/publish.md.")]
Pause = Annotated[Literal["abort", "retract", "in_place"], typer.Option(help="What becomes of requests meanwhile.")]
Shared = Annotated[
    Path | None, typer.Option("--shared", metavar="DIR", help="For disk: a folder that the servers see.", show_default=False)
]
Dtype = Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="Send weights in this format.", show_default=False)]
Bucket = Annotated[int, typer.Option(min=1, help="Megabytes that travel at once.")]
Served = Annotated[
    Path | None, typer.Option("--served", metavar="DIR", help="The model FP8 servers were started with.", show_default=False)
]
Like = Annotated[
    Path | None, typer.Option("--like", metavar="DIR", help="The model the checkpoint was trained from.", show_default=False)
]
Key = Annotated[Path | None, typer.Option(metavar="FILE", help="A file that holds the servers' API key.", show_default=False)]


def publish(
    folder: Folder,
    server: Servers,
    version: Version = None,
    transport: Travel = "auto",
    pause: Pause = "retract",
    shared: Shared = None,
    dtype: Dtype = None,
    bucket_mb: Bucket = 512,
    served: Served = None,
    like: Like = None,
    api_key_file: Key = None,
) -> None:
    """Push the weights of a checkpoint to SGLang servers that run, without ending them or what they are asked.

    Servers pause, take the weights, are told their version, and go on. One that fails is put aside, paused and empty of
    requests, and the others go on; the exit code is then 1. No model is built here, so that the servers' log-probs are not
    compared with anybody's, as they are when a run publishes.

    **Examples**

    - `megatron-rl publish runs/a/checkpoints/step_00000200 --server http://127.0.0.1:30000`
    - `megatron-rl publish Qwen3-30B-A3B --server http://node1:30000 --server http://node2:30000 --transport broadcast`
    - `megatron-rl publish step_00000200 --like Qwen3-30B-A3B-FP8 --served Qwen3-30B-A3B-FP8 --server http://node1:30000`
    """
    with told_to_the_user():
        require_urls(server)
        settings = PublishSettings(transport=transport, folder=shared, dtype=dtype, bucket_bytes=bucket_mb * 2**20, probe=False)
        key = _read_key(api_key_file)
        from megatron_rl.rollout.client import Client
        from megatron_rl.weights.hf_files import read_json
        from megatron_rl.weights.sources import open_source

        source = open_source(folder, like)
        try:
            source.check()
            vocabulary = source.architecture.vocab
            quantization = read_json(served / "config.json").get("quantization_config") if served is not None else None
            report = _publish(
                source,
                settings,
                list(dict.fromkeys(url.rstrip("/") for url in server)),  # each once: a server cannot join twice
                version,
                lambda url: Client(url, vocabulary, key),
                quantization,
                pause,
            )
        finally:
            source.close()
    if len(report.serving) < len(report.outcomes):
        raise typer.Exit(FAILED)


def _publish(
    source: "Source",
    settings: PublishSettings,
    urls: Sequence[str],
    version: int | None,
    connect: "Callable[[str], Client]",
    quantization: Mapping[str, Any] | None,
    pause: Literal["abort", "retract", "in_place"],
) -> "Report":
    import asyncio

    from megatron_rl.weights.publish.ports import Target
    from megatron_rl.weights.publish.publisher import Publisher
    from megatron_rl.weights.publish.stored import StoredWeights
    from megatron_rl.weights.publish.wire import fp8_quantizer

    quantizer = fp8_quantizer(source.weight_map, quantization)
    publisher = Publisher(StoredWeights(source), settings, connect, pause=pause, quantizer=quantizer)
    console = make_console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )

    async def run() -> "Report":
        answers = await _answers(urls, connect)
        _require_awake(answers)
        _require_same_model(source, answers)
        present = [info.version for info in answers.values() if info.version is not None]
        number = _number(source, present) if version is None else version
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"weights {number}", total=publisher.bytes)

            def tell(done: int, total: int) -> None:
                progress.update(task, completed=publisher.bytes * done // total)

            return await publisher.publish(number, [Target(url) for url in urls], tell)

    report = asyncio.run(run())
    _show(report, console)
    return report


async def _answers(urls: Sequence[str], connect: "Callable[[str], Client]") -> "dict[str, ServerInfo]":
    """What servers say of themselves; one that does not answer is the publish's to tell of."""
    found = {}
    for url in urls:
        try:
            async with connect(url) as server:
                found[url] = await server.server_info()
        except RuntimeError:
            continue
    return found


def _require_awake(answers: "Mapping[str, ServerInfo]") -> None:
    """Weights sent to memory that a server has given back would end it. To wake it is up to the run that let it sleep."""
    for url, info in answers.items():
        if info.state in ("asleep", "unsettled"):
            raise SettingsError(
                f"{url} sleeps: a run with servers.placement=colocated has its memory, or died over it. Wait for the end of "
                "that run; if there is none, start the server again."
            )


def _require_same_model(source: "Source", answers: "Mapping[str, ServerInfo]") -> None:
    """Tensors of other shapes can end a server. Known beforehand where its model lies on a disk that is seen from here."""
    from megatron_rl.config.families import read_architecture
    from megatron_rl.weights.map import WeightMap

    ours = {name: entry.shape for name, entry in source.weight_map.hf.items()}
    for url, info in answers.items():
        if (Path(info.model) / "config.json").is_file():
            theirs = {name: entry.shape for name, entry in WeightMap(read_architecture(Path(info.model))).hf.items()}
            differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
            if differing:
                raise SettingsError(
                    f"{url} serves {info.model}, whose tensors are not those of {source.folder}: {len(differing)} differ, "
                    f"{differing[0]} is one. Publish a checkpoint of the model that it serves."
                )


def _number(source: "Source", present: Sequence[int]) -> int:
    """A checkpoint of weights alone, which conversion makes, is of no step."""
    from megatron_rl.weights.sources import MegatronSource

    if isinstance(source, MegatronSource) and not source.files.manifest.get("weights_only"):
        return source.files.step
    return max(present, default=0) + 1


def require_urls(servers: Sequence[str]) -> None:
    for url in servers:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"--server {url}: expected a server's address, such as http://127.0.0.1:30000")


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(f"--api-key-file {path}: {error.strerror}. Name a file that holds the key alone.") from error


def _show(report: "Report", console: Console) -> None:
    table = Table("server", "weights", "paused for", "", box=None, pad_edge=False)
    for outcome in report.outcomes:
        has = f"{report.version}" if outcome.url in report.serving else "—"
        table.add_row(outcome.url, has, f"{outcome.paused:.2f} s", outcome.failure or outcome.result)
    console.print(table)
    if report.way is None:
        console.print("nothing was sent: no server that answers needs these weights")
        return
    rate = report.bytes / report.seconds / 1e6
    console.print(f"{report.bytes / 1e6:.0f} MB by {report.way} in {report.seconds:.1f} s, {rate:.0f} MB/s")
