"""The environment of a result: machine, driver, versions, code."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grbench.execution.gpu import describe_gpus

# The code that measures: a change elsewhere, such as in a report, leaves earlier records valid.
PARTS = ("execution", "gate", "quality", "scenarios", "tools.sizing", "workloads")
MEASURING = ("grkernels", "grengines", *(f"grbench.{part}" for part in PARTS))
PACKAGES = ("grbench", "torch", "triton", "nvidia-cutlass-dsl", "numpy", "mlcommons-loadgen", "hydra-core", "mlflow")


def describe_environment(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return the machine, GPUs, versions and git state. They are gathered once per process, without importing torch.

    packages: distributions whose versions count too, if they are installed.
    """
    found = {name: version for name in (*PACKAGES, *packages) if (version := installed_version(name))}
    return {**_machine_and_code(), "versions": found}


@functools.cache
def _machine_and_code() -> dict[str, Any]:
    return {
        "git_sha": git_sha(),
        "code": code_digest(),
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "gpus": describe_gpus(),
    }


def machine_of(environment: dict[str, Any]) -> str:
    """Return the kind of machine of a record's environment: processor, cores, GPUs. Figures of one kind compare."""
    gpus = [str(gpu.get("name")) for gpu in environment.get("gpus") or []]
    counted = [name if gpus.count(name) == 1 else f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    cores = environment.get("cpu_cores")
    processor = [environment.get("cpu") or "unknown CPU", *([f"{cores} core{'s' * (cores != 1)}"] if cores else [])]
    return ", ".join([*processor, *(counted or ["no GPU"])])


def code_digest() -> str:
    """Return 12 hex digits over the source files of `MEASURING`: edited files count, a commit of documents does not."""
    digest = hashlib.sha256()
    for package in MEASURING:
        found = find_spec(package)
        if found and found.origin and not found.submodule_search_locations:  # a module
            digest.update(f"{package}\n".encode() + Path(found.origin).read_bytes())
        for folder in (found.submodule_search_locations if found else None) or ():
            for path in sorted(p for p in Path(folder).rglob("*") if p.suffix in (".py", ".json")):
                digest.update(f"{package}/{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def installed_version(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_sha() -> str | None:
    """Return the commit of the checkout that this code runs from, with "+dirty" if files differ from it.

    $GRBENCH_GIT_SHA takes precedence, for an image without its checkout. Without either the result is None.
    """
    if given := os.environ.get("GRBENCH_GIT_SHA"):
        return given
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        sha = _git(root, "rev-parse", "HEAD")
        return sha + ("+dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def cpu_name() -> str:
    """Return the processor's model name if the system has it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
