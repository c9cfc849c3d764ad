"""The machine under the policy, and the adaptation of Megatron-core to one without CUDA.

Megatron-core assumes CUDA in some two hundred places, nearly all of which only want "the device", a stream to order work
on, or the device's random state. Without CUDA those have exact CPU meanings, and `CPU_PATCHES` below supplies them: each
entry says what it replaces and why, and a test shows what breaks without it. With CUDA nothing is patched. This module is
the only one that asks whether there is a GPU.
"""

import contextlib
import importlib.util
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.settings import DeviceSettings

CPU = torch.device("cpu")

# 10^12 operations a second in bf16, dense, that NVIDIA states for a GPU of this name; the first name that fits counts.
TFLOPS = {
    "A100": 312.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0, "H20": 148.0,
    "GB200": 2500.0, "B200": 2250.0, "L40S": 362.0,
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """What the rest of the policy may know about the machine."""

    kind: Literal["cpu", "cuda"]
    torch_device: torch.device
    backend: Literal["gloo", "nccl"]
    transformer_engine: bool
    flops: float | None = None  # operations a second that it could do at most in bf16, where that is known

    @property
    def cuda(self) -> bool:
        return self.kind == "cuda"

    def random_state(self) -> torch.Tensor:
        """The state of the device's random generator."""
        return torch.cuda.get_rng_state() if self.cuda else torch.get_rng_state()

    def set_random_state(self, state: torch.Tensor) -> None:
        if self.cuda:
            torch.cuda.set_rng_state(state)
        else:
            torch.set_rng_state(state)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in host memory that a GPU reads without making the program wait."""
        host = tensor.detach().cpu()
        return host.pin_memory() if self.cuda else host

    def peak_memory(self) -> int:
        """Bytes: of the GPU since the last time it was asked for, or of the process since it began."""
        if not self.cuda:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


def open_device(settings: DeviceSettings, local_rank: int = 0, local_ranks: int = 1) -> Device:
    """Choose this process's device, adapt Megatron-core to it when there is no CUDA, and size its thread pool."""
    has_cuda = torch.cuda.is_available()
    if settings.kind == "cuda" and not has_cuda:
        raise SettingsError(
            "device.kind=cuda, but torch sees no CUDA device here. Check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES, "
            "install the GPU environment (launch/setup.sh --gpu), or use device.kind=cpu."
        )
    if has_cuda and settings.kind != "cpu":
        if local_rank >= torch.cuda.device_count():
            raise SettingsError(
                f"rank {local_rank} of this machine has no GPU: {torch.cuda.device_count()} for {local_ranks} ranks. "
                "Start one rank a GPU (torchrun --nproc-per-node)."
            )
        torch.cuda.set_device(local_rank)
        transformer_engine = importlib.util.find_spec("transformer_engine") is not None
        flops = _most_flops(settings, torch.cuda.get_device_name(local_rank))
        return Device("cuda", torch.device("cuda", local_rank), "nccl", transformer_engine, flops)
    if has_cuda:
        raise SettingsError(
            "device.kind=cpu on a machine with CUDA: Megatron-core would pick the GPU by itself. "
            "Hide the GPUs from this process (CUDA_VISIBLE_DEVICES=) or leave device.kind=auto."
        )
    threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)
    torch.set_num_threads(threads)
    adapt_to_cpu()
    return Device("cpu", CPU, "gloo", transformer_engine=False, flops=_most_flops(settings, "CPU"))


def _most_flops(settings: DeviceSettings, name: str) -> float | None:
    if settings.tflops is not None:
        return settings.tflops * 1e12
    return next((tflops * 1e12 for known, tflops in TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


# ---------------------------------------------------------------------------------------------------------------------
# The adaptation
# ---------------------------------------------------------------------------------------------------------------------


class CpuStream:
    """A stream on a machine where work is done when the call returns: every wait is already over, also for its events."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, _: Any = None) -> "CpuStream":
        return self


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class CudaNamesMeanCpu(torch.overrides.TorchFunctionMode):
    """Reads device="cuda", `.cuda()` and `.to("cuda")` as the CPU, and drops pinned memory, which only CUDA has."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **(kwargs or {}))


def _cuda_type_name_for_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's optimizers sort parameters by `param.type()` and know only the names of CUDA tensors."""

    def type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(tensor, *args, **kwargs)
        if args or kwargs or not name.startswith("torch.") or name.startswith("torch.cuda"):
            return name
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.core.optimizer") else name

    return type_name


def _split_sizes_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The CPU meaning of Megatron's maybe_move_tensor_to_cpu: it converts to numpy only what it first moves from a GPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_uneven(original: Callable[..., Any]) -> Callable[..., Any]:
    """all-gather of parts of different sizes, as an all-to-all in which every rank sends its part to all."""

    def gather(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        output = input_.new_empty((sum(sizes), *input_.shape[1:]))
        copies = input_.repeat(group.size(), *[1] * (input_.dim() - 1))
        torch.distributed.all_to_all_single(output, copies, sizes, [input_.size(0)] * group.size(), group=group)
        return output

    return gather


def _share_storage(_: Any) -> Callable[[], Callable[[torch.Tensor, torch.Tensor], None]]:
    """Recomputed activations copied into the storage that was emptied of them, below autograd's eyes."""

    def share(emptied: torch.Tensor, recomputed: torch.Tensor) -> None:
        source, target = recomputed.untyped_storage(), emptied.untyped_storage()
        target.resize_(source.nbytes())
        target.copy_(source)

    return lambda: share


@dataclass(frozen=True)
class Patch:
    """One name of torch or Megatron-core that means something else without CUDA."""

    module: str
    name: str
    why: str
    replacement: Callable[[Any], Any]  # original -> replacement

    @property
    def key(self) -> str:
        return f"{self.module}.{self.name}"

    def owner(self) -> Any:
        module_name, _, inner = self.module.partition(":")
        module: ModuleType = importlib.import_module(module_name)
        return getattr(module, inner) if inner else module


_STREAM = CpuStream()
_DEVICE = "Every buffer (gradients, collectives, tables) is created on torch.cuda.current_device()."
_ORDER = "The token dispatcher and the schedules order copies on streams; on CPU work is done when the call returns."
_RANDOM = "Dropout, initialisation and recomputation fork the device's random state; here that is the CPU generator's."

CPU_PATCHES: tuple[Patch, ...] = (
    Patch("torch.cuda", "current_device", _DEVICE, lambda _: lambda: CPU),
    Patch("torch.cuda", "synchronize", "Pipeline send/receive waits for the device.", lambda _: lambda *_, **__: None),
    Patch("torch.cuda", "Stream", _ORDER, lambda _: CpuStream),
    Patch("torch.cuda", "current_stream", _ORDER, lambda _: lambda *_, **__: _STREAM),
    Patch("torch.cuda", "get_rng_state", _RANDOM, lambda _: lambda *_, **__: torch.get_rng_state()),
    Patch("torch.cuda", "manual_seed", _RANDOM, lambda _: lambda seed: torch.manual_seed(seed)),
    Patch(
        "megatron.core.tensor_parallel.random", "_get_cuda_rng_state", _RANDOM, lambda _: lambda *_, **__: torch.get_rng_state()
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _RANDOM,
        lambda _: lambda state, *_, **__: torch.set_rng_state(state),
    ),
    Patch(
        "torch:Tensor",
        "type",
        "Optimizers sort parameters by the name of their tensor type and refuse other names than CUDA's.",
        _cuda_type_name_for_optimizer,
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        "all-to-all split sizes must be host integers, which upstream makes only of tensors that come from a GPU.",
        lambda _: _split_sizes_as_numpy,
    ),
    Patch(
        "megatron.core.tensor_parallel.mappings",
        "_gather_along_first_dim",
        "With expert and expert-tensor parallelism ranks gather different numbers of tokens, which gloo refuses.",
        _gather_uneven,
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_get_share_storage",
        "Selective recomputation would compile a C++ extension, behind a lock that a killed process leaves closed for good.",
        _share_storage,
    ),
    Patch(
        "megatron.core.tensor_parallel.random:CheckpointWithoutOutput",
        "__init__",
        "Selective recomputation takes its default fp8=False for True and then asks Transformer Engine.",
        lambda original: lambda self, fp8=None: original(self, None),
    ),
)
CUDA_NAMES = (
    "device names"  # the key of CudaNamesMeanCpu, which is no single name: they stand in schedules, optimizers, clipping
)


class CpuAdaptation:
    """The patches in force, able to take themselves out again (tests do that one by one)."""

    def __init__(self) -> None:
        self._originals: dict[str, Any] = {}
        self._mode = CudaNamesMeanCpu()
        self._mode_on = False

    def install(self) -> None:
        for patch in CPU_PATCHES:
            if patch.key not in self._originals:
                original = getattr(patch.owner(), patch.name)
                self._originals[patch.key] = original
                setattr(patch.owner(), patch.name, patch.replacement(original))
        if not self._mode_on:
            self._mode.__enter__()
            self._mode_on = True
        # Megatron compiles its small helpers at first use; on CPU that would take a C++ compiler and minutes.
        torch.compiler.set_stance("force_eager")

    def uninstall(self) -> None:
        for patch in CPU_PATCHES:
            if patch.key in self._originals:
                setattr(patch.owner(), patch.name, self._originals.pop(patch.key))
        if self._mode_on:
            self._mode.__exit__(None, None, None)
            self._mode_on = False
        torch.compiler.set_stance("default")

    @contextlib.contextmanager
    def without(self, key: str) -> Iterator[None]:
        """Run a block with one patch taken out; `key` is a patch's key, or CUDA_NAMES."""
        if key == CUDA_NAMES:
            self._mode.__exit__(None, None, None)
            try:
                yield
            finally:
                self._mode.__enter__()
            return
        patch = next(patch for patch in CPU_PATCHES if patch.key == key)
        adapted = getattr(patch.owner(), patch.name)
        setattr(patch.owner(), patch.name, self._originals[key])
        try:
            yield
        finally:
            setattr(patch.owner(), patch.name, adapted)


_ADAPTATION = CpuAdaptation()


def adapt_to_cpu() -> CpuAdaptation:
    """Install the adaptation in this process, once. It is process-wide because what it adapts is."""
    _ADAPTATION.install()
    return _ADAPTATION
