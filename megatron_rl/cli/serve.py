"""`megatron-rl serve`: run SGLang servers for a training run on this machine or another."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_rl.cli.arguments import Overrides
from megatron_rl.cli.screen import make_console, told_to_the_user
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import SUFFIXES, load_settings
from megatron_rl.config.rules.servers import server_problems
from megatron_rl.config.settings import Settings

if TYPE_CHECKING:
    from megatron_rl.rollout.server import Server, ServerOptions


def serve(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|MODEL", help="Settings file (YAML), checkpoint folder, or hub name.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    servers: Annotated[int | None, typer.Option("--servers", min=1, help="How many; the same as servers.count=….")] = None,
    urls: Annotated[
        Path | None, typer.Option("--urls", metavar="FILE", help="Where their URLs are written. Default: urls beside the logs.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be started, start nothing.")] = False,
) -> None:
    """Run SGLang servers until Ctrl-C. Where there is no GPU they run on the CPU, slowly but really.

    A training run starts its own servers unless it is told otherwise: this is for servers that outlive a run, or that run on
    other machines. Their URLs are written to a file when all of them generate, and taken out again when they end. A run finds
    them by `servers.urls_file`; servers that appear in the file while it runs join it, those that vanish from it leave.
    Several machines may share one file.

    **Settings** are the sections `servers:` and `sglang:` of a settings file. `sglang.NAME` is any argument of
    `python -m sglang.launch_server`, checked against the installed version before anything starts. `megatron-rl settings`
    lists the rest.

    **Access** is from this machine alone, unless `servers.host` says otherwise; then servers answer nobody without a key. It is
    in the file that `servers.api_key_file` names, or one is made beside the URLs (FILE.key), where a run with this
    `servers.urls_file` finds it.

    **Examples**

    - `megatron-rl serve Qwen/Qwen3-30B-A3B sglang.tp_size=4 --servers 2`
    - `megatron-rl serve checkpoints/base sglang.enable_return_routed_experts=true`
    - `megatron-rl serve recipe.yaml servers.host=0.0.0.0 --urls shared/urls`
    - `megatron-rl train recipe.yaml servers.urls_file=shared/urls`
    """
    with told_to_the_user():
        settings = _settings(source, [*(overrides or []), *([f"servers.count={servers}"] if servers else [])])
        from megatron_rl.rollout.keys import beside_urls, logs_folder, served_key
        from megatron_rl.rollout.own_servers import own_servers

        file = urls or logs_folder(settings) / "urls"
        options = own_servers(settings, served_key(settings, file, make=not dry_run))
        if not options:
            raise SettingsError(
                "Nothing to serve: servers.urls or servers.urls_file name the servers of somebody else. Add --servers."
            )
        console = make_console()
        if dry_run:
            _show(console, options)
            return
        if options[0].api_key and settings.servers.api_key_file is None:
            console.print(Text(f"their API key: {beside_urls(file)}, where a run finds it by servers.urls_file={file}"))
        _run(console, options, file, settings.servers.restarts)


def _settings(source: str, overrides: Sequence[str]) -> Settings:
    """Of a file, or of a model with everything else by default."""
    path = Path(source)
    if path.suffix in SUFFIXES:
        settings = load_settings(path, overrides)
    else:
        if "=" in source and not path.exists():
            raise SettingsError(f"{source} is an override where the settings file or model should stand. Put that first.")
        if not path.exists() and (path.is_absolute() or source.startswith(".") or len(path.parts) > 2):
            raise SettingsError(f"{source} does not exist. Give a checkpoint folder, a settings file (.yaml), or a hub name.")
        settings = load_settings(None, [f"policy.init={source}", f"servers.model={source}", *overrides])
    problems = list(server_problems(settings))
    if problems:
        raise SettingsError("\n".join(problems))
    return settings


def _run(console: Console, options: Sequence["ServerOptions"], urls: Path, restarts: int) -> None:
    from megatron_rl.rollout.serving import serve as keep_serving

    first = options[0]
    machine = "on the CPU" if first.on_cpu else "on GPUs"
    if not Path(first.model).exists():
        console.print(Text(f"{first.model} is no folder here: it is taken for a hub name"))
    status = console.status(Text(f"starting {_counted(options)} of {first.model} {machine}; logs in {first.log.parent}"))

    def ready(servers: Sequence["Server"]) -> None:
        status.stop()
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("server", "GPUs", "log"):
            table.add_column(column, overflow="fold")
        for server in servers:
            table.add_row(server.url, _gpus(server.options), str(server.options.log))
        console.print(table)
        console.print(Text(f"{_counted(options)} of {first.model} generate. URLs: {urls}. Ctrl-C ends them."))

    def say(words: str) -> None:
        status.stop()
        console.print(Text(words))

    with status:
        asyncio.run(keep_serving(options, urls, restarts, ready, say))


def _show(console: Console, options: Sequence["ServerOptions"]) -> None:
    """Each server with the words it would be started with."""
    from megatron_rl.rollout.server import server_command

    for each in options:
        console.print(Text(f"{each.log}  (GPUs: {_gpus(each)})", style="bold"))
        console.print(Text(f"  {' '.join(server_command(each))}"))


def _counted(options: Sequence["ServerOptions"]) -> str:
    return "1 server" if len(options) == 1 else f"{len(options)} servers"


def _gpus(options: "ServerOptions") -> str:
    return "none" if options.on_cpu else ", ".join(map(str, options.gpus or ())) or "all"
