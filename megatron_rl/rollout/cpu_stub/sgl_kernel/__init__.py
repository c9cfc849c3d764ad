"""A stand-in for SGLang's CUDA kernels, for server processes on machines without a GPU.

The published `sglang-kernel` wheel loads CUDA libraries when it is imported, and SGLang imports it everywhere. Here every name
can be imported and none can be called: SGLang finds no CPU kernel among `torch.ops.sgl_kernel` and computes with plain torch.
The folder that holds this package is put on the PYTHONPATH of server processes only; nothing else ever sees it.

One more thing wants a CUDA driver: SGLang keeps the experts of each request in pinned host memory, also on a CPU. The module
that does so sees torch through a window that drops the wish; the rest of the process sees torch itself.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__version__ = "0.0.0"

PINNING = "sglang.srt.state_capturer.base"  # the one module that pins memory whatever the device is


class MissingKernel:
    """A kernel that can be named and passed around, but not run."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.__name__ = self.__qualname__ = name.rpartition(".")[2]

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{self._name} is a CUDA kernel; this server runs on a machine without a GPU")

    def __getattr__(self, name: str) -> "MissingKernel":
        return _missing(self._name, name)


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Every `sgl_kernel.anything` is a module of missing kernels."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if fullname.startswith(f"{__name__}.") else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        own = module.__name__
        vars(module)["__getattr__"] = lambda name: _missing(own, name)


class _UnpinnedTorch:
    """torch, whose zeros are never pinned."""

    def __init__(self, torch: ModuleType) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def zeros(self, *size: Any, pin_memory: bool = False, **options: Any) -> Any:
        return self._torch.zeros(*size, **options)


class _Unpinned(importlib.machinery.SourceFileLoader):
    """Loads the pinning module as it stands, then gives it its window on torch."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _unpin(module)


class _FindPinning(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == PINNING else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Unpinned(fullname, spec.origin)
        return spec


def _unpin(module: ModuleType) -> None:
    vars(module)["torch"] = _UnpinnedTorch(vars(module)["torch"])


def _missing(owner: str, name: str) -> MissingKernel:
    if name.startswith("__"):
        raise AttributeError(f"{owner} has no attribute {name}")
    return MissingKernel(f"{owner}.{name}")


def __getattr__(name: str) -> MissingKernel:
    return _missing(__name__, name)


sys.meta_path.append(_Submodules())
if PINNING in sys.modules:
    _unpin(sys.modules[PINNING])
else:
    sys.meta_path.insert(0, _FindPinning())
