"""Does megatron-rl keep its promises on this machine's GPU? Tries them part by part, and prints a table of what it found.

Each part runs in a process of its own, with a time limit. What is found lies in --out as JSON lines at once; the program may
be killed at any time and started again: parts that are done are not run again, whatever was skipped or failed is. A part whose
packages are missing, or that needs a GPU where there is none, is skipped, and the table says why.

    python -m tools.gpu_acceptance --smoke            every part at a tiny size, on this GPU or on the CPU: in minutes
    python -m tools.gpu_acceptance                    every part
    python -m tools.gpu_acceptance --minutes 9        as many as fit in nine minutes; the next call goes on
    python -m tools.gpu_acceptance --only ratio --only "update te-blockwise"
    python -m tools.gpu_acceptance --table OUT OTHER  what is there, of several folders
    python -m tools.gpu_acceptance --table --markdown the same, for docs/gpu.md

Ends with an error when a part failed or a promise was broken. See docs/gpu.md.
"""

import argparse
import math
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from tools.gpu_acceptance.child import ROOT
from tools.gpu_acceptance.parts import PARTS, chosen
from tools.gpu_acceptance.results import Outcome, Results, read_results
from tools.gpu_acceptance.running import run_part, todo
from tools.gpu_acceptance.table import as_markdown, as_table

FOLDERS = {False: ROOT / "runs/gpu_acceptance", True: ROOT / "runs/gpu_acceptance_smoke"}
WIDTH = 150  # columns of the table where nobody sees it but a file
LEAST = 20.0  # seconds below which no part is worth beginning


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PART", action="append", help="parts whose names begin so; may be repeated")
    parser.add_argument("--smoke", action="store_true", help="at a tiny size, on the CPU where there is no GPU")
    parser.add_argument("--again", action="store_true", help="run parts that are done once more")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no part that will hardly end within N minutes")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go; default: runs/gpu_acceptance[_smoke]")
    parser.add_argument("--list", action="store_true", help="name the parts and how they stand, and do nothing")
    parser.add_argument("--table", nargs="*", type=Path, metavar="FOLDER", help="print what is there (of --out, or of these)")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    return parser.parse_args(words)


def show(outcomes: dict[str, Outcome], markdown: bool) -> None:
    if markdown:
        print(as_markdown(outcomes))
    else:
        Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False).print(as_table(outcomes))


def list_parts(outcomes: dict[str, Outcome]) -> None:
    for part in PARTS.values():
        state = outcomes[part.name].state if part.name in outcomes else ""
        print(f"{state:12}{part.name:28}{part.about}")


def refuse_mixture(folder: Path, smoke: bool) -> None:
    """Numbers of a smoke test are no measurements."""
    if any(outcome.smoke != smoke for outcome in Results(folder).read().values()):
        other = "at full size" if smoke else "of a smoke test"
        raise SystemExit(f"{folder} holds results {other}. Name another folder with --out.")


def run(options: argparse.Namespace, folder: Path, console: Console) -> None:
    """The parts that are to do, as long as there is time."""
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    parts = todo(chosen(options.only), folder, options.again)
    for number, part in enumerate(parts, 1):
        left = None if end is None else end - time.monotonic()
        least = max(LEAST, 0 if options.smoke else part.seconds)
        if left is not None and left < least:
            again = (
                "Start again to go on." if 60 * options.minutes > least else f"Give it --minutes {math.ceil(least / 60) + 1}."
            )
            console.print(f"{part.name}: not begun, {left:.0f} s are left of some {least:.0f} that it takes. {again}")
            continue
        console.print(f"[{number} of {len(parts)}] {part.name}: {part.about}", markup=False)
        outcome = run_part(part, folder, options.smoke, left)
        told = f": {outcome.reason.splitlines()[0]}" if outcome.reason else ""
        console.print(f"    {outcome.state} after {outcome.seconds:.0f} s{told}", markup=False)


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    folder = (options.out or FOLDERS[options.smoke]).absolute()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end; start again to go on"))
    if options.list:
        list_parts(Results(folder).read())
        return
    if options.table is not None:
        show(read_results(options.table or [folder]), options.markdown)
        return
    refuse_mixture(folder, options.smoke)
    run(options, folder, Console(highlight=False, soft_wrap=True))
    outcomes = Results(folder).read()
    show(outcomes, options.markdown)
    asked = {part.name for part in chosen(options.only)}
    sys.exit(not all(outcome.good for name, outcome in outcomes.items() if name in asked))


if __name__ == "__main__":
    main()
