"""Standard streams of a command: they may be closed, full, or without a reader. A lost line ends no measurement."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast


class Lossy:
    """A text stream that drops what can't be written. `lost` is the first error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as e:
            self.lost = self.lost or e
            with contextlib.suppress(OSError):  # what is buffered goes nowhere, and so does the rest
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lossy() -> Iterator[Lossy]:
    """Make standard output and errors lossy, after opening those that are closed. Yields standard output.

    A closed descriptor would otherwise become the next file that is opened.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    out, err = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: PTH123, SIM115
    shown = Lossy(out)
    sys.stdout, sys.stderr = cast(TextIO, shown), cast(TextIO, Lossy(err))
    try:
        yield shown
    finally:
        shown.flush()
        sys.stdout, sys.stderr = out, err


def printable(text: str) -> str:
    """Return a text with its control characters escaped: the name of a column or a value may have some."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
