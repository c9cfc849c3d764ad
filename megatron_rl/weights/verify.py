"""Proof of a conversion: every tensor's checksum, from the source and from what was written, read back through the map."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.config.errors import CheckpointError
from megatron_rl.weights.boxes import Box
from megatron_rl.weights.convert import Conversion, Moved, Plan
from megatron_rl.weights.fp8 import BLOCK, quantize_rows, scale_shape
from megatron_rl.weights.hf_output import DTYPES, strips
from megatron_rl.weights.processes import deal, run_shares
from megatron_rl.weights.quantize import SCALE
from megatron_rl.weights.sources import HfSource, MegatronSource, Source, open_source


def verify(plan: Plan, folder: Path, processes: int = 1, moved: Moved = lambda _: None) -> int:
    """Raise if any HF tensor that `folder` holds is not the source's; returns how many there are.

    What was written is read as its readers will, Megatron's tensors by way of every box of every rank; numbers are compared
    as they are stored, FP8 ones and their scales among them.
    """
    written = open_source(folder)
    written.check()
    if isinstance(written, MegatronSource):
        damage = written.files.damage(written.files.manifest["files"])
        if damage:
            raise CheckpointError(f"what was written is damaged: {'; '.join(damage)}")
    written.close()
    names = list(plan.source.weight_map.hf)
    costs = [plan.source.weight_map.hf[name].numbers for name in names]
    shares = deal(range(len(names)), costs, processes)
    run_shares(verify_share, [(plan.conversion, folder, [names[i] for i in share]) for share in shares], moved)
    return len(names)


def verify_share(conversion: Conversion, folder: Path, names: list[str], moved: Moved) -> None:
    """Compare some tensors."""
    plan, written = conversion.open(), open_source(folder)
    for name in names:
        expected = checksum(_encoded(plan, name))
        found = checksum(_stored(plan, written, name))
        if expected != found:
            raise CheckpointError(f"{name} is not what the source holds: checksum {found[:12]} instead of {expected[:12]}")
        moved(plan.source.weight_map.hf[name].numbers * _dtype(plan, name).itemsize)
    plan.source.close()
    written.close()


def checksum(parts: Iterator[Tensor]) -> str:
    """Of numbers, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(memoryview(part.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _encoded(plan: Plan, name: str) -> Iterator[Tensor]:
    """A tensor of the source, as the target shall hold it."""
    for box in strips(plan.source.weight_map.hf[name].shape):
        values = plan.source.hf(name, box)
        if name in plan.quantized:
            yield from quantize_rows(values)
        else:
            yield values.to(_dtype(plan, name))


def _stored(plan: Plan, written: Source, name: str) -> Iterator[Tensor]:
    """The same, from what was written."""
    for box in strips(plan.source.weight_map.hf[name].shape):
        if name in plan.quantized:
            assert isinstance(written, HfSource)
            yield written.files.read(name, box)
            yield written.files.read(name + SCALE, _blocks(box))
        else:
            yield written.hf(name, box)


def _dtype(plan: Plan, name: str) -> torch.dtype:
    if name in plan.quantized:
        return torch.float8_e4m3fn
    return torch.float32 if plan.source.weight_map.hf[name].rule.float32 else DTYPES[plan.format]


def _blocks(box: Box) -> Box:
    """The scales of a strip of whole rows that begins at a block's edge."""
    (first, _), size = box
    return (first // BLOCK, 0), scale_shape(size)
