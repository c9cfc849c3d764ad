"""A policy's weights as a Hugging Face checkpoint, while it trains: all ranks write, none holds the model."""

import shutil
from pathlib import Path

import torch

from megatron_rl.config.errors import CheckpointError
from megatron_rl.config.layout_map import stage_layers
from megatron_rl.policy.checkpoint import on_main
from megatron_rl.policy.model import sharded_state
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.precision import quantized_modules
from megatron_rl.policy.slices import model_slices
from megatron_rl.weights.checkpoint_files import PARTIAL, put_in_place, suffixed
from megatron_rl.weights.export import BUCKET, plan_export, write_export
from megatron_rl.weights.fp8 import audit, fp8_tensors, linear_tensors
from megatron_rl.weights.hf_files import read_json
from megatron_rl.weights.hf_output import SHARD_SIZE, Format, exported_config, plan_files, travelling_files, write_rest
from megatron_rl.weights.map import WeightMap


class HfExporter:
    """Writes a policy's weights as Hugging Face checkpoints of one format. All ranks make one and call it alike.

    An FP8 export of a policy that trains in FP8 must quantise what the policy does: that is known, and an error, here.
    """

    def __init__(
        self, policy: Policy, format: Format = "bfloat16", *, shard_size: int = SHARD_SIZE, bucket: int = BUCKET
    ) -> None:
        self.policy, self.format = policy, format
        self.weight_map = WeightMap(policy.architecture)
        precision, layout = policy.settings.precision, policy.settings.layout
        skip = (precision.fp8_skip_first_layers, precision.fp8_skip_last_layers) if precision.fp8 != "off" else (0, 0)
        self.quantized = fp8_tensors(self.weight_map, *skip) if format == "fp8" else frozenset[str]()
        if format == "fp8" and precision.fp8 != "off":
            audit({"the policy's own products (precision.fp8)": fp8_weights(policy), "the exported files": self.quantized})
        files = plan_files(self.weight_map, format, self.quantized, shard_size)
        self.plan = plan_export(self.weight_map, layout, policy.layout.world_size, files, bucket)

    def save(self, folder: Path) -> Path:
        """Write the present weights. The folder, shared by all machines, appears under its name when all of it is there."""
        policy, layout = self.policy, self.policy.layout
        partial = suffixed(folder, PARTIAL)
        on_main(layout, lambda: _fresh(partial), f"{folder} cannot be written")
        policy.optimizer.gather_weights()
        dtype = torch.bfloat16 if policy.settings.precision.dtype == "bfloat16" else torch.float32
        slices = model_slices(policy.model, layout)
        failure = write_export(self.plan, layout.rank, slices, self.weight_map, dtype, layout.device.torch_device, partial)
        failures = layout.everyone_has(failure)
        if any(failures):
            on_main(layout, lambda: shutil.rmtree(partial), f"{partial} cannot be removed")
            rank = next(i for i, found in enumerate(failures) if found)
            raise CheckpointError(f"{folder} was not written: rank {rank} could not write its files: {failures[rank]}")
        on_main(layout, lambda: self._finish(folder), f"{folder} was not written")
        return folder

    def _finish(self, folder: Path) -> None:
        origin = self.policy.settings.policy.config
        config = read_json(origin / "config.json" if origin.is_dir() else origin)
        others = travelling_files(origin) if origin.is_dir() else []
        exported = exported_config(config, self.weight_map, self.format, self.quantized)
        write_rest(suffixed(folder, PARTIAL), self.plan.files, exported, others)
        put_in_place(folder)


def save_hf(policy: Policy, folder: Path, format: Format = "bfloat16") -> Path:
    """Write a policy's present weights once. Whoever does it again and again keeps an `HfExporter`."""
    return HfExporter(policy, format).save(folder)


def fp8_weights(policy: Policy) -> frozenset[str]:
    """The HF weights that the policy's own products round to FP8, whichever rank holds them. All ranks call it."""
    precision, weight_map = policy.settings.precision, WeightMap(policy.architecture)
    if precision.fp8 == "transformer_engine":  # its layers are the decoder's linear ones, and tell nothing of themselves
        return linear_tensors(weight_map, precision.fp8_skip_first_layers, precision.fp8_skip_last_layers)
    here: set[str] = set()
    stages = stage_layers(policy.settings.layout, policy.architecture)[policy.layout.pipeline_rank]
    for chunk, layers in zip(policy.model.bare_chunks, stages, strict=True) if precision.fp8 == "simulated" else ():
        modules = quantized_modules(chunk, precision, layers.start, policy.architecture.layers)
        for name, description in sharded_state(chunk, policy.layout).items():
            module, _, parameter = name.rpartition(".")
            if module in modules and parameter.startswith("weight"):
                here.add(f"model.{description.key}")
    everywhere = {name for names in policy.layout.everyone_has(here) for name in names}
    return frozenset(name for name, entry in weight_map.hf.items() if entry.rule.megatron in everywhere)


def _fresh(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
