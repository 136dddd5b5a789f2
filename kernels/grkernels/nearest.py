"""The known name that is nearest to one that is refused, for the message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MISSPELT = 0.8  # likeness of names that differ by a slip of the keyboard


def nearest(word: object, known: Iterable[str], count: int = 1) -> str:
    """Return "nearest: NAME; " for the known name most like `word`, or for as many as `count`; "" if none is alike.

    A name that begins with the word is alike, too, and so is one with which the word ends: port for http_port.
    """
    names, typed = {name.lower(): name for name in known}, str(word).lower()
    begun = [name for name in names if len(typed) > 1 and name.startswith(typed)]
    close = difflib.get_close_matches(typed, names, n=count)
    misspelt = difflib.get_close_matches(typed, names, n=count, cutoff=MISSPELT)
    ends = [name for name in names if typed.endswith(f"_{name}")]
    alike = [names[found] for found in dict.fromkeys([*misspelt, *ends, *close, *begun])][:count]
    return f"nearest: {', '.join(alike)}; " if alike else ""
