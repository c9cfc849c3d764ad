"""The parallel layout in being: every process group, size and rank question is answered here.

`Layout.open` starts torch.distributed and Megatron's process groups from the settings; after that nobody else
makes a group or asks for a rank. Groups are handed to Megatron, and to the collectives of `policy/collectives.py`.
"""

import datetime
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.settings import LayoutSettings, Settings
from megatron_rl.policy.collectives import sum_of_own_parts
from megatron_rl.policy.device import Device, open_device

START_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Launch:
    """What the launcher (torchrun, srun) told this process about itself."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Launch":
        """torchrun's variables, or a single process when there are none."""
        names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world_size": "LOCAL_WORLD_SIZE"}
        if "WORLD_SIZE" not in environment:
            return cls()
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise SettingsError(
                f"WORLD_SIZE is set but not {', '.join(missing)}. Start ranks with torchrun or launch/torchrun.sh."
            )
        defaults = {"LOCAL_RANK": environment["RANK"], "LOCAL_WORLD_SIZE": environment["WORLD_SIZE"]}
        return cls(**{field: int(environment.get(name, defaults.get(name, "0"))) for field, name in names.items()})


@contextmanager
def together() -> Iterator[None]:
    """Around one policy after another on the same ranks, each closed without leaving: the ranks part at the end.

    Ranks that had parted could not be sure to meet again: the store through which they do still knows of the first time.
    """
    joined = dist.is_initialized()
    try:
        yield
    finally:
        if dist.is_initialized() and not joined:
            dist.destroy_process_group()


@dataclass(frozen=True)
class Layout:
    """Sizes, ranks and groups of this process. `groups` is Megatron's own collection, handed to whatever needs it."""

    settings: LayoutSettings
    device: Device
    launch: Launch
    groups: ProcessGroupCollection

    @classmethod
    def open(cls, settings: Settings, launch: Launch | None = None) -> "Layout":
        """Open the device, join the other ranks, and build the groups. Settings must have been checked for this world size."""
        launch = launch or Launch.from_environment()
        device = open_device(settings.device, launch.local_rank, launch.local_world_size)
        if not dist.is_initialized():
            if launch.world_size == 1:
                store: Any = dist.HashStore()
                dist.init_process_group(device.backend, store=store, rank=0, world_size=1)
            else:
                dist.init_process_group(device.backend, timeout=START_TIMEOUT)
        return cls.of_initialized_ranks(settings, device, launch)

    @classmethod
    def of_initialized_ranks(cls, settings: Settings, device: Device, launch: Launch) -> "Layout":
        """Build the groups of a layout over ranks that already know each other; a former layout's groups are given up."""
        layout = settings.layout
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(settings.run.seed)
        random.seed(settings.run.seed)
        np.random.seed(settings.run.seed % 2**32)
        return cls(layout, device, launch, ProcessGroupCollection.use_mpu_process_groups())

    def close(self, *, leave: bool = True) -> None:
        """Give up the groups, and leave the other ranks unless another layout follows (`together`). Every rank calls it."""
        parallel_state.destroy_model_parallel()
        if leave:
            dist.destroy_process_group()

    # -- who am I ------------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def data_size(self) -> int:
        """Number of model replicas: each works on packs of its own."""
        return self.groups.dp.size()

    @property
    def data_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def context_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def pipeline_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def chunks(self) -> int:
        """Model chunks on this rank (virtual pipeline)."""
        return self.settings.virtual_pipeline

    def is_first_stage(self, chunk: int) -> bool:
        """Does this chunk hold the embedding?"""
        return self.pipeline_rank == 0 and chunk == 0

    def is_last_stage(self, chunk: int) -> bool:
        """Does this chunk hold the output layer, and so see log-probs and the loss?"""
        return self.pipeline_rank == self.settings.pipeline - 1 and chunk == self.chunks - 1

    @property
    def sees_loss(self) -> bool:
        return self.is_last_stage(self.chunks - 1)

    def sequence_part(self, values: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Of values by position, those of the positions that this rank's routers and norms see: under sequence parallelism a
        tensor rank's part, else all."""
        if not self.settings.sequence_parallel_on:
            return values
        return values.chunk(self.settings.tensor, dim=dim)[self.groups.tp.rank()]

    # -- collectives of the policy -------------------------------------------------------------------------------------

    def sum_over_context(self, values: torch.Tensor) -> torch.Tensor:
        """The objectives' one primitive: sum over context-parallel ranks, differentiably.

        Every context rank computes the same loss from the sum, and gradients are summed over context ranks at the end of
        the backward pass; each rank's own part therefore receives the gradient as it stands.
        """
        return sum_of_own_parts(values, self.groups.cp)

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the model replicas, in place."""
        dist.all_reduce(values, group=self.groups.dp)
        return values

    def sum_over_data_and_context(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the model replicas and the context ranks, which hold different tokens, in place."""
        dist.all_reduce(values, group=self.groups.dp_cp)
        return values

    def largest_over_data_and_context(self, values: torch.Tensor) -> torch.Tensor:
        """The largest over the same ranks, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, self.groups.dp_cp)
        return values

    def from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Give every pipeline stage what the last one holds, in place."""
        if self.settings.pipeline > 1:
            dist.broadcast(values, group=self.groups.pp, group_src=self.settings.pipeline - 1)
        return values

    def object_from_last_stage(self, value: Any) -> Any:
        """Like `from_last_stage`, for a small Python object."""
        if self.settings.pipeline == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.groups.pp, group_src=self.settings.pipeline - 1)
        return box[0]

    def agree(self, flag: bool) -> bool:
        """True on all ranks when it is true on any."""
        value = torch.tensor([float(flag)], device=self.device.torch_device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        dist.barrier()

    def replicas_have(self, value: Any) -> list[Any]:
        """Gather a small Python object from the ranks that stand in the same place of each model replica."""
        values: list[Any] = [None] * self.data_size
        dist.all_gather_object(values, value, group=self.groups.dp)
        return values

    def main_has(self, value: Any) -> list[Any]:
        """Gather a Python object from all ranks to the main one; others get an empty list."""
        values: list[Any] = [None] * self.world_size if self.is_main else []
        dist.gather_object(value, values if self.is_main else None, dst=0)
        return values

    def from_main(self, value: Any) -> Any:
        """Give every rank the main one's small Python object."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def everyone_has(self, value: Any) -> list[Any]:
        """Gather a small Python object from all ranks."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values
