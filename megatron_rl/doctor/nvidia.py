"""What nvidia-smi says. It needs no torch, and it is there where the driver is."""

import shutil
import subprocess
from dataclasses import dataclass

SECONDS = 30.0  # it answers in one, and hangs where a GPU has fallen off the bus
FIELDS = "index,uuid,name,memory.total,memory.used,driver_version,ecc.errors.uncorrected.volatile.total"


class DriverFault(RuntimeError):
    """nvidia-smi is there and cannot tell."""


@dataclass(frozen=True)
class Gpu:
    """One GPU of the machine."""

    index: int
    uuid: str
    name: str
    total: int  # MiB
    used: int  # MiB
    driver: str
    faults: int  # memory errors that could not be corrected, since the driver was loaded


def ask(*arguments: str) -> str | None:
    """What it prints; None where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as fault:
        raise DriverFault(f"nvidia-smi does not answer: {fault}") from fault
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise DriverFault(f"nvidia-smi ended with code {done.returncode} and said: {said[-1]}")
    return done.stdout


def gpus() -> list[Gpu]:
    """All of the machine, whatever this process may see. None where there is no driver, or it cannot tell."""
    try:
        return read_gpus()
    except DriverFault:
        return []  # the check of GPUs tells why


def read_gpus() -> list[Gpu]:
    text = ask(f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits") or ""
    return [_gpu([cell.strip() for cell in line.split(",")]) for line in text.splitlines() if line.strip()]


def _gpu(cells: list[str]) -> Gpu:
    index, uuid, name, total, used, driver, faults = cells
    return Gpu(int(index), uuid, name, _number(total), _number(used), driver, _number(faults))


def _number(cell: str) -> int:
    """A count; what a GPU does not have is "[N/A]"."""
    return int(cell) if cell.isdecimal() else 0


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver can run."""
    for line in (ask() or "").splitlines():
        _, found, rest = line.partition("CUDA Version:")
        if found:
            major, _, minor = rest.split()[0].partition(".")
            return int(major), int(minor or 0)
    return None


def others() -> list[str]:
    """Programs that use GPUs now: process, memory in MiB and name."""
    text = ask("--query-compute-apps=pid,used_memory,process_name", "--format=csv,noheader,nounits") or ""
    return [line.strip() for line in text.splitlines() if line.strip()]


def links() -> dict[tuple[int, int], str]:
    """How pairs of GPUs are connected, as `topo -m` names it: NV18 is NVLink, PIX PXB PHB NODE SYS are ever farther."""
    lines = [line.split() for line in (ask("topo", "-m") or "").splitlines()]
    rows = [line[1:] for line in lines if line and line[0].startswith("GPU") and "X" in line]  # X: a GPU and itself
    return {(i, j): row[j] for i, row in enumerate(rows) for j in range(i + 1, min(len(rows), len(row)))}
