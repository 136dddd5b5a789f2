"""Compiled CuTe DSL kernels in the cache folder. Compiling takes seconds, loading takes milliseconds.

A file's name has two digests. The first is of all that decides the machine code: the kernel and its sizes, the source
of this package, the compiler's version, the GPU's architecture and the processor, whose code launches the kernel. The
second is of the file's content, so that a damaged file is compiled again and never run.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import uuid
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grkernels.cache_folder import cache_folder

SYMBOL = "grbench"  # prefix of the functions in a file


def compiled(kernel: object, architecture: str, compile: Callable[[], Any]) -> tuple[Any, bool]:
    """Return a kernel from its file, else compile it and write the file. Also return whether it was compiled.

    kernel: its `repr` has the class and every size. A folder that cannot be written costs only the next process time.
    """
    key = _digest(f"{type(kernel).__module__} {kernel!r} {architecture} {_surroundings()}".encode())
    folder = _folder()
    found = _load(folder, key) if folder else None
    if found is not None:
        return found, False
    made = compile()
    if folder:
        with contextlib.suppress(OSError):
            _write(folder, key, made.dump_to_object(SYMBOL))
    return made, True


def _folder() -> Path | None:
    """Return the folder of the files, or None for a user without a cache folder."""
    try:
        return cache_folder() / "kernels"
    except ValueError:
        return None


def _load(folder: Path, key: str) -> Any:
    """Return the compiled kernel of a whole file with this key, or None."""
    from cutlass.cute.runtime import load_module

    for path in folder.glob(f"{key}-*.o"):
        with contextlib.suppress(OSError):
            if path.stem == f"{key}-{_digest(path.read_bytes())}":
                return getattr(load_module(str(path)), SYMBOL)
    return None


def _write(folder: Path, key: str, data: bytes) -> None:
    """Write a file, whole or not at all, and delete damaged ones of this key."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}-{_digest(data)}.o"
    scratch = folder / f".{uuid.uuid4().hex}"
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    for other in folder.glob(f"{key}-*.o"):
        if other != path:
            other.unlink(missing_ok=True)


@cache
def _surroundings() -> str:
    """Return what a kernel's machine code depends on beside the kernel and the GPU."""
    root = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    return f"{_digest(sources)} {version('nvidia-cutlass-dsl')} {platform.machine()} {_digest(_processor())}"


def _processor() -> bytes:
    """Return the processor's instruction sets as Linux lists them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    return b""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
