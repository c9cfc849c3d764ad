"""Where things lie in a bank's folder, and which version of the format they are in.

bank.json                    format version, tokenizer
lock                         held by the process that writes
log                          finished groups that are not sealed yet
steps/step_00000012.parquet  the groups of a training step, sealed
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import BankError
from megatron_rl.rollout.bank import files

FORMAT = 1  # of log and Parquet files; raised when an older program could misread them
STEP_NAME = re.compile(r"step_(\d{8,})\.parquet")


@dataclass(frozen=True)
class Folder:
    path: Path

    @property
    def about(self) -> Path:
        return self.path / "bank.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def steps(self) -> Path:
        return self.path / "steps"

    def step(self, step: int) -> Path:
        return self.steps / f"step_{step:08}.parquet"

    def sealed(self) -> dict[int, Path]:
        """Sealed steps in their order."""
        found = {int(name[1]): path for path in self.steps.glob("*") if (name := STEP_NAME.fullmatch(path.name))}
        return dict(sorted(found.items()))

    def read_about(self) -> dict[str, Any]:
        """What bank.json says. Raises BankError where there is no bank that this program can read."""
        try:
            about = json.loads(self.about.read_bytes())
        except FileNotFoundError as error:
            why = f"it has no {self.about.name}" if self.path.is_dir() else "there is no such folder"
            raise BankError(
                f"{self.path} is not a bank: {why}. Give the folder of a bank, or of a run that has one."
            ) from error
        except (OSError, ValueError) as error:
            raise BankError(f"{self.about} cannot be read: {error}. Restore it, or give another bank.") from error
        require_format(self.about, about.get("format") if isinstance(about, dict) else None)
        return dict(about)

    def create(self, tokenizer: str | None) -> dict[str, Any]:
        """Make the bank if there is none. A folder with other things in it is left alone. Returns what bank.json says."""
        if self.about.exists():
            return self.read_about()
        own = {self.lock.name, self.log.name, self.steps.name, files.beside(self.about).name}
        others = sorted(path.name for path in self.path.iterdir() if path.name not in own)
        if others:
            raise BankError(f"{self.path} is not a bank and holds other files ({others[0]}). Name a new folder for the bank.")
        self.steps.mkdir(exist_ok=True)
        files.sync_file(self.path)
        files.sync_file(self.path.parent)
        about = {"format": FORMAT, "tokenizer": tokenizer}
        files.write_file(self.about, json.dumps(about, indent=2).encode() + b"\n")
        return about

    def remove_partial_files(self) -> None:
        """What a crash left unfinished; the log still has all of it."""
        for folder in (self.path, self.steps):
            for path in sorted(folder.glob(f"*{files.BESIDE}")):
                files.remove(path)


def require_format(where: Path, found: Any) -> None:
    """Raises BankError unless this program reads the format."""
    if not isinstance(found, int):
        raise BankError(f"{where} does not say which format it has: it was not written by this program, or is damaged.")
    if found > FORMAT:
        raise BankError(
            f"{where} has format {found}; this program reads up to {FORMAT}. Upgrade megatron-rl to "
            "one at least as new as the one that wrote it."
        )
