"""Sizes and devices that eager and compiled PyTorch can run: `supports` of many variants.

Each function returns None, or the reason why the variant can't run.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

DTYPES = ("fp32", "fp16", "bf16")


def eager(*, device: str, dtype: str, **dims: Any) -> str | None:
    """Accept any size on any device, for eager PyTorch."""
    return None if dtype in DTYPES else f"dtype {dtype} is none of {', '.join(DTYPES)}"


def eager_waiting(*, device: str, dtype: str, captured: int = 0, **dims: Any) -> str | None:
    """Refuse CUDA graphs, for eager PyTorch that reads values on the host."""
    return "waits for the device, so a CUDA graph can't hold it" if captured else eager(device=device, dtype=dtype)


def lacking(extras: Sequence[str]) -> str | None:
    """Refuse options of other HSTU models, given as "key=value"."""
    return f"{', '.join(extras)}: it has grbench's own layer only" if extras else None


def without_eight_bits(stored: str) -> str | None:
    """Refuse 8-bit pages. stored: int8, fp8 or ""."""
    return f"pages in {stored}: it reads pages in its own dtype only (torch and triton read 8 bits)" if stored else None


def without_fp8(products: str) -> str | None:
    """Refuse to write operands of products in e4m3. products: fp8 or ""."""
    return f"operands in {products}: it writes its own dtype only (torch and triton write fp8)" if products else None


def compiled(
    *, device: str, dtype: str, stored: str = "", products: str = "", extras: Sequence[str] = (), **dims: Any
) -> str | None:
    """Require a C++ compiler on a CPU, for torch.compile, grbench's own layer, and results of its dtype."""
    if missing := lacking(extras) or without_eight_bits(stored) or without_fp8(products):
        return missing
    if device.startswith("cpu") and (missing := compiler()):
        return missing
    return eager(device=device, dtype=dtype)


def compiler() -> str | None:
    """Return None if there is a C++ compiler, else the reason and the command that installs one."""
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        return None
    return "there is no C++ compiler; apt-get install g++"
