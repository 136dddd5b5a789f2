"""`grbench doctor`: what this machine runs, what is missing, why, and the command that installs it.

Each engine that could run is run once, on a tiny case with its gate: an import proves little.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grbench.config.arguments import Arguments
from grbench.execution.environment import describe_environment, installed_version
from grbench.execution.records import RunRecord
from grbench.report.screen import unwrapped
from grengines import registry as engines
from grengines.cache import policies
from grkernels import registry as kernels


@dataclass(frozen=True)
class Finding:
    """One line of the list. `remedy` is empty if the part is ok."""

    kind: str  # engine, precision, kernel, cache, package, optional, device
    name: str
    ok: bool
    detail: str = ""  # version, or the reason why it cannot be used
    remedy: str = ""  # command that installs it


# Distribution, import name, purpose, command that installs it.
REQUIRED = (
    ("hydra-core", "hydra", "configuration", "pip install grbench"),
    ("torch", "torch", "engine hstu", "pip install 'torch>=2.11'"),
    ("mlcommons-loadgen", "mlperf_loadgen", "MLPerf scenarios", "pip install mlcommons-loadgen"),
    ("mlflow", "mlflow", "tracking", "pip install grbench"),
    ("scikit-learn", "sklearn", "semantic IDs", "pip install grbench"),
    ("pyarrow", "pyarrow", "data and samples", "pip install grbench"),
    ("nvidia-ml-py", "pynvml", "GPU power and memory", "pip install nvidia-ml-py"),
)
# Packages of some features; engines name their own.
OPTIONAL = (
    ("onnxscript", "onnxscript", "grbench export", "pip install 'grbench[onnx]'"),
    ("nvidia-cutlass-dsl", "cutlass", "kernel cutlass", "pip install 'grbench[cutlass]'"),
)


WIDTHS = (9, 28, 7)  # characters of a finding's kind, name and status

# One cell that every engine can run, in seconds.
TINY = (
    *(
        "model.layers=1",
        "workload=synthetic",
        "workload.users=20",
        "workload.items=100",
        "workload.visits=20",
        "workload.max_history=32",
    ),
    *("workload.num_candidates=8", "scenario=closed_loop", "scenario.queries=8", "scenario.max_batch=4"),
    *("warmup_batches=1", "gate.requests=2", "tracking=none", "runner.timeout_s=300"),
)


def findings(run: bool = True) -> Iterator[Finding]:
    """Yield every engine, kernel variant, cache policy, package and device, in order, each once it is known.

    run: run each engine once, in a worker process.
    """
    import torch

    for name in engines.names():
        reason = engines.availability(name)
        if reason is None and run and not engines.get(name).stages:  # its stages are engines of this list
            print(f"grbench doctor: running engine {name}", file=sys.stderr)
            yield _tried(name, _run(name))
        else:
            yield Finding("engine", name, reason is None, *_split(reason))
    yield _fp8()
    kind = kernels.device_kind("cuda" if torch.cuda.is_available() else "cpu")
    for family, variant in kernels.names():
        name = f"{family}={variant}"
        if elsewhere := kernels.misplaced(family, variant, kind):
            why, _, remedy = elsewhere.partition("; ")
            yield Finding("kernel", name, False, why, remedy or "kernel=auto takes one that runs here")
        else:
            reason = kernels.availability(family, variant)
            yield Finding("kernel", name, reason is None, *_split(reason))
    yield from (Finding("cache", name, True) for name in policies.names())
    yield from (_package("package", *entry) for entry in REQUIRED)
    for spec in engines.specs():
        for package in spec.packages:
            name = next(filter(installed_version, package.distributions), package.distributions[0])
            yield _package("optional", name, package.module, f"engine {spec.name}", package.install)
    yield from (_package("optional", *entry) for entry in OPTIONAL)
    yield from _devices()


def _run(engine: str) -> RunRecord:
    from grbench.api import run

    with tempfile.TemporaryDirectory() as folder:
        return run([f"engine={engine}", *TINY], output_root=folder)[0]


def _tried(engine: str, record: RunRecord) -> Finding:
    if record.ok:
        tasks = f"{record.spec['task']}, {record.actual['device']}, {record.actual['precision']}"
        return Finding("engine", engine, True, f"ran a tiny case in {record.duration_s:.0f} s ({tasks})")
    why, _, remedy = (record.error or "no reason was recorded").partition("; ")
    return Finding(
        "engine", engine, False, f"{record.status}: {why}", remedy or f"python -m grbench engine={engine} shows more"
    )


def _fp8() -> Finding:
    """Return what the products of engine.precision=fp8 are computed by."""
    import torch

    from grkernels import fp8

    name = "hstu engine.precision=fp8"
    if not torch.cuda.is_available():
        return Finding("precision", name, True, f"{fp8.runs_as('cpu')}: it shows the quality, and no speed")
    why = fp8.refusal()
    return Finding("precision", name, why is None, why or fp8.runs_as("cuda"), "engine.precision=bf16" if why else "")


def _package(kind: str, distribution: str, module: str, purpose: str, remedy: str) -> Finding:
    if find_spec(module) is None:
        return Finding(kind, distribution, False, f"not installed ({purpose})", remedy)
    return Finding(kind, distribution, True, f"{installed_version(distribution) or 'of unknown version'} ({purpose})")


def _split(reason: str | None) -> tuple[str, str]:
    """Split an availability reason, "why; command that installs it"."""
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


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = (
        "Run each engine once, and list engines, kernels, cache policies, packages and devices, and what is missing."
    )
    parser = Arguments("doctor", about, ["doctor", "doctor --quick --json"])
    parser.add_argument("--quick", action="store_true", help="run no engine: look for packages and devices only")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    return parser


def main(words: Sequence[str]) -> int:
    """Print each finding once it is known. Returns 1 if a required package is missing or engine hstu fails, else 0."""
    args = parser().parse_args(words)
    console, found = unwrapped(Console()), []
    if not args.json:
        console.print(_row("", "name", Text(""), "detail; what gets it", style="bold"))
    for f in findings(run=not args.quick):
        found.append(f)
        if not args.json:
            status = Text("ok", "green") if f.ok else Text("missing", "yellow")
            console.print(_row(f.kind, f.name, status, "; ".join(filter(None, (f.detail, f.remedy)))))
    if args.json:
        print(json.dumps([asdict(f) for f in found], indent=1))
    needed = [f for f in found if f.kind == "package" or (f.kind, f.name) == ("engine", "hstu")]
    return 0 if all(f.ok for f in needed) else 1


def _row(kind: str, name: str, status: Text, detail: str, style: str = "") -> Table:
    """Return a line of the list. Its columns have fixed widths, so lines of different times are aligned."""
    row = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for width in (*WIDTHS, None):
        row.add_column(width=width, overflow="fold")
    row.add_row(Text(kind), Text(name), status, Text(detail), style=style)  # Text: "[vllm]" is no markup
    return row
