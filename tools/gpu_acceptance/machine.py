"""What this machine is, and the most that its GPU does: what all other numbers are read against."""

import importlib.util
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from tools.gpu_acceptance.child import Task
from tools.gpu_acceptance.results import Finding

PACKAGES = (
    "megatron-core", "transformer-engine", "transformer-engine-torch", "sglang", "sglang-kernel", "torch-memory-saver",
    "flashinfer-python", "flash-attn", "flash-attn-3", "flash-attn-4", "triton", "transformers", "nvidia-nccl-cu13",
    "nvidia-cudnn-cu13",
)  # fmt: skip
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,compute_mode,mig.mode.current"
GIB = 2**30


def environment(task: Task) -> Iterator[Finding]:
    yield Finding("system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    yield Finding("processors", float(len(os.sched_getaffinity(0))), "cores", note=f"{memory:.0f} GiB of memory")
    yield Finding("torch", torch.__version__, note=f"CUDA {torch.version.cuda}")
    yield from _gpus()
    for name in PACKAGES:
        found = _version(name)
        if found is not None:
            yield Finding(name, found)
    yield Finding("NVIDIA apex", apex())
    yield from _recipes()


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPU", "none that torch sees")
        return
    told = _nvidia_smi()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        about = f"compute {properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors"
        yield Finding(f"GPU {index}", properties.name, note=f"{about}, {properties.total_memory / GIB:.1f} GiB")
    yield Finding("driver and settings", told, note=QUERY)
    yield Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    yield Finding("cuDNN", str(torch.backends.cudnn.version()))


def _nvidia_smi() -> str:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi says nothing: {error}"


def apex() -> str:
    """NVIDIA's is known by its extension; the package index has an unrelated one of that name."""
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None:
        return "with the fused gradient accumulation that Megatron-core uses"
    found = _version("apex")
    if found is None:
        return "not installed; Megatron-core does without"
    return f"not NVIDIA's, or built without extensions: {found}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _recipes() -> Iterator[Finding]:
    """What Transformer Engine says of the chip."""
    if importlib.util.find_spec("transformer_engine") is None:
        yield Finding("FP8 recipes", "Transformer Engine is not installed")
        return
    if not torch.cuda.is_available():
        yield Finding("FP8 recipes", "there is no GPU to have any")
        return
    from tools.gpu_acceptance.models import recipes

    for name, (there, reason) in recipes().items():
        yield Finding(f"FP8 recipe {name}", "yes" if there else f"no: {reason}")


# -- ceilings --------------------------------------------------------------------------------------------------------------


def ceilings(task: Task) -> Iterator[Finding]:
    yield Finding("copy", copy_rate(task.smoke) / 1e9, "GB/s", note="on the device, bytes read and written")
    yield Finding("product of matrices in bfloat16", product_rate(task.smoke) / 1e12, "TFLOP/s")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def copy_rate(smoke: bool) -> float:
    """Bytes a second, read and written. What is copied is far larger than caches."""
    size = 2**22 if smoke else 2**30
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source))


def product_rate(smoke: bool) -> float:
    """Operations a second on random numbers: zeros would be faster."""
    side = 128 if smoke else 8192
    left, right = (torch.randn(side, side, device=device()).bfloat16() for _ in range(2))
    output = torch.empty(side, side, dtype=torch.bfloat16, device=device())
    return float(2 * side**3) / seconds_of(lambda: torch.mm(left, right, out=output))


def seconds_of(work: Callable[[], object], rounds: int = 10) -> float:
    """The median of several rounds, after three that are not timed."""
    for _ in range(3):
        work()
    return statistics.median(_timed(work) for _ in range(rounds))


def _timed(work: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    work()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000
