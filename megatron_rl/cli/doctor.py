"""`megatron-rl doctor`: what of this machine, its software and its servers would spoil a run."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from megatron_rl.cli.arguments import Overrides
from megatron_rl.cli.screen import make_console, told_to_the_user
from megatron_rl.config.rules.case import counted

if TYPE_CHECKING:
    from megatron_rl.doctor.examine import Examined
    from megatron_rl.doctor.finding import Finding
    from megatron_rl.doctor.visit import Visit

NOT_FIT = 1  # exit code where an error is found; warnings alone are 0
MARKS = {"ok": ("ok     ", "green"), "warning": ("warning", "yellow"), "error": ("ERROR  ", "bold red")}


def doctor(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="Settings file (YAML) of the run that is meant.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON, for programs.")] = False,
    step: Annotated[
        bool, typer.Option("--step/--no-step", help="Let a toy policy learn and servers generate; the slowest of all.")
    ] = True,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="Make this check; may be given again.", show_default=False),
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option("--server", metavar="URL", help="Ask this server too; may be given again.", show_default=False),
    ] = None,
    limit: Annotated[
        float, typer.Option("--limit", metavar="SECONDS", min=1, help="What loading libraries, the step or the ranks may take.")
    ] = 300.0,
) -> None:
    """Examine this machine, its software, the run's folder and its servers. Each finding that is no good comes with its fix.

    Without CONFIG the machine alone is looked at; with it, also whether the run it describes would do here.

    **Checks**, for `--only`: `settings`, `versions`, `libraries`, `gpus`, `network`, `ports`, `limits`, `folder`, `locks`,
    `clock`, `sandbox`, `servers`, `step`, `ranks`. A check that fails is itself a finding, and the others go on; torch is
    loaded in other processes, so that a broken one can be told of.

    **Clusters**: launched with torchrun, also inside of a SLURM job, each machine looks at itself, all ranks measure the
    collectives of the layout and compare clocks and the shared folder, and the main rank tells what all have found:

    - `torchrun --nproc-per-node 8 -m megatron_rl.cli doctor recipe.yaml`

    **Examples**

    - `megatron-rl doctor`
    - `megatron-rl doctor recipe.yaml run.directory=runs/mine`
    - `megatron-rl doctor recipe.yaml --json --no-step` before a job begins
    - `megatron-rl doctor --only servers --server http://node7:30000`

    Exit codes: **0** nothing is wrong, or there are warnings alone; **1** an error was found; **2** the command line cannot
    be understood.
    """
    with told_to_the_user():
        from megatron_rl.doctor.examine import chosen, examine
        from megatron_rl.doctor.visit import Visit

        names = chosen(only or [], step)
        visit = Visit.of(*_named(config, overrides or []), server or [], limit, step)
        errors = Console(stderr=True, highlight=False, quiet=visit.place.rank != 0)
        with errors.status("examining") as status:
            examined = examine(visit, names, lambda name: status.update(f"examining: {name}"))
    _tell(visit, examined, as_json)


def _named(config: str | None, overrides: Sequence[str]) -> tuple[Path | None, list[str]]:
    """An override may stand first where there is no file."""
    if config is not None and "=" in config and not Path(config).exists():
        return None, [config, *overrides]
    return None if config is None else Path(config), list(overrides)


def _tell(visit: "Visit", examined: "Examined", as_json: bool) -> None:
    """The main rank tells everybody's findings; another one its own, where they did not reach the main rank."""
    from megatron_rl.doctor.finding import worst
    from megatron_rl.doctor.tell import as_json as in_json

    main = visit.place.rank == 0
    if not main and examined.met:
        return
    if main and as_json:
        typer.echo(json.dumps(in_json(visit, examined), indent=2))
    elif main:
        _show(make_console(), examined.findings)
    else:
        _show(Console(stderr=True, highlight=False), [finding for finding in examined.findings if finding.level == "error"])
    if worst(examined.findings) == "error":
        raise typer.Exit(NOT_FIT)


def _show(console: Console, findings: "Sequence[Finding]") -> None:
    hosts = {finding.host for finding in findings}
    for check, found in groupby(findings, key=lambda finding: finding.check):
        console.print(Text(check, style="bold"))
        for finding in found:
            mark, style = MARKS[finding.level]
            where = " · ".join(part for part in (finding.host if len(hosts) > 1 else "", finding.where) if part)
            line = Text.assemble((mark, style), "  ", finding.what, (f"  ({where})" if where else "", "dim"))
            console.print(Padding(line, (0, 0, 0, 2), expand=False))
            if finding.fix:
                console.print(Padding(Text(f"→ {finding.fix}"), (0, 0, 0, 11), expand=False))
    counts = {level: sum(finding.level == level for finding in findings) for level in MARKS}
    told = (counted(counts["error"], "error"), counted(counts["warning"], "warning"), counted(counts["ok"], "thing"))
    console.print(Text(f"\n{', '.join(told)} in order"))
