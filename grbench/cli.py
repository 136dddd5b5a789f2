"""The command `grbench`: `grbench [overrides]` measures cells, every other job is a subcommand."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from grbench import __version__
from grbench.config.arguments import CommandError


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
    "sizing": Subcommand("grbench.tools.sizing:main", "parameters, FLOPs and KV bytes of a model and a workload"),
    "overhead": Subcommand("grbench.tools.overhead:main", "latency that the harness itself adds"),
    "report": Subcommand("grbench.report.command:main", "a Markdown page with tables and plots, from records"),
    "ui": Subcommand("grbench.tracking.command:ui", "open MLflow's pages on this machine"),
    "import": Subcommand("grbench.tracking.command:import_", "log the records that MLflow does not have yet"),
    "export": Subcommand("grbench.tools.export:main", "a ranking model as ONNX and torch.export files, checked"),
    "build-plan": Subcommand("grbench.tools.build_plan:main", "a TensorRT plan, for a GPU that need not be here"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own, and return its exit code.

    0: done. 1: it ran and something failed. 2: the command line, the configuration or the data is wrong. 130: Ctrl-C.
    Errors are one line; HYDRA_FULL_ERROR=1 raises them instead.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words.pop(0) if words and words[0] in SUBCOMMANDS else ""
    if not name and words == ["--version"]:
        print(f"grbench {__version__}")
        return 0
    raised = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        if not name and words and re.fullmatch(r"\w[\w.-]*", words[0]):
            raise CommandError(_unknown(words[0]))
        if not name and words[0:1] in (["-sc"], ["--shell-completion"]) and "COMP_LINE" in os.environ:
            from grbench import completion

            return completion.answer(words)
        return call(name or "run", words)
    except CommandError as e:
        if raised:
            raise
        print(f"{f'grbench {name}'.strip()}: {e}", file=sys.stderr)
        return e.code
    except BrokenPipeError:  # the reader has left, as in `grbench --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except KeyboardInterrupt:
        return 130


def call(name: str, words: Sequence[str]) -> int:
    """Call a subcommand with the words behind it. Returns its exit code or raises CommandError."""
    module, _, function = SUBCOMMANDS[name].target.partition(":")
    code: int = getattr(import_module(module), function)(words)
    return code


def summaries() -> str:
    """A line for each subcommand, for --help."""
    return "\n".join(f"  grbench {name:<11} {command.summary}" for name, command in SUBCOMMANDS.items())


def _unknown(word: str) -> str:
    near = difflib.get_close_matches(word, SUBCOMMANDS, n=2)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    return f"{word}: no such command; {hint}commands: {', '.join(SUBCOMMANDS)}; a setting is KEY=VALUE"
