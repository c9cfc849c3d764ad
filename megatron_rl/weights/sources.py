"""Where a conversion's numbers come from: a Hugging Face folder or a Megatron checkpoint, asked in the words of either.

A source answers for boxes of HF tensors (in the published form) and of Megatron tensors alike, and knows before anything is
written whether names, shapes, formats and config fit together. Numbers that are not finite are found as they are read.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import CheckpointError
from megatron_rl.config.families import read_architecture
from megatron_rl.weights.boxes import Box, finite, within
from megatron_rl.weights.checkpoint_files import MANIFEST, CheckpointFiles, differences
from megatron_rl.weights.fp8 import audit, served_tensors
from megatron_rl.weights.hf_files import FLOATS, HfFolder, read_json
from megatron_rl.weights.hf_output import travelling_files
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.quantize import SCALE


class Source(ABC):
    """Weights to be converted."""

    kind: str

    def __init__(self, folder: Path, description: Path) -> None:
        self.folder = folder
        self.description = description  # config.json, or the folder that holds it with what else travels
        self.architecture: Architecture = read_architecture(description)
        self.weight_map = WeightMap(self.architecture)

    @abstractmethod
    def check(self) -> None:
        """Raise for whatever is wrong that can be known without reading the numbers."""

    @abstractmethod
    def megatron(self, name: str, box: Box) -> Tensor:
        """A box of a Megatron tensor. Padding is zero."""

    @abstractmethod
    def formats(self) -> set[torch.dtype]:
        """The formats that weights are stored in."""

    @abstractmethod
    def identity(self) -> Any:
        """What changes when the source does: JSON."""

    @abstractmethod
    def close(self) -> None: ...

    def hf(self, name: str, box: Box) -> Tensor:
        """A box of an HF tensor of the published form."""
        values: Tensor | None = None
        for part in self.weight_map.parts(name):
            inside = part.inside(box)
            if inside is not None:
                numbers = self.megatron(inside.megatron, inside.box)
                if inside.hf_box == box:
                    return numbers.view(box[1])
                values = torch.empty(box[1], dtype=numbers.dtype) if values is None else values
                values[within(inside.hf_box, box)].copy_(numbers.view(inside.hf_box[1]))
        assert values is not None
        return values

    def config(self) -> Mapping[str, Any]:
        """The fields of config.json."""
        return read_json(self.description / "config.json" if self.description.is_dir() else self.description)

    def others(self) -> list[Path]:
        """Files that travel with the weights."""
        return travelling_files(self.description) if self.description.is_dir() else []

    def _finite(self, name: str, values: Tensor) -> Tensor:
        if not finite(values):
            raise CheckpointError(f"{self.folder}: {name} holds numbers that are not finite. The checkpoint is damaged.")
        return values


class HfSource(Source):
    """A Hugging Face folder, in either form, of plain or FP8 weights."""

    kind = "hf"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder)
        self.files = HfFolder(folder)
        self.own_map = self.files.weight_map(self.architecture)

    def check(self) -> None:
        for name, entry in self.own_map.hf.items():
            self.files.require_shape(name, entry.shape)
            stored = self.files.stored(name).dtype
            if stored not in FLOATS and not (stored == torch.float8_e4m3fn and name + SCALE in self.files.names):
                raise CheckpointError(f"{self.folder}: {name} is stored as {stored}, which is not a weight format known here")
        stored_fp8 = [name for name in self.own_map.hf if self.files.is_fp8(name)]
        if self.own_map.form == "published":
            served = served_tensors(self.own_map, self.config().get("quantization_config"))
            audit({f"the config.json of {self.folder}": served, "its files": stored_fp8})

    def megatron(self, name: str, box: Box) -> Tensor:
        values: Tensor | None = None
        for piece in self.own_map.pieces(name, box):
            numbers = self._finite(piece.hf, self.files.values(piece.hf, piece.hf_box))
            if piece.box == box:
                return numbers.view(box[1])
            values = torch.zeros(box[1], dtype=numbers.dtype) if values is None else values
            values[within(piece.box, box)].copy_(numbers.view(piece.box[1]))
        return torch.zeros(box[1]) if values is None else values  # nothing but padding

    def hf(self, name: str, box: Box) -> Tensor:
        if self.own_map.form != "published":
            return super().hf(name, box)
        return self._finite(name, self.files.values(name, box))

    def formats(self) -> set[torch.dtype]:
        return {self.files.stored(name).dtype for name, entry in self.own_map.hf.items() if not entry.rule.float32}

    def identity(self) -> Any:
        return _identity([self.folder / name for name in sorted(set(self.files.names.values()))] + self.others())

    def close(self) -> None:
        self.files.close()


class MegatronSource(Source):
    """A Megatron checkpoint: of weights alone, or of a whole run. `description` overrides where config.json is sought."""

    kind = "megatron"

    def __init__(self, folder: Path, description: Path | None = None) -> None:
        self.files = CheckpointFiles(folder)
        super().__init__(folder, description or _description(folder, self.files.manifest))

    def check(self) -> None:
        found = differences(self.files.manifest["architecture"], asdict(self.architecture))
        problems = [text.replace("in the settings", f"in {self.description}") for text in found]
        for name, rule in self.weight_map.rules.items():
            whole = (0,) * len(rule.shape), rule.shape
            sources = self.files.sources(name, rule.shape, None, whole)
            problems += [sources] if isinstance(sources, str) else []
        names = (name for name in self.files.manifest["tensors"] if name.startswith("model."))
        problems += [f"{name} is not known to the model" for name in names if name not in self.weight_map.rules]
        for file in self.files.manifest["files"]:
            path = self.folder / file["name"]
            size = path.stat().st_size if path.is_file() else None
            if size != file["bytes"]:
                problems.append(
                    f"{path.name} is missing" if size is None else f"{path.name} has {size} bytes of {file['bytes']}"
                )
        if problems:
            shown = "; ".join(problems[:5]) + ("; …" if len(problems) > 5 else "")
            raise CheckpointError(
                f"checkpoint {self.folder} does not fit together: {shown}. Copy it again, or use another one."
            )

    def megatron(self, name: str, box: Box) -> Tensor:
        sources = self.files.sources(name, self.weight_map.rules[name].shape, None, box)
        if isinstance(sources, str):
            raise CheckpointError(f"checkpoint {self.folder}: {sources}")
        if len(sources) == 1:
            return self._finite(name, self.files.read(sources[0]))
        values = torch.empty(box[1], dtype=self.files.dtype(name))
        self.files.fill_box(sources, box, values)
        return self._finite(name, values)

    def formats(self) -> set[torch.dtype]:
        saved = self.files.manifest["tensors"]
        rules = self.weight_map.rules.items()
        return {self.files.dtype(name) for name, rule in rules if name in saved and not rule.float32}

    def identity(self) -> Any:
        return _identity([self.folder / MANIFEST, *self.others()])

    def close(self) -> None:
        self.files.close()


def open_source(folder: Path, description: Path | None = None) -> Source:
    """The weights in a folder, of whichever kind it is."""
    if (folder / MANIFEST).is_file():
        return MegatronSource(folder, description)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: name a Hugging Face folder, or a Megatron checkpoint (step_…)")
    if description is not None:
        raise CheckpointError(f"{folder} is a Hugging Face folder and has a config.json of its own: --like is for checkpoints")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder / 'config.json'} does not exist: it says what the weights are. Fetch it as well.")
    return HfSource(folder)


def _identity(paths: list[Path]) -> list[list[object]]:
    """Names, sizes and times of files."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _description(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Where the config.json of a checkpoint is: in it, or where its run had it from."""
    if (folder / "config.json").is_file():
        return folder
    named = Path(manifest.get("settings", {}).get("policy", {}).get("config", "config.json"))
    if named.exists():
        return named
    raise CheckpointError(
        f"{folder} holds no config.json, and {named}, which its run had it from, is not there. Name the folder of the model "
        "that it was trained from: --like DIR"
    )
