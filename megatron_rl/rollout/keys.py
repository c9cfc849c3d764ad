"""The servers' API key: which file it is in, and how one comes to be that nobody has given.

It is in files that their owner alone may read, and nowhere else: not in settings, which name the file, not on command lines,
and not in what a run tells.
"""

import os
import secrets
from pathlib import Path

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.settings import Settings
from megatron_rl.rollout.bank.files import private_folder
from megatron_rl.rollout.server import is_loopback

BESIDE = ".key"  # behind the name of a file of URLs: the key of the servers in it
MADE = "api_key"  # beside the logs of own servers
NOT_MADE = "(made when servers start)"
BYTES = 32  # of randomness


def api_key(settings: Settings) -> str | None:
    """The key that a run's servers are asked with, its own and somebody else's.

    It is in servers.api_key_file; or beside servers.urls_file, where `megatron-rl serve` leaves it. Own servers that listen
    beyond this machine are never without: one is made for them where none is given.
    """
    key = given_key(settings)
    if key is None and settings.servers.starts_any and not is_loopback(settings.servers.host):
        return made_key(logs_folder(settings) / MADE)
    return key


def given_key(settings: Settings) -> str | None:
    """The same where there is one already."""
    servers = settings.servers
    if servers.api_key_file is not None:
        return read_key(servers.api_key_file)
    if servers.urls_file is not None and (beside := beside_urls(servers.urls_file)).exists():
        return read_key(
            beside,
            "the key beside servers.urls_file",
            "Run as the user whose servers these are, or name a copy of it in servers.api_key_file",
        )
    return None


def served_key(settings: Settings, urls: Path, *, make: bool = True) -> str | None:
    """The key of servers whose URLs are written into a file: that of the settings, or one beside the file for all who share it.

    Without `make` none is made, and a word stands for one that would be.
    """
    servers = settings.servers
    if servers.api_key_file is not None:
        return read_key(servers.api_key_file)
    if is_loopback(servers.host):
        return None
    return made_key(beside_urls(urls)) if make else NOT_MADE


def beside_urls(urls: Path) -> Path:
    return urls.with_name(urls.name + BESIDE)


def logs_folder(settings: Settings) -> Path:
    """Where own servers write their logs."""
    return settings.servers.logs or settings.run.directory / "servers"


def read_key(path: Path, name: str = "servers.api_key_file", fix: str = "Write the key into it") -> str:
    """The key in a file; `name` and `fix` are for the error where it cannot be read."""
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{name} = {path}: it cannot be read: {error}. {fix}.") from error
    if not key or not key.isprintable() or " " in key:
        raise SettingsError(f"{name} = {path}: it holds no key. Write one word into it.")
    return key


def made_key(path: Path) -> str:
    """The key in a file, which is made where it is not there. Of several who make it at once one does, and all read that."""
    if not path.exists():
        private_folder(path.parent)
        mine = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with open(os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{secrets.token_urlsafe(BYTES)}\n")
        try:
            os.link(mine, path)  # whole, or not at all, and never over another
        except FileExistsError:
            return read_key(path)
        finally:
            mine.unlink()
    return read_key(path)
