"""Weights as files: every rank writes its share side by side, while servers still generate; then they load the folder."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from megatron_rl.config.errors import SettingsError
from megatron_rl.weights.publish.groups import own_address
from megatron_rl.weights.publish.wire import Parcel
from megatron_rl.weights.safetensors_io import Planned, TensorFileWriter

PREFIX = "megatron-rl-publish"
MEMORY = Path("/dev/shm")  # the memory file system of Linux
SPARE = 1.05  # of the weights' bytes: headers, and others who write there too


def choose_folder(folder: Path | None, needed: int, everybody_here: bool) -> Path:
    """Where the files go: the folder of the settings, or memory where they fit, or the disk's folder for such files."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        candidates = [folder]
    elif not everybody_here:
        raise SettingsError(
            "publish.transport = disk with ranks or servers on several machines: they need a folder that all of them see. "
            "Name it with publish.folder, or use publish.transport=broadcast."
        )
    else:
        candidates = list(own_folders())
    for candidate in candidates:
        if _free(candidate) >= needed * SPARE:
            return candidate
    raise SettingsError(
        f"the weights take {needed / 1e9:.1f} GB; "
        + ", ".join(f"{each} has {_free(each) / 1e9:.1f} GB free" for each in candidates)
        + ". Name another folder with publish.folder, or use publish.transport=broadcast."
    )


def own_folders() -> tuple[Path, ...]:
    """Where files go if nobody says otherwise, the best place first."""
    return MEMORY, Path(tempfile.gettempdir())


def make_folder(parent: Path, version: int) -> Path:
    """A new folder for one publish."""
    remove_leftovers(parent)
    folder = parent / f"{PREFIX}.{socket.gethostname()}.{os.getpid()}.{version}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


def remove_leftovers(*parents: Path) -> None:
    """Remove what earlier processes of this machine died over: weights that may fill its memory."""
    for parent in parents:
        for left in parent.glob(f"{PREFIX}.{socket.gethostname()}.*"):
            if not _alive(left.name.rsplit(".", 2)[1]):
                shutil.rmtree(left, ignore_errors=True)


def write_bucket(folder: Path, rank: int, number: int, parcel: Parcel) -> None:
    """One safetensors file. SGLang loads every one of a folder, under whatever name."""
    planned = [Planned(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in parcel]
    with TensorFileWriter(folder / f"rank_{rank:05d}_{number:05d}.safetensors", planned, durable=False) as file:
        for name, tensor in parcel:
            file.write(name, tensor.cpu())


def is_here(url: str) -> bool:
    """Is the server on this machine?"""
    host = urlsplit(url).hostname
    return any(address[4][0] == own_address(url) for address in socket.getaddrinfo(host, None))


def _alive(pid: str) -> bool:
    return pid.isdecimal() and Path(f"/proc/{pid}").exists()


def _free(folder: Path) -> float:
    if not folder.is_dir():
        return 0.0
    free = float(shutil.disk_usage(folder).free)
    return min([free, *_available_memory()]) if folder == MEMORY else free


def _available_memory() -> Iterator[float]:
    """A memory file system promises more than there may be."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            yield float(line.split()[1]) * 1024
