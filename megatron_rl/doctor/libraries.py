"""Whether torch, CUDA, NCCL, Transformer Engine, SGLang, flash-attn and apex are there, load, and fit each other."""

from collections.abc import Iterator, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

from packaging.version import Version

from megatron_rl.config.rules.case import counted
from megatron_rl.doctor import nvidia
from megatron_rl.doctor.apart import run_apart
from megatron_rl.doctor.finding import Finding, error, warning, well
from megatron_rl.doctor.visit import Visit

NEEDED = ("torch", "megatron.core", "sglang")
ON_GPUS = {"transformer_engine.pytorch": "transformer-engine", "sgl_kernel": "sglang-kernel"}
OF_USE = {"flash_attn": "flash-attn"}  # found by Transformer Engine and by SGLang, needed by neither
OF_DISTRIBUTIONS = {"torch": "torch", "megatron.core": "megatron-core", "sglang": "sglang"}
INSTALL = "Make the environment anew: launch/setup.sh [--gpu]."


def check_libraries(visit: Visit) -> Iterator[Finding]:
    """Each is loaded in a process that may die of it."""
    gpus = nvidia.gpus()
    wanted = [*NEEDED, *(name for name in (*ON_GPUS, *OF_USE) if _is_there(name))]
    (ended,) = run_apart("megatron_rl.doctor.libraries_job", wanted, [visit.environment], visit.seconds)
    facts = {line["name"]: line for line in ended.lines if "error" in line}
    for name in wanted:
        if name not in facts:
            began = any(line["name"] == name for line in ended.lines)
            if began or name == wanted[0]:
                yield error(f"{name} does not load: {ended.how}", _place(name), _fix(name))
            continue
        yield _loaded(name, facts[name])
    torch = facts.get("torch")
    if torch is not None and not torch["error"]:
        yield from _torch_and_driver(torch, gpus, visit)
    yield from _missing(visit, with_gpu=bool(gpus))
    yield from _apex()


def _is_there(name: str) -> bool:
    """On the path; it is not loaded for this."""
    found = util.find_spec(name.partition(".")[0])
    return found is not None and found.origin is not None  # a folder without a module is another package's part


def _place(name: str) -> str:
    found = util.find_spec(name.partition(".")[0])
    if found is None:
        return ""
    return str(Path(found.origin).parent if found.origin else next(iter(found.submodule_search_locations or [""])))


def _fix(name: str) -> str:
    distribution = OF_DISTRIBUTIONS.get(name) or ON_GPUS.get(name) or OF_USE[name]
    if name in OF_USE:
        return f"It is not needed: pip uninstall {distribution}; or build it anew against the torch that is installed."
    return f"Install {distribution} as it is pinned, built for the torch that is installed. {INSTALL}"


def _loaded(name: str, fact: Mapping[str, Any]) -> Finding:
    if fact["error"]:
        return error(f"{name} does not load: {fact['error']}", fact["place"] or _place(name), _fix(name))
    said, written = fact["version"], _written(name)
    if said and written and Version(said).release != Version(written).release:
        return error(
            f"{name} calls itself {said}, and the metadata of its package {written}: files of two versions are mixed",
            fact["place"],
            f"Uninstall it until it is gone, and install it again. {INSTALL}",
        )
    return well(f"{name} {said or written or ''} loads in {fact['seconds']:.1f} s", fact["place"], seconds=fact["seconds"])


def _written(name: str) -> str | None:
    try:
        return metadata.version(OF_DISTRIBUTIONS[name]) if name in OF_DISTRIBUTIONS else None
    except metadata.PackageNotFoundError:
        return None


def _torch_and_driver(torch: Mapping[str, Any], gpus: list[nvidia.Gpu], visit: Visit) -> Iterator[Finding]:
    """The CUDA that torch is built with, the driver's, and the GPUs that it sees."""
    where = torch["place"]
    if not gpus:
        yield well(f"torch {torch['version']} is used without a GPU", where)
        return
    if torch["cuda"] is None:
        yield error(
            "torch is built without CUDA, and there are GPUs", where, "Install the GPU environment: launch/setup.sh --gpu."
        )
        return
    driver = nvidia.driver_cuda()
    built = tuple(int(part) for part in torch["cuda"].split(".")[:2])
    if driver is not None and driver[0] < built[0]:
        yield error(
            f"torch is built with CUDA {torch['cuda']}, the driver {gpus[0].driver} runs CUDA {driver[0]}.{driver[1]} at most",
            where,
            f"Bring the driver to one for CUDA {built[0]}, or install NVIDIA's compatibility package for it.",
        )
    hidden = visit.environment.get("CUDA_VISIBLE_DEVICES")
    if torch["gpus"] == 0 and hidden != "":
        yield error(
            f"torch sees none of {counted(len(gpus), 'GPU')}",
            where,
            "Look at the driver (nvidia-smi), at CUDA_VISIBLE_DEVICES, and whether the container was started with the GPUs.",
        )
    elif torch["gpus"] < len(gpus) and hidden is None:
        yield warning(
            f"torch sees {torch['gpus']} of {len(gpus)} GPUs",
            where,
            "Look for one that is broken (nvidia-smi -q), or partitioned.",
        )
    unknown = sorted(set(torch["capabilities"]) - set(torch["architectures"])) if torch["architectures"] else []
    if unknown:
        yield error(
            f"torch holds no code for GPUs of {', '.join(unknown)} (it has {', '.join(torch['architectures'])})",
            where,
            "Install a torch that is built for these GPUs.",
        )
    if torch["nccl"] is None:
        yield error("torch has no NCCL", where, "Install the GPU environment: launch/setup.sh --gpu.")
    else:
        yield well(f"torch is built with CUDA {torch['cuda']} and NCCL {torch['nccl']}, and sees {torch['gpus']} GPUs", where)


def _missing(visit: Visit, *, with_gpu: bool) -> Iterator[Finding]:
    """What is of use with GPUs, and is not there."""
    for name, distribution in ON_GPUS.items() if with_gpu else ():
        if not _is_there(name):
            yield error(
                f"{distribution} is not installed, and there are GPUs",
                "",
                "Install the GPU environment: launch/setup.sh --gpu.",
            )
    fp8 = visit.settings is not None and visit.settings.precision.fp8 == "transformer_engine"
    if fp8 and not with_gpu and not _is_there("transformer_engine"):
        yield error(
            "precision.fp8 = transformer_engine, and there is neither Transformer Engine nor a GPU",
            visit.named,
            "Run where GPUs are, or set precision.fp8=simulated.",
        )
    for distribution in () if _is_there("flash_attn") else OF_USE.values():
        yield well(f"{distribution} is not installed; nothing here needs it", "")


def _apex() -> Iterator[Finding]:
    """NVIDIA's extensions, or the package of that name on the index, which has nothing to do with them. Neither is loaded."""
    found = util.find_spec("apex")
    if found is None:
        yield well("apex is not installed; Megatron-core takes Transformer Engine or torch in its place", "")
        return
    places = [Path(place) for place in found.submodule_search_locations or []]
    where = str(places[0] if places else found.origin)
    if not any((place / "multi_tensor_apply").is_dir() and (place / "normalization").is_dir() for place in places):
        version = next((each.version for each in metadata.distributions(name="apex")), "of no version")
        yield error(
            f"apex ({version}) is not NVIDIA's but an unrelated package of that name",
            where,
            "pip uninstall apex. It is not needed; NVIDIA's is built from its source (github.com/NVIDIA/apex).",
        )
    elif util.find_spec("amp_C") is None:
        yield warning(
            "NVIDIA apex is installed without its compiled parts (amp_C)",
            where,
            "Uninstall it, or build it with them: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation SOURCE.",
        )
    else:
        yield well("apex is NVIDIA's, with its compiled parts", where)
