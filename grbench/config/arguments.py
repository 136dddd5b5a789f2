"""Flags of a subcommand, and the error that ends a command with one line."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from grkernels.nearest import nearest


class CommandError(ValueError):
    """A command cannot do what it was asked to. The message is one line; `code` is the exit code of the command."""

    def __init__(self, message: object, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def _width() -> int:
    return shutil.get_terminal_size().columns - 2  # as argparse


def replaced(words: Sequence[str], by: Sequence[str]) -> list[str]:
    """Return overrides with those of `by` at their end, instead of those of the same keys and of options under them.

    Another choice of a group, such as `workload=ml_100k`, need not have the options of the one before.
    """
    keys = {_key(word) for word in by}
    return [*(word for word in words if not any(f"{_key(word)}.".startswith(f"{key}.") for key in keys)), *by]


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


class Arguments(argparse.ArgumentParser):
    """The flags of `grbench NAME`, before, behind and between its overrides. A wrong flag raises CommandError.

    name: the subcommand. about: what it does, in lines that are wrapped. examples: command lines for --help, without
    `python -m grbench`.
    overrides: the Hydra overrides that it takes, in words; empty: none.
    """

    def __init__(self, name: str, about: str, examples: list[str], overrides: str = "") -> None:
        super().__init__(
            prog=f"grbench {name}",
            description="\n".join(textwrap.fill(line, _width()) for line in about.splitlines()),
            epilog="\n".join(["examples:", *(f"  python -m grbench {example}" for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if overrides:
            self.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides)
            own = "folder with your own YAML files, in groups as in conf/"
            self.add_argument("--config-dir", "-cd", metavar="FOLDER", help=own)

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; {self._near(message)}`python -m {self.prog} --help` lists the flags")

    def _near(self, message: str) -> str:
        """Return the hint for a misspelt choice or flag."""
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message):
            return nearest(choice[1], re.findall(r"[\w.-]+", choice[2]))
        flag = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        return nearest(flag[1], self._option_string_actions) if flag else ""
