"""A server as the pool works with it: how it is, what it has to do, and which weights it has."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rl.rollout.client import Client
from megatron_rl.rollout.dispatch import Capacity, Desk
from megatron_rl.rollout.health import Dead, Health, Healthy, Quarantined, Starting, Suspect, change
from megatron_rl.rollout.server import Server


@dataclass(eq=False)
class Worker:
    """One server. Its health changes through `become` alone.

    `strikes` counts failures since its last whole response: requests that failed while it was thought healthy (of a batch that
    fails together only the first does), and probes. More than `forgiven` of them mean quarantine.
    """

    client: Client
    changed: Callable[[], None]  # called after each change of health
    forgiven: int
    server: Server | None = None  # a process of our own
    file: Path | None = None  # in which somebody has written its URL
    health: Health = field(default_factory=Starting)
    torn: bool = False  # an update failed half-way, or never came: whatever it says, its weights are no version
    stride: int = 1  # tokens that one step of its decoding adds to a response at most
    desk: Desk = field(default_factory=lambda: Desk(Capacity(0, 1.0)))
    attempts: "dict[str, asyncio.Task[object]]" = field(default_factory=dict)  # by request
    strikes: int = 0
    rests: int = 0  # quarantines since its last whole response
    restarts: int = 0
    look: asyncio.Event = field(default_factory=asyncio.Event)  # set to have its health looked at now

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def works(self) -> bool:
        """Whether it gets requests."""
        return isinstance(self.health, Healthy)

    def become(self, new: Health) -> None:
        """Change health. A server that is expected to answer no more loses its work, which goes on elsewhere."""
        if isinstance(new, Healthy) and isinstance(self.health, Quarantined):
            self.strikes = self.forgiven  # the next failure is one too many
        self.health = change(self.url, self.health, new)
        if isinstance(new, Quarantined):
            self.rests += 1
        if isinstance(new, Quarantined | Dead):
            for attempt in self.attempts.values():
                attempt.cancel()
        self.look.set()
        self.changed()

    def request_failed(self, reason: str) -> None:
        """A request failed in a way that is the server's fault."""
        if isinstance(self.health, Healthy):
            self._strike(reason)

    def probe_failed(self, reason: str) -> None:
        if isinstance(self.health, Healthy | Suspect):
            self._strike(reason)

    def request_done(self) -> None:
        """A response came whole."""
        self.strikes = self.rests = 0

    def _strike(self, reason: str) -> None:
        self.strikes += 1
        if self.strikes > self.forgiven:
            self.become(Quarantined(f"{self.strikes} failures in a row, the last: {reason}"))
        else:
            self.become(Suspect(self.strikes, reason))
