"""Which server works on which request. Nothing here waits or speaks to anybody: `pool` does.

A request weighs the tokens that it may come to hold, prompt and longest response. A server has room while it has fewer
requests than it runs at once and less weight than its share; one with nothing to do always has room. Requests of a group go
to the server that has the group's prompt in its prefix cache, if it has room, else to the one with the least to do.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

REMEMBERED = 16384  # groups whose server is remembered; a forgotten one costs a prompt's computation


@dataclass(frozen=True)
class Capacity:
    """What a server takes on at once."""

    requests: int
    tokens: float


@dataclass
class Desk:
    """What a server has to do."""

    capacity: Capacity
    requests: int = 0
    tokens: int = 0
    load: float = field(default=0.0, init=False)  # the fuller of the two shares; kept, since it is asked for far more often

    def has_room(self, weight: int) -> bool:
        return self.requests == 0 or (self.requests < self.capacity.requests and self.tokens + weight <= self.capacity.tokens)

    def take(self, weight: int) -> None:
        self.requests += 1
        self.tokens += weight
        self._weigh()

    def finish(self, weight: int) -> None:
        self.requests -= 1
        self.tokens -= weight
        self._weigh()

    def resize(self, capacity: Capacity) -> None:
        """The server has told anew what it takes on."""
        self.capacity = capacity
        self._weigh()

    def _weigh(self) -> None:
        self.load = max(self.requests / self.capacity.requests, self.tokens / self.capacity.tokens)


@dataclass
class Homes:
    """Where the prompts of groups are."""

    _homes: OrderedDict[str, Hashable] = field(default_factory=OrderedDict)

    def choose[Name: Hashable](self, group: str, desks: Iterable[tuple[Name, Desk]], weight: int) -> Name | None:
        """The server for a request of a group among those that get work; None when none has room."""
        home, chosen, least = self._homes.get(group), None, math.inf
        for name, desk in desks:  # a hundred of them, for each of tens of thousands of requests: once, and little for each
            if name == home and desk.has_room(weight):
                chosen = name
                break
            if desk.load < least and desk.has_room(weight):
                chosen, least = name, desk.load
        if chosen is None:
            return None
        self._homes[group] = chosen
        self._homes.move_to_end(group)
        if len(self._homes) > REMEMBERED:
            self._homes.popitem(last=False)
        return chosen
