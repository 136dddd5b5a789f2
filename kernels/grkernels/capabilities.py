"""What plain and compiled PyTorch can run, whatever the family: `supports` of many variants."""

from __future__ import annotations

import shutil

DTYPES = ("fp32", "fp16", "bf16")


def eager(*, device: str, dtype: str, **dims: int) -> str | None:
    """None, or why not, for eager PyTorch: any size on any device."""
    return None if dtype in DTYPES else f"dtype {dtype} is none of {', '.join(DTYPES)}"


def compiler() -> str | None:
    """None, or that there is no C++ compiler; what mends it."""
    return (
        None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "there is no C++ compiler; apt-get install g++"
    )


def compiled(*, device: str, dtype: str, **dims: int) -> str | None:
    """None, or why not, for torch.compile, which makes C++ on a CPU."""
    if device.startswith("cpu") and (missing := compiler()):
        return missing
    return eager(device=device, dtype=dtype)


def eager_waiting(*, device: str, dtype: str, captured: int = 0, **dims: int) -> str | None:
    """None, or why not, for eager PyTorch that reads values on the host: not in a CUDA graph."""
    return "waits for the device, so a CUDA graph can't hold it" if captured else eager(device=device, dtype=dtype)
