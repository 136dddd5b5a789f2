"""`python -m grbench.doctor`: what this machine can run, what is missing, why, and the command that mends it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec

from rich.console import Console
from rich.table import Table

from grbench.environment import describe_environment, installed_version
from grengines import registry as engines
from grkernels import registry as kernels


@dataclass(frozen=True)
class Finding:
    """One line: `reason` and `remedy` are empty when it is ok."""

    kind: str  # engine, kernel, package, device
    name: str
    ok: bool
    detail: str = ""  # version, or why it can't be used
    remedy: str = ""


# Distribution, import name, what it is for, what installs it. Those that grbench itself needs come first.
PACKAGES = (
    ("hydra-core", "hydra", "configuration", "pip install -e ."),
    ("torch", "torch", "engine hstu", "pip install 'torch>=2.11'"),
    (
        "mlcommons-loadgen",
        "mlperf_loadgen",
        "scenarios offline, server, *_stream",
        "pip install mlcommons-loadgen",
    ),
    ("mlflow", "mlflow", "tracking", "pip install -e ."),
    ("nvidia-ml-py", "pynvml", "GPU power and memory", "pip install nvidia-ml-py"),
)


def findings() -> list[Finding]:
    """Every engine, kernel variant, package and device, in the order they are shown."""
    found = []
    for name in engines.names():
        reason = engines.availability(name)
        found.append(Finding("engine", name, reason is None, *_split(reason)))
    for family, variant in kernels.names():
        reason = kernels.availability(family, variant)
        found.append(Finding("kernel", f"{family}={variant}", reason is None, *_split(reason)))
    for distribution, module, purpose, remedy in PACKAGES:
        version = installed_version(distribution)
        ok = find_spec(module) is not None
        detail = f"{version}, for {purpose}" if ok else f"not installed; for {purpose}"
        found.append(Finding("package", distribution, ok, detail, "" if ok else remedy))
    return [*found, *_devices()]


def _split(reason: str | None) -> tuple[str, str]:
    """An availability reason is "why; how to mend it"."""
    if reason is None:
        return "", ""
    why, _, remedy = reason.partition("; ")
    return why, remedy


def _devices() -> list[Finding]:
    env = describe_environment()
    cpu = Finding("device", "cpu", True, f"{env['cpu']}, {env['cpu_cores']} cores, {env['memory_gib']} GiB")
    import torch

    gpus = [
        Finding("device", f"cuda:{i}", torch.cuda.is_available(), f"{gpu['name']}, driver {gpu['driver']}")
        for i, gpu in enumerate(env["gpus"])
    ]
    if gpus and not torch.cuda.is_available():
        return [
            cpu,
            *gpus,
            Finding("device", "torch", False, "this torch has no CUDA", "make clean && make setup"),
        ]
    return [cpu, *(gpus or [Finding("device", "cuda", False, "no NVIDIA GPU or driver on this machine")])]


def main() -> int:
    """Print the findings; 0 if all that the default run needs is there, else 1."""
    parser = argparse.ArgumentParser(prog="python -m grbench.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    args = parser.parse_args()
    found = findings()
    if args.json:
        print(json.dumps([asdict(f) for f in found], indent=1))
    else:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("", "name", "", "detail", "to get it"):
            table.add_column(column, overflow="fold")
        for f in found:
            table.add_row(f.kind, f.name, "[green]ok" if f.ok else "[yellow]missing", f.detail, f.remedy)
        Console().print(table)
    return 0 if all(f.ok for f in found if f.kind == "package") else 1


if __name__ == "__main__":
    sys.exit(main())
