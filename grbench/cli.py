"""The command `grbench`: `grbench [overrides]` measures cells, every other job is a subcommand."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from grbench import __version__, completion, signals, streams
from grbench.config.arguments import CommandError
from grbench.streams import printable
from grbench.subcommands import SUBCOMMANDS, call
from grkernels.nearest import nearest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own, and return its exit code.

    0: done. 1: it ran and something failed. 2: the command line, the configuration or the data is wrong. 128 and a
    signal's number: the signal ended it, 130 is Ctrl-C. 141: the reader of its output left, as in `| head`.
    Errors are one line; HYDRA_FULL_ERROR=1 raises them instead.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with streams.lossy() as output:
        code = _run(words)
        output.flush()
        if output.lost is not None and not isinstance(output.lost, BrokenPipeError):
            print(f"grbench: standard output: {output.lost.strerror}; a part of it is lost", file=sys.stderr)
            return code or 1
    return code or (141 if output.lost else 0)


def _run(words: list[str]) -> int:
    name = words.pop(0) if words and words[0] in SUBCOMMANDS else ""
    if not name and words == ["--version"]:
        print(f"grbench {__version__}")
        return 0
    raised = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        if not _folder_exists():
            raise CommandError("the working folder was removed; change to one that exists")
        if not name and words and re.fullmatch(r"\w[\w.-]*", words[0]):
            raise CommandError(_unknown(words[0]))
        if not name and words[0:1] in (["-sc"], ["--shell-completion"]) and "COMP_LINE" in os.environ:
            return completion.answer(words)
        with signals.raised():
            return call(name or "run", words)
    except CommandError as e:
        if raised:
            raise
        print(printable(f"{f'grbench {name}'.strip()}: {e}"), file=sys.stderr)
        return e.code
    except KeyboardInterrupt as e:
        return signals.exit_code(e)


def _folder_exists() -> bool:
    try:
        return bool(Path.cwd())
    except FileNotFoundError:
        return False


def _unknown(word: str) -> str:
    hint = nearest(word, SUBCOMMANDS, count=2)
    return f"{word}: no such command; {hint}commands: {', '.join(SUBCOMMANDS)}; a setting is KEY=VALUE"
