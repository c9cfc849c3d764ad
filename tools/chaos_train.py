"""Kills a training run again and again with SIGKILL, at random moments, and proves that it has cost nothing.

A toy mixture of experts trains on this machine: two ranks (EP 2) and an SGLang server that the run starts by itself, sampling
one step ahead. Each blow strikes a random victim at a random moment: a rank, the main rank, the launcher, the server or one of
its processes, its keeper, everything at once; while it starts, while it writes a checkpoint, while it publishes, whenever. A
run that has lost its server has to go on by itself; one that has lost more has to end, leave no process, and be resumed.

    python tools/chaos_train.py                           10 kills, about a quarter of an hour on two cores
    python tools/chaos_train.py --kills 5                 the first five of the same plan
    python tools/chaos_train.py --kills 5 --first 5       the other five, on a run of their own

In the end another run learns from the same bank without a break. Ends with an error unless both have the same weights, moments,
random generators, exports and metrics, bit for bit; every step is told once; and no process, half-written file or shared memory
is left.
"""

import argparse
import ctypes
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.load import dump_settings, load_settings
from megatron_rl.observe import lines
from tests.faults.processes import Processes, alive, busy, command, descendants, read
from tests.train.runs import learned, metrics

ROOT = Path(__file__).parents[1]
MEMORY = Path("/dev/shm")
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
VICTIMS = (
    "a rank", "the main rank", "the launcher", "everything", "the server",
    "its scheduler", "its detokenizer", "its keeper", "the server's tree", "everything",
)  # fmt: skip
OF_THE_SERVER = ("the server", "its scheduler", "its detokenizer", "its keeper", "the server's tree")
MOMENTS = ("start-up", "checkpoint", "publish", "any", "any", "start-up", "publish", "any", "any", "any")
START, SPAN = 30.0, 30.0  # seconds from the launch, or from the first step, in which a blow falls
PATIENCE = 300.0  # seconds for what has to come to pass, far above what it takes
ENOUGH = 5  # steps after a blow, more than are sampled ahead
LAST_STEPS = 2  # that a run does after the last blow, and at its end
HALF_WRITTEN = (".partial", ".deleted", ".replaced", ".abandoned", ".tmp")


@dataclass(frozen=True)
class Blow:
    """What is going to happen; `after` counts from the start, or from the recovery from the blow before."""

    number: int
    moment: str
    victim: str
    after: float


def plan(seed: int) -> Iterator[Blow]:
    """Every victim and every kind of moment come up, in an order of their own for each seed."""
    dice, number = random.Random(seed), itertools.count()
    while True:
        victims, moments = (dice.sample(each, len(each)) for each in (VICTIMS, MOMENTS))
        for victim, moment in zip(victims, moments, strict=True):
            yield Blow(next(number), moment, victim, dice.uniform(0, START if moment == "start-up" else SPAN))


# -- the run -------------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """The run did what it must not do."""


class Run:
    """`megatron-rl train` on the toy model, killed and resumed."""

    def __init__(self, place: Path) -> None:
        self.folder, self.log, self.settings = place / "run", place / "log", place / "run.yaml"
        self.pids: set[int] = set()  # that there ever were
        self.process: subprocess.Popen[bytes] | None = None
        self.settings.write_text(dump_settings(toy_settings(place)))

    def launch(self, *overrides: str) -> None:
        """Go on where there is a run to go on with, else begin."""
        known = (self.folder / "settings.yaml").exists()
        arguments = ["--resume", str(self.folder)] if known else [str(self.settings)]
        self.said = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_rl.cli", "train", *arguments, *overrides],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def ended(self) -> bool:
        assert self.process is not None
        self.pids.update(descendants(os.getpid()))
        return self.process.poll() is not None

    @property
    def words(self) -> str:
        """What it has said since it was launched."""
        return self.log.read_text(errors="replace")[self.said :]

    @property
    def begun(self) -> bool:
        """Does it train, since it was launched?"""
        return "ranks from" in self.words

    def steps(self) -> int:
        return len(metrics(self.folder))

    def until(self, what: str, there: Callable[[], bool], glance: float = 0.05, patience: float = PATIENCE) -> bool:
        """Wait for it; False when the run ends before."""
        deadline = time.monotonic() + patience
        while not there():
            if self.ended:
                return False
            if time.monotonic() > deadline:
                raise Failed(f"waited {patience:.0f} s for {what}")
            time.sleep(glance)
        return True

    def doing(self) -> str:
        """What is under way, as far as one sees from outside."""
        processes = Processes.of(self.pid)
        seen = []
        if not self.begun:
            seen.append("starting")
        if any(self.folder.glob("checkpoints/*.partial")):
            seen.append("writing a checkpoint")
        if any(self.folder.glob("exports/*.partial")):
            seen.append("writing an export")
        if any(published(processes.ranks)):
            seen.append("publishing")
        if not seen:
            seen.append("learning" if any(map(busy, processes.ranks[1:])) else "waiting for samples")
        return f"step {self.steps()}, {' and '.join(seen)}"

    def gone(self) -> list[int]:
        """Wait for the end of all its processes; returns those that do not end."""
        deadline = time.monotonic() + 60
        while left := alive():
            if time.monotonic() > deadline:
                return left
            time.sleep(0.05)
        return []


def published(ranks: tuple[int, ...]) -> Iterator[Path]:
    """Folders of weights that are on their way."""
    return itertools.chain.from_iterable(MEMORY.glob(f"megatron-rl-publish.*.{rank}.*") for rank in ranks)


def toy_settings(place: Path) -> Any:
    """The quickstart's, but shorter of step and checkpoint, and rewarded for what random weights do now and then."""
    given = {
        "policy.init": place / "toy",
        "run.directory": place / "run",
        "run.steps": 100_000,  # ended from outside
        "rewards": "[{name: length, options: {high: 6}}]",
        "sampling.groups": 8,
        "sampling.group_size": 4,
        "sampling.max_new_tokens": 24,
        "sampling.stop_token_ids": str(list(range(3, 259, 16))),
        "sampling.ahead": 1,
        "evaluation.every": 4,
        "evaluation.prompts": 4,
        "checkpoint.every": 2,
        "checkpoint.export_every": 6,
    }
    return load_settings(ROOT / "configs/quickstart.yaml", [f"{name}={value}" for name, value in given.items()])


# -- blows ---------------------------------------------------------------------------------------------------------------


def strike(run: Run, blow: Blow) -> tuple[str, list[int]]:
    """Wait for the moment, and kill; returns what was under way, and who was killed."""
    if blow.moment == "start-up" and run.begun:
        stop(run)
        run.launch()
    if blow.moment != "start-up" and not run.until("its first step", lambda: run.begun):
        raise Failed("it ended by itself")
    deadline = time.monotonic() + blow.after
    run.until("the moment", lambda: time.monotonic() > deadline)
    killed: list[int] = []

    def there() -> bool:
        seen = {
            "checkpoint": lambda: any(run.folder.glob("checkpoints/*.partial")),
            "publish": lambda: any(published(Processes.of(run.pid).ranks)),
        }
        if blow.moment in seen and not seen[blow.moment]():
            return False
        killed[:] = Processes.of(run.pid).named(blow.victim)
        return bool(killed)

    if not run.until(f"{blow.victim}, {blow.moment}", there, glance=0.002):
        raise Failed("it ended by itself")
    doing = run.doing() if blow.moment in ("start-up", "any") else f"step {run.steps()}, {blow.moment}"
    for process in killed:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return doing, killed


def see_on(run: Run, blow: Blow) -> str:
    """What became of it. A run that has ended is launched again."""
    assert run.process is not None
    struck, begun, steps = time.monotonic(), run.begun, run.steps()
    if blow.victim in OF_THE_SERVER and run.until("steps after the blow", lambda: run.steps() >= steps + ENOUGH):
        return f"went on by itself, {ENOUGH} steps within {time.monotonic() - struck:.0f} s"
    try:
        code = run.process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        raise Failed(f"it did not end within {PATIENCE:.0f} s") from None
    left = run.gone()
    if left:
        raise Failed(f"processes are left: {', '.join(f'{each} ({command(each)[:80]})' for each in left)}")
    if blow.victim in OF_THE_SERVER and begun:
        raise Failed(f"it ended with {code} for the want of its server:\n{run.words[-1500:]}")
    if code == 0:
        raise Failed("it ended as if all were well")
    ended = f"ended with {code}, nothing left after {time.monotonic() - struck:.0f} s"
    again = "resumed" if (run.folder / "settings.yaml").exists() else "begun again"
    run.launch()
    return f"{ended}; {again}"


def stop(run: Run) -> None:
    """Told to stop, it saves and says so."""
    assert run.process is not None
    run.process.terminate()
    if run.process.wait(PATIENCE) != 143 or "saved; go on with" not in run.words:
        raise Failed(f"SIGTERM: it ended with {run.process.returncode}:\n{run.words[-1500:]}")
    if left := run.gone():
        raise Failed(f"SIGTERM left processes: {left}")


def finish(run: Run) -> int:
    """Let it do its last steps and end by itself; returns how many it has done."""
    steps = run.steps()
    if not run.until("its last steps", lambda: run.begun and run.steps() >= steps + LAST_STEPS):
        raise Failed(f"it ended by itself:\n{run.words[-1500:]}")
    stop(run)
    whole = run.steps() + LAST_STEPS
    run.launch(f"run.steps={whole}")
    assert run.process is not None
    if run.process.wait(PATIENCE) != 0:
        raise Failed(f"it ended with {run.process.returncode}:\n{run.words[-1500:]}")
    return whole


# -- the proof -----------------------------------------------------------------------------------------------------------


def problems(run: Run, steps: int) -> Iterator[str]:
    """What differs from a run that was never killed, and what is left behind."""
    whole = run.folder.with_name("whole")
    overrides = [f"bank.replay={run.folder / 'bank'}", f"run.directory={whole}", f"run.steps={steps}"]
    words = [sys.executable, "-m", "megatron_rl.cli", "train", str(run.settings), *overrides]
    with run.folder.with_name("whole.log").open("wb") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if subprocess.run(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode != 0:
            yield f"the uninterrupted run failed: {log.name}"
            return
    told = [line["step"] for line in metrics(run.folder)]
    if told != list(range(steps)):
        yield f"metrics.jsonl has the steps {told}"
    evaluated = [line["step"] for line in lines.read(run.folder / "evaluations.jsonl")]
    if evaluated != sorted({step for step in range(0, steps + 1, 4)} | {steps}):
        yield f"evaluations.jsonl has the steps {evaluated}"
    for own, other in zip(learned(run.folder), learned(whole), strict=False):
        names = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
        if names:
            yield f"metrics of step {own['step']} differ: {', '.join(names)}"
    for name in (f"checkpoints/step_{steps:08}", f"exports/step_{steps:08}"):
        files = sorted(path.relative_to(whole) for path in (whole / name).glob("*.safetensors"))
        if not files:
            yield f"{name} is not there"
        yield from (f"{file} differs" for file in files if (whole / file).read_bytes() != read(run.folder / file))
    for path in sorted(run.folder.rglob("*")):
        if path.name.endswith(HALF_WRITTEN) or (path.suffix == ".jsonl" and not path.read_bytes().endswith(b"\n")):
            yield f"half-written: {path.relative_to(run.folder)}"
    for path in sorted(MEMORY.iterdir()):
        if run.pids & {int(word) for word in path.name.replace("_", ".").split(".") if word.isdecimal()}:
            yield f"left in shared memory: {path}"
    if left := alive():
        yield f"processes are left: {left}"


def row(*cells: object) -> None:
    print("  ".join(f"{cell!s:<{width}}" for cell, width in zip(cells, (4, 6, 10, 17, 38, 0), strict=True)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how many (10)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first, for a plan that is done in pieces (0)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (0)")
    parser.add_argument("--folder", type=Path, help="where the run goes, and stays; default: a temporary folder")
    options = parser.parse_args()
    # Orphans become our children, so that none is overlooked. Parts of a server that ends while it starts tell their parent.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGQUIT, lambda *_: print("      (an orphan sent SIGQUIT to whoever became its parent)", flush=True))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # as Ctrl-C does: nothing is left running
    with tempfile.TemporaryDirectory(prefix="megatron-rl-chaos-") as name:
        sys.exit(torment(options, options.folder or Path(name)))


def torment(options: argparse.Namespace, place: Path) -> int:
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "megatron_rl.cli", "toy", str(place / "toy")], cwd=ROOT, check=True)
    run, began = Run(place), time.monotonic()
    found: list[str] = []
    row("kill", "at", "moment", "victim", "under way", "how it went on")
    try:
        run.launch()
        for blow in itertools.islice(plan(options.seed), options.first, options.first + options.kills):
            doing, killed = strike(run, blow)
            at = f"{time.monotonic() - began:.0f} s"
            row(blow.number, at, blow.moment, f"{blow.victim} ({len(killed)})", doing, see_on(run, blow))
        steps = finish(run)
        print(f"{steps} steps; an uninterrupted run learns from the same samples", flush=True)
        found += problems(run, steps)
    except Failed as failure:
        found.append(str(failure))
    finally:
        for process in alive():
            os.kill(process, signal.SIGKILL)
    for problem in found:
        print(f"WRONG: {problem}", flush=True)
    if not found:
        print("weights, moments, random generators, exports and metrics are equal bit for bit; nothing is left", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    main()
