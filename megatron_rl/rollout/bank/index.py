"""What a log holds, by key: where each record lies, without its arrays."""

import json
from collections.abc import Container
from dataclasses import dataclass, field

from megatron_rl.config.errors import BankError
from megatron_rl.rollout.bank.codec import peek
from megatron_rl.rollout.bank.frames import Frame, Kind


@dataclass(frozen=True)
class Entry:
    """A record of the log."""

    offset: int
    step: int
    rewards: frozenset[str]  # names of components


@dataclass
class Index:
    """Live records of a log, in the order they were written. Others are dead: the next rewrite drops them."""

    groups: dict[str, Entry] = field(default_factory=dict)
    carries: dict[str, Entry] = field(default_factory=dict)
    dead: int = 0

    def take(self, found: Frame) -> None:
        """Enter a frame, in the order of the log."""
        if found.kind == Kind.DISCARD:
            self.discard(json.loads(found.payload)["key"])
        elif found.kind != Kind.OPENING:
            key, step, rewards = peek(found.payload)
            self.put(found.kind, key, Entry(found.offset, step, rewards))

    def put(self, kind: int, key: str, entry: Entry) -> None:
        match kind:
            case Kind.GROUP if key in self.groups:
                raise BankError(f"group {key} stands in the log twice: two programs wrote it. Restore the log from a copy.")
            case Kind.GROUP:
                self.groups[key] = entry
                self._drop_carry(key)
            case Kind.CARRY:
                self._drop_carry(key)
                self.carries[key] = entry
            case _:
                raise BankError(f"the log has a record of kind {kind}, which this program does not know. Upgrade megatron-rl.")

    def discard(self, key: str) -> None:
        self.dead += 1  # the record that says so
        if self.groups.pop(key, None):
            self.dead += 1
        self._drop_carry(key)

    def drop_groups(self, keys: Container[str]) -> None:
        """These lie in a sealed step."""
        gone = [key for key in self.groups if key in keys]
        for key in gone:
            del self.groups[key]
        self.dead += len(gone)

    def offsets(self) -> list[int]:
        return sorted(entry.offset for entry in (*self.groups.values(), *self.carries.values()))

    def move(self, moved: dict[int, int]) -> None:
        """Records lie elsewhere now, and nothing dead is left."""
        for table in (self.groups, self.carries):
            table |= {key: Entry(moved[entry.offset], entry.step, entry.rewards) for key, entry in table.items()}
        self.dead = 0

    def _drop_carry(self, key: str) -> None:
        if self.carries.pop(key, None):
            self.dead += 1
