"""Reading boxes out of safetensors files, and writing such files as a stream.

The safetensors library maps whole files and saves whole dictionaries. Here a rank reads exactly the bytes that it owns
(`pread`, counted), and a file far larger than memory is written tensor by tensor, its header first: the shapes are known
beforehand. Format: https://github.com/huggingface/safetensors — 8 bytes little-endian length, a JSON header, the data.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_rl.config.errors import CheckpointError
from megatron_rl.weights.boxes import Box
from megatron_rl.weights.rules import Shape

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: Shape
    start: int  # absolute, in bytes

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """An open safetensors file. Only headers are read at once; boxes of tensors when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        try:
            self.tensors: Mapping[str, Stored] = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A tensor, or a box of it, in the format it is stored in."""
        stored = self.tensors[name]
        offset, size = box or ((0,) * len(stored.shape), stored.shape)
        values = torch.empty(size, dtype=stored.dtype)
        if not values.numel():
            return values
        target = memoryview(values.view(-1).view(torch.uint8).numpy())
        width = stored.dtype.itemsize
        done = 0
        for start, length in _runs(stored.shape, offset, size):
            self._read_into(target[done : done + length * width], stored.start + start * width)
            done += length * width
        return values

    def _read_into(self, target: memoryview, position: int) -> None:
        while target:
            count = os.preadv(self._descriptor, [target], position)
            if not count:
                raise CheckpointError(f"{self.path} ended while it was read: it was changed or cut. Fetch it again.")
            self.bytes_read += count
            target, position = target[count:], position + count

    def _read_header(self) -> Mapping[str, Stored]:
        size = os.fstat(self._descriptor).st_size
        cut = f"{self.path} is cut short or no safetensors file"
        if size < 8:
            raise CheckpointError(f"{cut}: it has {size} bytes. Fetch it again.")
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{cut}: its header would have {length} bytes of {size}. Fetch it again.")
        text = os.pread(self._descriptor, length, 8)
        self.bytes_read += 8 + length
        try:
            header = json.loads(text)
            tensors = {name: _stored(name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{cut}: its header cannot be understood ({error}). Fetch it again.") from error
        end = max((tensor.start + tensor.bytes for tensor in tensors.values()), default=8 + length)
        if end > size:
            raise CheckpointError(f"{cut}: its tensors end at byte {end}, the file at {size}. Fetch it again.")
        return tensors


def _stored(name: str, entry: Mapping[str, Any], data: int) -> Stored:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is of the unknown type {entry['dtype']}")
    stored = Stored(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), data + begin)
    if begin < 0 or stored.bytes != end - begin or any(length < 0 for length in stored.shape):
        raise ValueError(f"{name} has {end - begin} bytes for shape {list(stored.shape)}")
    return stored


def _runs(shape: Shape, offset: Shape, size: Shape) -> Iterator[tuple[int, int]]:
    """The contiguous stretches of a row-major tensor that a box is, in order: (start, length) in numbers."""
    axis = len(shape)
    while axis > 0 and size[axis - 1] == shape[axis - 1]:
        axis -= 1
    inner = math.prod(shape[axis:])
    if axis == 0:
        yield 0, inner
        return
    strides = [math.prod(shape[i + 1 :]) for i in range(axis)]
    length = size[axis - 1] * inner
    outer = [range(low, low + count) for low, count in zip(offset[: axis - 1], size[: axis - 1], strict=True)]
    for index in _indices(outer):
        yield sum(i * stride for i, stride in zip(index, strides, strict=False)) + offset[axis - 1] * inner, length


def _indices(ranges: Sequence[range]) -> Iterator[tuple[int, ...]]:
    if not ranges:
        yield ()
        return
    for first in ranges[0]:
        for rest in _indices(ranges[1:]):
            yield (first, *rest)


@dataclass(frozen=True)
class Planned:
    """A tensor of a file to be written."""

    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFileWriter:
    """Writes a safetensors file of planned tensors: the header at once, then numbers, each where they belong.

    `digest` (of hashlib) is fed with every byte; numbers must then come in the order of the plan. A file that need not outlive
    a power cut is not `durable`.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[Planned],
        metadata: Mapping[str, str] | None = None,
        *,
        digest: "hashlib._Hash | None" = None,
        durable: bool = True,
    ) -> None:
        self.path = path
        self._durable = durable
        self._digest = digest
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._missing = {name: math.prod(tensor.shape) for name, tensor in self._tensors.items()}  # numbers to come
        header = _header(self._tensors.values(), metadata or {})
        sizes = (tensor.bytes for tensor in self._tensors.values())
        self._starts = dict(zip(self._tensors, accumulate(sizes, initial=len(header)), strict=False))
        self._end = 0  # of what was written in order
        self._file = path.open("wb", buffering=0)
        self._write_at(0, memoryview(header))

    def write(self, name: str, values: Tensor) -> None:
        """A tensor, whole."""
        if tuple(values.shape) != self._tensors[name].shape:
            planned = self._tensors[name].shape
            raise ValueError(f"{self.path}: {name} was planned with shape {planned}, not {tuple(values.shape)}")
        self.put(name, 0, values)

    def put(self, name: str, start: int, values: Tensor) -> None:
        """Consecutive numbers of a tensor, from number `start` on, in the format that was planned."""
        planned = self._tensors[name]
        if values.dtype != planned.dtype:
            raise ValueError(f"{self.path}: {name} was planned as {planned.dtype}, not {values.dtype}")
        self._missing[name] -= values.numel()
        if self._missing[name] < 0 or start + values.numel() > math.prod(planned.shape):
            raise ValueError(f"{self.path}: more numbers come than {name} has")
        if values.numel():
            data = memoryview(values.detach().contiguous().view(-1).view(torch.uint8).numpy())
            self._write_at(self._starts[name] + start * planned.dtype.itemsize, data)

    def _write_at(self, position: int, data: memoryview) -> None:
        if self._digest is not None:
            if position != self._end:
                raise ValueError(f"{self.path}: with a digest, numbers are written in order")
            self._digest.update(data)
            self._end += len(data)
        while data:
            count = os.pwrite(self._file.fileno(), data, position)
            data, position = data[count:], position + count

    def close(self) -> None:
        """Every number must have been written; then the file is on disk, for good if it is durable."""
        with self._file:
            missing = [name for name, count in self._missing.items() if count]
            if missing:
                raise ValueError(f"{self.path}: planned tensors were not written: {', '.join(missing[:3])}")
            if self._durable:
                os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _header(tensors: Iterable[Planned], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in tensors:
        end = position + tensor.bytes
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of eight, as the library has it
    return len(text).to_bytes(8, "little") + text
