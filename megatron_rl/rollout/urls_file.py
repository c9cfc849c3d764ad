"""The file of URLs by which servers are found: a URL a line. Several machines may share one, each adding its own servers."""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit


def read_urls(text: str) -> set[str]:
    """URLs, one a line; empty lines and what follows a # aside."""
    urls = {line.partition("#")[0].strip().rstrip("/") for line in text.splitlines()} - {""}
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no URL of a server; expected http://host:port")
    return urls


@contextmanager
def announced(path: Path, urls: Iterable[str]) -> Iterator[None]:
    """The URLs are in the file for as long as this lasts; what others wrote into it stays."""
    own = {url.rstrip("/") for url in urls}
    _edit(path, add=own, remove=own)
    try:
        yield
    finally:
        _edit(path, add=(), remove=own)


def _edit(path: Path, add: Iterable[str], remove: Iterable[str]) -> None:
    """Whoever reads the file sees it whole, before or after; whoever writes waits for the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        lines = path.read_text().splitlines() if path.exists() else []
        gone = set(remove)
        kept = [line for line in lines if line.partition("#")[0].strip().rstrip("/") not in gone]
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text("".join(f"{line}\n" for line in [*kept, *sorted(add)]))
        beside.replace(path)
