"""Sampling without learning: fills the bank step after step, and goes on where it stopped."""

import json
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.settings import Settings
from megatron_rl.rollout.bank.files import private_folder
from megatron_rl.rollout.client import Client
from megatron_rl.rollout.collector import BEGINNING, Collected, Position
from megatron_rl.rollout.errors import ServerError
from megatron_rl.rollout.keys import api_key
from megatron_rl.rollout.own_servers import own_servers
from megatron_rl.rollout.session import Session, open_session
from megatron_rl.rollout.suitability import UnsuitableServer
from megatron_rl.rollout.told import until_told

STATE = "sampling.json"


@dataclass(frozen=True)
class Filled:
    """A step of the bank that has just been sealed."""

    collected: Collected
    seconds: float
    samples: int
    tokens: int  # that the policy wrote
    failed: int  # samples without an honest reward


def read_state(directory: Path) -> tuple[int, Position]:
    """The next step, and where drawing stands."""
    path = directory / STATE
    if not path.is_file():
        return 0, BEGINNING
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return int(found["step"]), Position(int(found["draws"]), tuple(int(draw) for draw in found["pending"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} cannot be read: {error!r}. Restore it, or sample into another run.directory.") from error


def write_state(directory: Path, step: int, position: Position) -> None:
    """Beside, then renamed: it is never half there."""
    partial = directory / f"{STATE}.partial"
    text = json.dumps({"step": step, "draws": position.draws, "pending": list(position.pending)})
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / STATE)


async def fill(
    settings: Settings,
    model: Architecture,
    steps: int,
    opened: Callable[[Session, int], None],
    starting: Callable[[], None] = lambda: None,
) -> AsyncIterator[Filled]:
    """Sample until the bank holds so many steps.

    `starting` is told when own servers are about to be started, `opened` when everything works, and which step comes first.
    A signal to end is a CancelledError, also while servers are waited for; the same call goes on later.
    """
    private_folder(settings.run.directory)
    step, position = read_state(settings.run.directory)
    if step >= steps:
        return
    servers, key = own_servers(settings), api_key(settings)
    with until_told():
        version = await weights_of(settings.servers.urls, model, key)
        async with open_session(
            settings,
            model,
            servers,
            api_key=partial(api_key, settings),
            version=version,
            step=step,
            position=position,
            starting=starting,
        ) as session:
            opened(session, step)
            for current in range(step, steps):
                began = time.monotonic()
                session.collector.updated(current)  # nothing is learned: every step counts as the update before the next
                collected = await session.collector.collect(current)
                write_state(settings.run.directory, current + 1, collected.position)
                yield _report(session, collected, time.monotonic() - began)


async def weights_of(urls: Sequence[str], model: Architecture, key: str | None) -> int:
    """The version of the weights that somebody else's servers have: nothing is updated here, so all must have the same."""
    for url in urls:
        async with Client(url, model.vocab, key) as client:
            try:
                info = await client.model_info()
            except ServerError as error:
                raise UnsuitableServer(
                    f"{error}. Is a server running there? Correct servers.urls, or start servers with `megatron-rl serve`."
                ) from error
            if info.state != "whole":
                raise UnsuitableServer(
                    f"The server {url} has no weights to sample from (they are {info.state}): a run ended while it slept, or "
                    "in the middle of an update. Start it again, or let a run train on it."
                )
            return info.version or 0
    return 0


def _report(session: Session, collected: Collected, seconds: float) -> Filled:
    with session.bank.sealed(collected.step) as sealed:
        table = sealed.columns(["loss_tokens", "failure"])
        failures = [failure is not None for failure in table.column("failure").to_pylist()]
        return Filled(collected, seconds, sealed.rows, sum(table.column("loss_tokens").to_pylist()), sum(failures))
