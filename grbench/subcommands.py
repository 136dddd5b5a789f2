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
    "tune": Subcommand("grbench.tune.command:main", "search for the best strategy under limits, and certify it"),
    "doctor": Subcommand("grbench.tools.doctor:main", "list what can run here, what is missing, how to install it"),
    "kernels": Subcommand("grbench.kernelbench.command:main", "benchmark single operators, with gate and roofline"),
    "cachesim": Subcommand("grbench.cachesim.command:main", "replay a trace through cache policies and the optimum"),
    "serve": Subcommand("grbench.serve.command:main", "serve strategies over HTTP and gRPC, and choose among them"),
    "load": Subcommand("grbench.serve.load:main", "measure a server through the network, like any engine"),
    "config": Subcommand("grbench.config.reference:main", "print every key: allowed values, default, meaning"),
    "sizing": Subcommand("grbench.tools.sizing:main", "print parameters, FLOPs and KV bytes of a model and a workload"),
    "overhead": Subcommand("grbench.tools.overhead:main", "measure the latency that the harness itself adds"),
    "report": Subcommand("grbench.report.command:main", "write a report from records: HTML, Markdown, CSV or JSON"),
    "compare": Subcommand(
        "grbench.report.compare_command:main", "judge two measurements: faster, slower, no difference, undecided"
    ),
    "losses": Subcommand("grbench.report.losses_command:main", "fill in what a deployment's steps lose, from records"),
    "reports": Subcommand("grbench.report.studies_command:main", "rebuild the pages of kept reports"),
    "ui": Subcommand("grbench.tracking.command:ui", "open MLflow's pages on this machine"),
    "import": Subcommand("grbench.tracking.command:import_", "log the records that MLflow does not have yet"),
    "import-weights": Subcommand(
        "grbench.importing.command:main", "turn checkpoints of DLRM-v3, research HSTU, NVIDIA and Qwen3 into weights"
    ),
    "train": Subcommand("grbench.training.command:main", "train a small model on a workload, for the engines to run"),
    "evaluate": Subcommand("grbench.quality.command:main", "compute hit rate, NDCG or AUC of trained models"),
    "quantise": Subcommand("grbench.quality.quantise:main", "write a ranker's weights in e4m3, and say what is lost"),
    "export": Subcommand("grbench.tools.export:main", "export a ranking model to ONNX and torch.export"),
    "build-plan": Subcommand("grbench.tools.build_plan:main", "build a TensorRT plan, for this or another GPU"),
}


def call(name: str, words: Sequence[str]) -> int:
    """Call a subcommand with the words behind it. Returns its exit code or raises CommandError."""
    module, _, function = SUBCOMMANDS[name].target.partition(":")
    code: int = getattr(import_module(module), function)(words)
    return code


def summaries() -> str:
    """A line for each subcommand, for --help."""
    return "\n".join(f"  grbench {name:<14} {command.summary}" for name, command in SUBCOMMANDS.items())
