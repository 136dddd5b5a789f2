"""Tables on the screen and in pipes."""

from __future__ import annotations

import re
from io import TextIOBase
from typing import TextIO

from rich.console import Console

WIDTH = 1000  # characters of a line in a pipe: no table is as wide


def unwrapped(console: Console) -> Console:
    """Return the console of a terminal, or in a pipe one that wraps no line and fills none with blanks."""
    if console.is_terminal:
        return console
    return Console(file=_Unfilled(console.file), width=WIDTH, color_system=None)  # type: ignore[arg-type]


class _Unfilled(TextIOBase):
    """A text file that leaves out the blanks at the ends of lines. Each write is of whole lines."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the file: without UTF-8 a table has lines of ASCII."""
        return self._file.encoding

    def write(self, text: str) -> int:
        self._file.write(re.sub(" +$", "", text, flags=re.MULTILINE))
        return len(text)

    def flush(self) -> None:
        self._file.flush()
