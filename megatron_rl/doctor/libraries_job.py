"""Load packages one after the other, and say of each what it is. Where this ends early, the last one named is to blame."""

import importlib
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_rl.doctor.apart import Lines


def load(name: str) -> dict[str, Any]:
    """What it says of itself, or why it does not load."""
    started = time.monotonic()
    try:
        module = importlib.import_module(name)
        facts = {"error": "", "version": _version(module), "place": str(Path(module.__file__ or "").parent)}
        if name == "torch":
            facts |= _of_torch(module)
    except BaseException as error:  # a package may raise anything at import, SystemExit too
        facts = {"error": f"{type(error).__name__}: {error}".strip(), "version": "", "place": ""}
    return {"name": name, "seconds": time.monotonic() - started, **facts}


def _version(module: ModuleType) -> str:
    return str(getattr(module, "__version__", ""))


def _of_torch(torch: Any) -> dict[str, Any]:
    """Asked of the driver through it, where there is one."""
    count = torch.cuda.device_count()
    capabilities = {"sm_{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(count)}
    return {
        "cuda": torch.version.cuda,
        "gpus": count,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if count and torch.distributed.is_nccl_available() else None,
        "architectures": torch.cuda.get_arch_list() if count else [],
        "capabilities": sorted(capabilities),
    }


def main() -> None:
    path, *names = sys.argv[1:]
    lines = Lines(Path(path))
    warnings.simplefilter("ignore")
    for name in names:
        lines.write({"name": name})
        lines.write(load(name))


if __name__ == "__main__":
    main()
