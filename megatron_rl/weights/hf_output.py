"""A Hugging Face checkpoint to be written: its files, what each holds, and how numbers are encoded into them.

Offline conversion and a run's own export write by the same plan and so the same bytes, whoever computes which file.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_rl.weights.boxes import Box
from megatron_rl.weights.checkpoint_files import flush
from megatron_rl.weights.fp8 import BLOCK, quantization_config, quantize_rows, scale_shape
from megatron_rl.weights.hf_files import INDEX
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.quantize import SCALE
from megatron_rl.weights.rules import Shape
from megatron_rl.weights.safetensors_io import Planned, TensorFileWriter

Format = Literal["float32", "bfloat16", "fp8"]
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}
SHARD_SIZE = 5 * 10**9  # bytes: huggingface_hub's default
STRIP = 1 << 21  # numbers that are encoded at once
METADATA = {"format": "pt"}  # transformers reads no file without it
# Files that do not travel: weights of any kind, what belongs to them, and hidden files.
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)|.*\.index\.json|manifest\.json|\..*")


@dataclass(frozen=True)
class Output:
    """An HF tensor in the format that it is written in; FP8 is two tensors of a file."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def fp8(self) -> bool:
        return self.dtype == torch.float8_e4m3fn

    def stored(self) -> list[Planned]:
        tensors = [Planned(self.name, self.dtype, self.shape)]
        if self.fp8:
            tensors.append(Planned(self.name + SCALE, torch.float32, scale_shape(self.shape)))
        return tensors

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.stored())


@dataclass(frozen=True)
class OutputFile:
    """One file of the checkpoint."""

    name: str
    tensors: tuple[Output, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    def open(self, path: Path) -> TensorFileWriter:
        """Wide numbers first and then by name, as the safetensors library has it: so all lie at multiples of their size."""
        stored = [tensor for output in self.tensors for tensor in output.stored()]
        return TensorFileWriter(path, sorted(stored, key=lambda each: (-each.dtype.itemsize, each.name)), METADATA)


def plan_files(weight_map: WeightMap, format: Format, quantized: frozenset[str], shard_size: int) -> list[OutputFile]:
    """Deal all tensors, in the model's order, to files of at most so many bytes, by huggingface_hub's rule.

    A tensor larger than a file has one to itself. `quantized` counts for the format fp8.
    """
    shards: list[list[Output]] = []
    present: list[Output] = []
    filled = 0
    for name, entry in weight_map.hf.items():
        fp8 = format == "fp8" and name in quantized
        dtype = torch.float8_e4m3fn if fp8 else torch.float32 if entry.rule.float32 else DTYPES[format]
        output = Output(name, entry.shape, dtype)
        if output.bytes > shard_size:
            shards.append([output])
            continue
        if filled + output.bytes > shard_size:
            shards.append(present)
            present, filled = [], 0
        present.append(output)
        filled += output.bytes
    shards += [present] if present else []
    if len(shards) == 1:
        return [OutputFile("model.safetensors", tuple(shards[0]))]
    return [
        OutputFile(f"model-{number:05d}-of-{len(shards):05d}.safetensors", tuple(shard))
        for number, shard in enumerate(shards, 1)
    ]


# -- numbers -----------------------------------------------------------------------------------------------------------


def strips(shape: Shape, numbers: int = STRIP) -> Iterator[Box]:
    """Boxes of about so many numbers that fill a tensor in order, each a contiguous run of it.

    They are cut along the first axis longer than 1, at multiples of a block's rows.
    """
    axis = next((axis for axis, length in enumerate(shape) if length > 1), max(len(shape) - 1, 0))
    inner = math.prod(shape[axis + 1 :])
    rows = max(numbers // max(inner, 1) // BLOCK, 1) * BLOCK
    for start in range(0, shape[axis] if shape else 1, rows):
        length = min(rows, shape[axis] - start) if shape else 1
        offset = (*(0,) * axis, start, *(0,) * (len(shape) - axis - 1))
        yield (offset[: len(shape)], (*shape[:axis], length, *shape[axis + 1 :])[: len(shape)])


def write_strip(file: TensorFileWriter, output: Output, box: Box, values: Tensor) -> None:
    """Encode a strip of a tensor, or all of it, and write it where it belongs."""
    start = box[0][0] * math.prod(output.shape[1:])
    if not output.fp8:
        file.put(output.name, start, values.to(output.dtype))
        return
    numbers, scales = quantize_rows(values)
    file.put(output.name, start, numbers)
    file.put(output.name + SCALE, box[0][0] // BLOCK * scales.shape[1], scales)


# -- what else a checkpoint is -----------------------------------------------------------------------------------------


def travelling_files(folder: Path) -> list[Path]:
    """Files of a checkpoint folder that are not weights: config, tokenizer, generation config, chat template, code, licence."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not _WEIGHTS.fullmatch(path.name))


def exported_config(
    fields: Mapping[str, Any], weight_map: WeightMap, format: Format, quantized: frozenset[str]
) -> dict[str, Any]:
    """The config.json of the exported weights."""
    config = {name: value for name, value in fields.items() if name != "quantization_config"}
    name = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
    config[name] = str(DTYPES[format]).removeprefix("torch.")
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0
    if format == "fp8":
        config["quantization_config"] = quantization_config(weight_map, quantized)
    return config


def write_rest(folder: Path, files: Sequence[OutputFile], config: Mapping[str, Any], others: Sequence[Path]) -> None:
    """Everything but the weights: the index, config.json, and what travels from the source."""
    for path in others:
        if path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
    _write_json(folder / "config.json", config)
    if len(files) > 1:
        tensors = {tensor.name: file.name for file in files for output in file.tensors for tensor in output.stored()}
        size = sum(file.bytes for file in files)
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": tensors})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=path.name == INDEX, ensure_ascii=False) + "\n")
        flush(file)
