"""How a server is, as the pool sees it: a state with what it knows, and one place where states change.

Healthy servers get work. A suspect has failed a request or a probe: it keeps its work and gets no more. A quarantined one has
lost its work to others, and is asked now and then whether it is well. An outdated one is well but has other weights than the
rest. A paused one is being updated. One asleep has given its memory back, and is left alone until the next update. Dead is a
process that ended; left is a server that was told to go.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Starting:
    """Not heard of yet."""


@dataclass(frozen=True)
class Healthy:
    """Gets work."""


@dataclass(frozen=True)
class Suspect:
    """Failed, so many times in a row."""

    failures: int
    reason: str


@dataclass(frozen=True)
class Quarantined:
    """Gets no work until it is well."""

    reason: str


@dataclass(frozen=True)
class Outdated:
    """Gets no work until it has the current weights."""

    reason: str


@dataclass(frozen=True)
class Paused:
    """Its weights are being changed."""


@dataclass(frozen=True)
class Asleep:
    """It has given its memory back; nothing may be asked of it before it is woken."""


@dataclass(frozen=True)
class Dead:
    """Nothing is to be expected of it, unless it is started again."""

    reason: str


@dataclass(frozen=True)
class Left:
    """Told to go; what it still works on may finish."""


type Health = Starting | Healthy | Suspect | Quarantined | Outdated | Paused | Asleep | Dead | Left

# Where each state may lead. From suspect to suspect failures are counted, from dead to starting is a restart.
WAYS: Mapping[type, tuple[type, ...]] = {
    Starting: (Healthy, Outdated, Asleep, Quarantined, Dead, Left),
    Healthy: (Suspect, Quarantined, Paused, Dead, Left),
    Suspect: (Healthy, Suspect, Quarantined, Paused, Dead, Left),
    Quarantined: (Healthy, Outdated, Asleep, Quarantined, Dead, Left),
    Outdated: (Healthy, Quarantined, Paused, Dead, Left),
    Paused: (Healthy, Asleep, Quarantined, Dead, Left),
    Asleep: (Paused, Quarantined, Dead, Left),
    Dead: (Starting, Left),
    Left: (),
}


class ImpossibleTransition(RuntimeError):
    """A mistake of the pool's own."""


def change(server: str, old: Health, new: Health) -> Health:
    """The new state, if the old one may lead to it; said in the log."""
    if type(new) not in WAYS[type(old)]:
        raise ImpossibleTransition(f"{server} cannot become {name(new)} from {name(old)}")
    reason = getattr(new, "reason", "")
    calm = isinstance(new, Starting | Healthy | Paused | Asleep | Left)
    logger.log(
        logging.INFO if calm else logging.WARNING,
        "server %s: %s -> %s%s",
        server,
        name(old),
        name(new),
        f" ({reason})" if reason else "",
        extra={"server": server, "old": name(old), "new": name(new), "reason": reason},
    )
    return new


def name(health: Health) -> str:
    return type(health).__name__.lower()
