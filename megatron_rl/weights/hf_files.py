"""A Hugging Face checkpoint on disk: which file holds which tensor, and its numbers by the box.

Block-scaled FP8 checkpoints (the DeepSeek-V3 form: `weight` in e4m3 beside `weight_scale_inv`, one float32 for each
128 × 128 block) read like any other: the numbers come out multiplied by their scales.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_rl.config.errors import CheckpointError
from megatron_rl.weights.boxes import Box
from megatron_rl.weights.map import WeightMap, form_of
from megatron_rl.weights.quantize import SCALE
from megatron_rl.weights.rules import Shape
from megatron_rl.weights.safetensors_io import Stored, TensorFile

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HfFolder:
    """An HF checkpoint, opened for reading. Files are opened, and their headers read, when a tensor of them is wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, TensorFile] = {}
        self.names: Mapping[str, str] = self._locate()  # tensor -> file name
        self._block = self._block_size()

    @property
    def bytes_read(self) -> int:
        """Of all files with weights, headers included."""
        return sum(file.bytes_read for file in self._files.values())

    @property
    def tensors(self) -> set[str]:
        """The tensors that carry weights; the scales of FP8 tensors belong to them."""
        return {name for name in self.names if not self._is_scale(name)}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- asking --------------------------------------------------------------------------------------------------------

    def stored(self, name: str) -> Stored:
        """What the file's header says of a tensor."""
        file = self._open(self.names[name])
        if name not in file.tensors:
            raise CheckpointError(
                f"{self.folder / INDEX} says that {name} is in {self.names[name]}, which does not hold it. "
                "The index and the files are of different checkpoints: fetch them again."
            )
        return file.tensors[name]

    def is_fp8(self, name: str) -> bool:
        return self.stored(name).dtype == torch.float8_e4m3fn

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Numbers of a tensor as they are stored: FP8 values stay FP8, without their scales."""
        self.stored(name)
        return self._open(self.names[name]).read(name, box)

    def values(self, name: str, box: Box | None = None) -> Tensor:
        """Numbers of a tensor: in the stored floating-point format, or in float32 where FP8 is multiplied by its scales."""
        stored = self.stored(name)
        if stored.dtype in FLOATS:
            return self.read(name, box)
        if stored.dtype != torch.float8_e4m3fn or len(stored.shape) < 2:
            raise CheckpointError(f"{self.folder}: {name} is stored as {stored.dtype}, which is not a weight format known here")
        return self._scaled(stored, box or ((0,) * len(stored.shape), stored.shape))

    def _scaled(self, stored: Stored, box: Box) -> Tensor:
        """e4m3 numbers times the scales of the blocks that they lie in."""
        name = stored.name + SCALE
        if name not in self.names:
            raise CheckpointError(f"{self.folder}: {stored.name} is FP8, but its scales, {name}, are missing")
        blocks = tuple(-(-length // step) for length, step in zip(stored.shape[-2:], self._block, strict=True))
        if self.stored(name).shape != (*stored.shape[:-2], *blocks):
            raise CheckpointError(
                f"{self.folder}: {name} has shape {list(self.stored(name).shape)}; blocks of {self._block} of {stored.name} "
                f"need {[*stored.shape[:-2], *blocks]}. Is weight_block_size in config.json right?"
            )
        offset, size = box
        lead = len(stored.shape) - 2
        first = [low // step for low, step in zip(offset[lead:], self._block, strict=True)]
        stop = [-(-(low + n) // step) for low, n, step in zip(offset[lead:], size[lead:], self._block, strict=True)]
        count = tuple(end - begin for begin, end in zip(first, stop, strict=True))
        scales = self.read(name, ((*offset[:lead], *first), (*size[:lead], *count))).float()
        for axis, step, begin in zip((-2, -1), self._block, first, strict=True):
            scales = scales.repeat_interleave(step, axis)
            scales = scales.narrow(axis, offset[axis] - begin * step, size[axis])
        return self.read(stored.name, box).float() * scales

    # -- checking ------------------------------------------------------------------------------------------------------

    def weight_map(self, architecture: Any) -> WeightMap:
        """The map in the form that this checkpoint has, once its names are those of the architecture."""
        weight_map = WeightMap(architecture, form_of(self.names))
        missing = [name for name in weight_map.hf if name not in self.names]
        extra = [name for name in self.extras(weight_map) if not weight_map.is_extra(name, self.names)]
        if missing or extra:
            wrong = [
                f"{len(names)} {word} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                for word, names in (("missing", missing), ("not known to the model", extra))
                if names
            ]
            raise CheckpointError(
                f"{self.folder} does not hold the weights of a {architecture.family} as its config.json describes it: "
                f"tensors {' and '.join(wrong)}. Is the download whole, and is the config of this checkpoint?"
            )
        return weight_map

    def require_shape(self, name: str, shape: Shape) -> None:
        """A tensor must have the shape that the config asks for."""
        found = self.stored(name).shape
        if found != shape:
            raise CheckpointError(
                f"{self.folder}: {name} has shape {list(found)}, but config.json describes {list(shape)}: "
                "config and weights are of different models."
            )

    def extras(self, weight_map: WeightMap) -> list[str]:
        """Tensors that the checkpoint has and the model does not train."""
        return sorted(name for name in self.tensors if name not in weight_map.hf)

    # -- files ---------------------------------------------------------------------------------------------------------

    def _is_scale(self, name: str) -> bool:
        return name.endswith(SCALE) and name.removesuffix(SCALE) in self.names

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            self._files[file] = TensorFile(self.folder / file)
        return self._files[file]

    def _locate(self) -> Mapping[str, str]:
        if (self.folder / INDEX).is_file():
            names = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                raise CheckpointError(f"{self.folder / INDEX} has no weight_map of tensors and files. Fetch it again.")
            outside = [file for file in names.values() if Path(file).name != file]
            if outside:
                raise CheckpointError(f"{self.folder / INDEX} names {outside[0]}, which is not a file of its folder")
            absent = sorted({file for file in names.values() if not (self.folder / file).is_file()})
            if absent:
                raise CheckpointError(
                    f"{self.folder} lacks {len(absent)} of its files ({', '.join(absent[:3])}). Is the download whole?"
                )
            return names
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).tensors, SINGLE)
        raise CheckpointError(
            f"{self.folder} has neither {INDEX} nor {SINGLE}: it is not a Hugging Face checkpoint in safetensors files."
        )

    def _block_size(self) -> tuple[int, int]:
        """How many rows and columns share a scale."""
        config = self.folder / "config.json"
        quantization = read_json(config).get("quantization_config") if config.is_file() else None
        if not isinstance(quantization, dict):
            return (128, 128)
        method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
        if method != "fp8" or not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) for n in block)):
            raise CheckpointError(
                f"{config}: quantization_config of method {method!r} with weight_block_size {block!r} is not read here; "
                "block-scaled FP8 ('fp8', [128, 128]) and unquantised weights are. Use the model's bf16 checkpoint."
            )
        return (block[0], block[1])


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return found
