"""The command `grbench`: `grbench [overrides]` measures cells, every other job is a subcommand."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence

from grbench import __version__, completion
from grbench.config.arguments import CommandError
from grbench.subcommands import SUBCOMMANDS, call


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


def _unknown(word: str) -> str:
    near = difflib.get_close_matches(word, SUBCOMMANDS, n=2)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    return f"{word}: no such command; {hint}commands: {', '.join(SUBCOMMANDS)}; a setting is KEY=VALUE"
