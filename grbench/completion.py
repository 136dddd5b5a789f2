"""Shell completion: subcommands, their flags, and Hydra's completion of groups and keys.

`eval "$(grbench -sc install=bash)"` switches it on. The shell then calls `grbench -sc query=bash` with the typed line
in COMP_LINE. Hydra knows nothing of subcommands, so their words are completed here and taken off the line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import import_module

from grbench.subcommands import SUBCOMMANDS, call

HYDRA = ("run", "kernels", "cachesim", "train")  # with a configuration of their own
WITH_OVERRIDES = ("sizing", "overhead", "quantise", "export", "build-plan")  # take those of `run` between their flags


def answer(words: Sequence[str]) -> int:
    """Print the completions of COMP_LINE. words: what the shell called `grbench` with. Returns the exit code."""
    program, *typed = re.split(r"\s+", os.environ["COMP_LINE"].lstrip())
    name, last = "run", typed[-1] if typed else ""
    if len(typed) < 2:
        print("\n".join(command for command in SUBCOMMANDS if command.startswith(last)))
    elif typed[0] in SUBCOMMANDS:
        name, *typed = typed
    if name not in HYDRA:
        print("\n".join(flag for flag in _flags(name) if flag.startswith(last)))
        typed = [word for word in typed[:-1] if "=" in word] + [last]  # Hydra refuses flags that it does not know
    if name in HYDRA or (name in WITH_OVERRIDES and not last.startswith("-")):
        os.environ["COMP_LINE"] = " ".join([program, *typed])
        return call(name if name in HYDRA else "run", words)
    return 0


def _flags(name: str) -> list[str]:
    """Return the flags of a subcommand that Hydra does not parse."""
    module, _, function = SUBCOMMANDS[name].target.partition(":")
    parser = "parser" if function == "main" else f"{function.rstrip('_')}_parser"
    return sorted(set(re.findall(r"--[\w-]+", getattr(import_module(module), parser)().format_usage())))
