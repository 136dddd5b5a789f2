"""The known name that is nearest to one that is refused, for the message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: object, known: Iterable[str], count: int = 1) -> str:
    """Return "nearest: NAME; " for the known name most like `word`, or for as many as `count`; "" if none is alike."""
    names = {name.lower(): name for name in known}
    alike = [names[found] for found in difflib.get_close_matches(str(word).lower(), names, n=count)]
    return f"nearest: {', '.join(alike)}; " if alike else ""
