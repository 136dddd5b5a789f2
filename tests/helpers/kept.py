"""Results of slow compilers, kept in .pytest_cache/ for the next run until what they are made of changes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from helpers.checkout import ROOT
from helpers.forks import in_fork

KEPT = ROOT / ".pytest_cache" / "kept"
SOURCES = ("kernels/**/*.py", "tests/helpers/kernel_cases.py")
OUTPUT = "printed.txt"
IMPORTED_ANEW = ("triton", "grkernels", "grengines", "helpers")
DAYS = 14  # that a file of the cache folder is kept


def cache_folder() -> Path:
    """Return a cache folder of grbench (GRBENCH_CACHE), which names what it keeps by the code that makes it."""
    folder = KEPT / "cache"
    for old in folder.glob("*/*"):
        with contextlib.suppress(OSError):  # another worker may remove it, too
            if old.stat().st_mtime < time.time() - DAYS * 86_400:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    return folder


def folder_of(name: str, fill: Callable[[Path], object], sources: Sequence[str], *parts: object) -> Path:
    """Return the folder that `fill` filled. It is kept for a run with the same parts, sources and installed packages.

    parts: what else the content depends on, as text.
    """
    folder = KEPT / f"{name}-{digest_of(sources, *parts)}"
    if not folder.is_dir():
        made = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
        made.mkdir(parents=True)
        fill(made)
        for old in KEPT.glob(f"{name}-*"):
            if not old.name.startswith(folder.name):  # another worker may fill the same one
                shutil.rmtree(old, ignore_errors=True)
        try:
            made.rename(folder)
        except OSError:  # it did
            shutil.rmtree(made)
    return folder


def output_of(name: str, program: str, sources: Sequence[str] = SOURCES, forked: bool = True, **env: str) -> Path:
    """Return the folder that a Python program filled, and what it printed in OUTPUT. Its argument is the folder.

    forked: it runs in a fork, which has this process's imports except those of Triton and the kernels, because another
    TRITON_INTERPRET gives other ones. Else, and where there is a GPU, which forks can't use, it runs in a new process.
    """

    def in_process(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, str(folder)]
        return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)

    def work(folder: Path) -> None:
        os.environ.update(env)
        for module in [*sys.modules]:
            if module.startswith(IMPORTED_ANEW) and not module.startswith("triton._C"):
                del sys.modules[module]
        sys.argv = ["-c", str(folder)]
        exec(program, {"__name__": "__main__"})

    def fill(folder: Path) -> None:
        fork = forked and not torch.cuda.is_available()
        done = in_fork(partial(work, folder), folder, timeout=280) if fork else in_process(folder)
        assert done.returncode == 0, done.stderr[-2000:]
        (folder / OUTPUT).write_text(done.stdout)

    return folder_of(name, fill, sources, program, *sorted(env.items()))


def digest_of(patterns: Sequence[str], *parts: object) -> str:
    """Return a digest of the files of the checkout that match the patterns, of the parts and of the packages."""
    installed = sorted(path.name for path in Path(sysconfig.get_path("purelib")).glob("*.dist-info"))
    digest = hashlib.sha256(repr((parts, platform.python_version(), installed)).encode())
    for source in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(repr((source.relative_to(ROOT), source.read_bytes())).encode())
    return digest.hexdigest()[:16]
