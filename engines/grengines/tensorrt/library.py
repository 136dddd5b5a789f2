"""TensorRT (from 10.13) and TensorRT for RTX, two libraries with the same Python API."""

from __future__ import annotations

import ctypes.util
import functools
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from grengines.api import UnavailableError
from grengines.spec import Package

# Import names in the order of preference, and the commands that install them.
_NAMES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_INSTALL = {
    "tensorrt": "pip install 'grbench[tensorrt]'",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
}
PACKAGES = (
    Package("tensorrt", ("tensorrt-cu13",), f"{_INSTALL['tensorrt']}  # of use on an NVIDIA GPU only"),
    Package("tensorrt_rtx_bindings", ("tensorrt-rtx-cu13-bindings",), _INSTALL["tensorrt_rtx"]),
)
_LEAST = (10, 13)  # version of TensorRT: strongly typed networks with plugins compiled ahead of time
# The GPUs of TensorRT for RTX, from its message when it refuses another.
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True)
class Library:
    """One of the two libraries, imported."""

    name: str  # tensorrt or tensorrt_rtx
    module: Any
    version: str

    @property
    def rtx(self) -> bool:
        """True for TensorRT for RTX: it builds for an absent GPU, which then compiles the rest and caches it."""
        return self.name == "tensorrt_rtx"

    def elsewhere(self, target: str) -> str | None:
        """Return None if plans for this compute capability can be built here, else the reason and the fix."""
        if self.rtx:
            return None  # it compiles for any GPU that it executes on
        import torch

        here = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
        if here == target:
            return None
        fix = f"--target {here} or --library tensorrt_rtx" if here else "--library tensorrt_rtx"
        return f"tensorrt builds for the GPU that it builds on, here {here or 'none'}, not for {target}; give {fix}"

    def refusal(self, target: str) -> str | None:
        """Return None if a GPU of this compute capability ("8.9") can execute its plans, else the reason."""
        if self.rtx and target not in RTX_CAPABILITIES:
            supported = ", ".join(RTX_CAPABILITIES)
            return f"TensorRT for RTX does not support compute capability {target} (supported: {supported})"
        return None


def missing(choice: str = "auto") -> str | None:
    """Return None if a library that `choice` allows is installed, else "reason; command that fixes it"."""
    names = list(_NAMES) if choice == "auto" else [choice]
    if any(installed(name) for name in names):
        return None
    return f"{' or '.join(names)} is not installed; {_INSTALL[names[0]]}"


def no_gpu() -> str | None:
    """Return None if there is an NVIDIA driver, else that no package helps, and how plans can be built here."""
    if ctypes.util.find_library("cuda"):
        return None
    install = "" if installed("tensorrt_rtx") else f"{_INSTALL['tensorrt_rtx']} && "
    return (
        "plans execute on an NVIDIA GPU, which this machine lacks, and no package helps; to build a plan for another: "
        f"{install}python -m grbench build-plan --library tensorrt_rtx --out PLAN"
    )


def unavailable() -> str | None:
    """Return None if plans can execute here, else "reason; command that fixes it"."""
    return no_gpu() or missing()


def find(choice: str = "auto") -> Library:
    """Import the library. Raises UnavailableError if it is missing, too old or does not load."""
    if reason := missing(choice):
        raise UnavailableError(reason)
    name = next(n for n in (_NAMES if choice == "auto" else [choice]) if installed(n))
    found = installed(name)
    assert found is not None
    try:
        module = import_module(found)
    except Exception as e:  # a binary package raises anything if its libraries are missing
        raise UnavailableError(f"{found} can't be loaded ({' '.join(str(e).split())}); {_INSTALL[name]}") from e
    version = module.__version__
    if name == "tensorrt" and tuple(int(n) for n in version.split(".")[:2]) < _LEAST:
        raise UnavailableError(f"tensorrt {version} is too old; pip install 'tensorrt-cu13>={_LEAST[0]}.{_LEAST[1]}'")
    return Library(name, module, version)


@functools.cache
def logger(library: Library) -> Any:
    """Return the library's logger, of which a process has one. Its `take` returns the errors since the last call."""

    class Log(library.module.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= library.module.ILogger.ERROR:
                self.errors.append(" ".join(message.split()))

        def take(self) -> str:
            errors = "; ".join(dict.fromkeys(self.errors)) or "it gave no reason"
            self.errors.clear()
            return errors

    return Log()


def installed(name: str) -> str | None:
    """Return the import name of the package that has this library; None if none is installed."""
    return next((module for module in _NAMES[name] if find_spec(module)), None)
