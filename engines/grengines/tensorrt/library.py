"""One view of two libraries with the same Python API: TensorRT (from 10.13) and TensorRT for RTX."""

from __future__ import annotations

import ctypes.util
import functools
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from grengines.api import UnavailableError
from grengines.spec import Package

# Import names in the order in which they are tried, and what installs them.
_NAMES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_INSTALL = {
    "tensorrt": "pip install 'grbench[tensorrt]'",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
}
PACKAGES = (
    Package("tensorrt", ("tensorrt-cu13",), _INSTALL["tensorrt"]),
    Package("tensorrt_rtx_bindings", ("tensorrt-rtx-cu13-bindings",), _INSTALL["tensorrt_rtx"]),
)
_LEAST = (10, 13)  # of TensorRT: strongly typed networks with plugins compiled ahead of time
# What TensorRT for RTX executes on, as it says itself when it refuses another GPU.
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True)
class Library:
    name: str  # tensorrt or tensorrt_rtx
    module: Any
    version: str

    @property
    def rtx(self) -> bool:
        """Compiles ahead of time for GPUs that aren't there, and finishes on the GPU (a runtime cache keeps that)."""
        return self.name == "tensorrt_rtx"

    def elsewhere(self, target: str) -> str | None:
        """None, or why plans for this compute capability can't be built on this machine, and the command that can."""
        if self.rtx:
            return None  # it compiles for any GPU that it executes on
        import torch

        here = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
        if here == target:
            return None
        mend = f"--target {here} or --library tensorrt_rtx" if here else "--library tensorrt_rtx"
        return f"tensorrt builds for the GPU that it builds on, here {here or 'none'}, not for {target}; give {mend}"

    def refusal(self, target: str) -> str | None:
        """None, or why a GPU of this compute capability ("8.9") can't execute its plans."""
        if self.rtx and target not in RTX_CAPABILITIES:
            supported = ", ".join(RTX_CAPABILITIES)
            return f"TensorRT for RTX does not support compute capability {target} (supported: {supported})"
        return None


def missing(choice: str = "auto") -> str | None:
    """None if a library that `choice` allows is installed, else "why not; command that mends it"."""
    names = list(_NAMES) if choice == "auto" else [choice]
    if any(_found(name) for name in names):
        return None
    return f"{' or '.join(names)} is not installed; {_INSTALL[names[0]]}"


def no_gpu() -> str | None:
    """None if there is an NVIDIA driver, else that plans can only be built here."""
    if ctypes.util.find_library("cuda"):
        return None
    return (
        "plans execute on an NVIDIA GPU, which this machine lacks; build one: python -m grbench build-plan --out PLAN"
    )


def unavailable() -> str | None:
    """Return None if plans can execute here, else "reason; command that fixes it"."""
    return missing() or no_gpu()


def find(choice: str = "auto") -> Library:
    """The library, imported. Raises UnavailableError where none is there, or one that is too old or doesn't load."""
    if reason := missing(choice):
        raise UnavailableError(reason)
    name = next(n for n in (_NAMES if choice == "auto" else [choice]) if _found(n))
    found = _found(name)
    assert found is not None
    try:
        module = import_module(found)
    except Exception as e:  # whatever a binary package raises when its libraries are not there
        raise UnavailableError(f"{found} can't be loaded ({' '.join(str(e).split())}); {_INSTALL[name]}") from e
    version = module.__version__
    if name == "tensorrt" and tuple(int(n) for n in version.split(".")[:2]) < _LEAST:
        raise UnavailableError(f"tensorrt {version} is too old; pip install 'tensorrt-cu13>={_LEAST[0]}.{_LEAST[1]}'")
    return Library(name, module, version)


@functools.cache
def logger(library: Library) -> Any:
    """The library's one logger (it takes no second), whose `take` gives what it was told of errors since the last."""

    class Log(library.module.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= library.module.ILogger.ERROR:
                self.errors.append(" ".join(message.split()))

        def take(self) -> str:
            said = "; ".join(dict.fromkeys(self.errors)) or "it gave no reason"
            self.errors.clear()
            return said

    return Log()


def _found(name: str) -> str | None:
    return next((module for module in _NAMES[name] if find_spec(module)), None)
