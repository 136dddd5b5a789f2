"""The subcommands of `grbench`: their names, the functions behind them, and how one is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Subcommand:
    """One word behind `grbench`.

    `target` is a function, as "module:function". It takes the words behind the subcommand and returns the exit code,
    and is imported when the subcommand is called.
    """

    target: str
    summary: str


SUBCOMMANDS = {
    "run": Subcommand("grbench.execution.command:main", "measure cells; the default, so the word may be left out"),
    "doctor": Subcommand("grbench.tools.doctor:main", "what this machine can run, what is missing, how to install it"),
    "kernels": Subcommand("grbench.kernelbench.command:main", "operators one by one: gated, timed, with the roofline"),
    "cachesim": Subcommand("grbench.cachesim.command:main", "cache policies on a long trace, with the offline optimum"),
    "config": Subcommand("grbench.config.reference:main", "every key with its allowed values, default and meaning"),
    "sizing": Subcommand("grbench.tools.sizing:main", "parameters, FLOPs and KV bytes of a model and a workload"),
    "overhead": Subcommand("grbench.tools.overhead:main", "latency that the harness itself adds"),
    "report": Subcommand("grbench.report.command:main", "a Markdown page with tables and plots, from records"),
    "reports": Subcommand("grbench.report.studies_command:main", "pages of kept reports, rebuilt from their records"),
    "ui": Subcommand("grbench.tracking.command:ui", "open MLflow's pages on this machine"),
    "import": Subcommand("grbench.tracking.command:import_", "log the records that MLflow does not have yet"),
    "export": Subcommand("grbench.tools.export:main", "a ranking model as ONNX and torch.export files, checked"),
    "build-plan": Subcommand("grbench.tools.build_plan:main", "a TensorRT plan, for a GPU that need not be here"),
}


def call(name: str, words: Sequence[str]) -> int:
    """Call a subcommand with the words behind it. Returns its exit code or raises CommandError."""
    module, _, function = SUBCOMMANDS[name].target.partition(":")
    code: int = getattr(import_module(module), function)(words)
    return code


def summaries() -> str:
    """A line for each subcommand, for --help."""
    return "\n".join(f"  grbench {name:<11} {command.summary}" for name, command in SUBCOMMANDS.items())
