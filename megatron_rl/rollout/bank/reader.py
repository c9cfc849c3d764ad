"""The bank as its readers see it, also while another process writes it."""

from collections.abc import Iterator
from pathlib import Path

from megatron_rl.rollout.bank.codec import decode_group
from megatron_rl.rollout.bank.folder import Folder
from megatron_rl.rollout.bank.index import Index
from megatron_rl.rollout.bank.log import LogView
from megatron_rl.rollout.bank.sealed import SealedStep
from megatron_rl.rollout.bank.writer import open_step
from megatron_rl.types import Group


class BankReader:
    """The bank as it was when this was opened: groups that are sealed, waiting, or carried. Nothing is locked or changed."""

    def __init__(self, path: Path) -> None:
        self._folder = Folder(path)
        self.tokenizer: str | None = self._folder.read_about().get("tokenizer")
        # The log first: a group that is sealed meanwhile is then seen twice, and known by its key, instead of never.
        self._log = LogView(self._folder.log)
        self._index = Index()
        for found in self._log.frames():
            self._index.take(found)
        self._steps = self._folder.sealed()
        self._drop_sealed()

    def _drop_sealed(self) -> None:
        """Groups of the log that the newest steps hold; steps before one that holds none were sealed long ago."""
        for path in reversed(self._steps.values()):
            waiting = len(self._index.groups)
            with SealedStep(path) as sealed:
                self._index.drop_groups(set(sealed.keys()))
            if len(self._index.groups) in (0, waiting):
                return

    def steps(self) -> list[int]:
        """Sealed steps."""
        return list(self._steps)

    def step(self, step: int) -> SealedStep:
        """A sealed step to read from. Close it after use."""
        return open_step(self._folder, step)

    def waiting(self) -> Iterator[Group]:
        """Groups that are finished and not sealed."""
        for entry in self._index.groups.values():
            yield decode_group(self._log.read(entry.offset))

    def carried(self) -> Iterator[Group]:
        """Groups with responses that go on."""
        for entry in self._index.carries.values():
            yield decode_group(self._log.read(entry.offset))

    def close(self) -> None:
        self._log.close()

    def __enter__(self) -> "BankReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
