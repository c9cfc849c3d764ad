"""`megatron-rl report`: a run as one page."""

import time
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.cli.screen import make_console, told_to_the_user

EVERY = 10.0  # seconds between looks at a run that is watched


def report(
    directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run's directory.", show_default=False)],
    target: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="Where to write the page.", show_default="RUN_DIR/report.html")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Write the page anew while the run goes on, until it ends.")] = False,
    every: Annotated[float, typer.Option("--every", min=1, help="With --watch: seconds between looks at the run.")] = EVERY,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Folder or hub name. Default: the one that the run's bank names.")
    ] = None,
) -> None:
    """Write one page that shows a run: curves, samples with coloured tokens, mismatch, experts, time, and what ran.

    The page is one file that needs nothing else and fetches nothing: copy it, mail it, keep it. It can be made while the run
    goes on, also on another machine that sees its directory. A page that is watched loads itself again and keeps its place.

    - `megatron-rl report runs/my-run --open`
    - `megatron-rl report runs/my-run --watch`
    - `megatron-rl report runs/my-run --to my-run.html --tokenizer models/qwen3`
    """
    from megatron_rl.config.errors import SettingsError
    from megatron_rl.observe.page import write_page
    from megatron_rl.observe.reading import RunReader
    from megatron_rl.observe.samples import SampleBrowser, bank_of

    target = target or directory / "report.html"
    console = make_console()
    with told_to_the_user():
        run = RunReader(directory)
        if not target.parent.is_dir():
            raise SettingsError(f"--to {target}: {target.parent} is not a folder. Make it first.")
        samples = SampleBrowser(bank_of(run), tokenizer)
        going = watch and not run.finished
        write_page(run, samples, target, every if going else None)
        console.print(f"{target}: {_size(target)}")
        if open_page and not webbrowser.open(target.resolve().as_uri()):
            console.print("no browser was found: open the file by hand")
        if going:
            console.print(f"written anew when the run has news, every {every:g} s at most; Ctrl-C ends this, not the run")
        try:
            while going:
                time.sleep(every)
                if run.refresh():
                    going = not run.finished
                    write_page(run, samples, target, every if going else None)
        except KeyboardInterrupt:
            write_page(run, samples, target)  # which no longer waits for another
        if watch and run.finished:
            console.print("the run has come to its end")


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"
