"""A Hugging Face config.json whose every field is checked as it is read.

An error names the file, the field, its value and what would be right, so that a wrong model is refused before anything is
loaded. What the fields mean is `config.families`' business.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_rl.config.errors import SettingsError

_REQUIRED: Any = object()  # the default of a field that has none


@dataclass(frozen=True)
class HfConfig:
    """The fields of a config.json, or of an object inside one (`place` says which). null is the same as absent."""

    path: Path
    fields: Mapping[str, Any]
    place: str = ""

    def refuse(self, field: str, reason: str) -> NoReturn:
        """Raise the error of one field: where it is, what it says and why that does not work."""
        says = f"={json.dumps(self.fields[field])}" if field in self.fields else " is missing"
        raise SettingsError(f"{self.path}: {self.place}{field}{says}: {reason}")

    def require(self, field: str) -> None:
        """The field must be there, be it null: its default differs between families and versions."""
        if field not in self.fields:
            self.refuse(field, "the model cannot be described without it")

    def value(self, field: str, default: Any = _REQUIRED) -> Any:
        value = self.fields.get(field)
        if value is None and default is _REQUIRED:
            self.refuse(field, "the model cannot be described without it")
        return default if value is None else value

    def integer(self, field: str, default: Any = _REQUIRED, *, minimum: int = 1) -> Any:
        value = self.value(field, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.refuse(field, f"expected an integer of at least {minimum}")
        return value

    def number(self, field: str, default: Any = _REQUIRED, *, minimum: float = 0.0, exclusive: bool = True) -> Any:
        value = self.value(field, default)
        if value is default:
            return value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (value > minimum if exclusive else value >= minimum) or value == float("inf"):
            self.refuse(field, f"expected a number {'above' if exclusive else 'of at least'} {minimum:g}")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        value = self.value(field, default)
        if not isinstance(value, bool):
            self.refuse(field, "expected true or false")
        return value

    def mapping(self, field: str) -> "HfConfig":
        """The object under `field`; an empty one when it is null or absent."""
        value = self.value(field, {})
        if not isinstance(value, dict):
            self.refuse(field, "expected an object")
        return HfConfig(self.path, value, f"{self.place}{field}.")

    def name_of(self, *names: str) -> str:
        """Which of several names of the same field this file uses; the first when it uses none."""
        used = [name for name in names if self.fields.get(name)]
        for name in used[1:]:
            if self.fields[name] != self.fields[used[0]]:
                self.refuse(name, f"contradicts {used[0]}={json.dumps(self.fields[used[0]])}, its other name; keep one of them")
        return used[0] if used else names[0]


def read_hf_config(path: Path) -> HfConfig:
    """Read a config.json, given the file or the folder that holds it."""
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        wanted = "give a Hugging Face config.json or the folder that holds it"
        if (path / "manifest.json").is_file():
            wanted = (
                "the folder is a checkpoint of a run. Go on with that run (megatron-rl train --resume RUN_DIR, or "
                "megatron-rl sft CONFIG --resume), begin from its exports/, "
                "or make a Hugging Face checkpoint of it (megatron-rl convert --format hf)"
            )
        raise SettingsError(f"policy.config: {file} does not exist; {wanted}") from error
    except OSError as error:
        raise SettingsError(f"policy.config: {file} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"policy.config: {file} is not valid JSON ({error}); is the download complete?") from error
    if not isinstance(fields, dict):
        raise SettingsError(f"policy.config: {file} holds a JSON {type(fields).__name__} where an object is expected")
    return HfConfig(file, fields)
