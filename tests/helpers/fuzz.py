"""Damage to files, and random searches for as long as there is time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

WORDS = (b"", b"\0", b"nan", b"inf", b"-1", b"1e400", b"9" * 25, b'"', b",", b"\t", b"\n", b"\xff", b"{", b"[", b"null")


def for_seconds(seconds: float, check: Callable[[], None]) -> None:
    """Call a property test once, and again while there is time. It draws new examples each time."""
    end = time.monotonic() + seconds
    check()
    while time.monotonic() < end:
        check()


def drawn(seconds: float, count: int = 25) -> settings:
    """Return settings of a property: the same `count` examples in a test without time, else `count` new ones."""
    return settings(max_examples=count, deadline=None, derandomize=seconds == 0)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Return a file that was cut, overwritten, shortened, repeated, or is garbage."""
    kind = draw(st.sampled_from(["cut", "flip", "word", "drop", "repeat", "garbage"]))
    if kind == "garbage":
        return draw(st.binary(max_size=200))
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        upto = min(at + draw(st.integers(1, 40)), len(data))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "word":
            data[at : draw(st.sampled_from([at, upto]))] = draw(st.sampled_from(WORDS))
        elif kind == "drop":
            del data[at:upto]
        else:
            data[upto:upto] = data[at:upto]
    return bytes(data)


VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, -1, 0.5, 1e308, 2**70, "", "x", "\n", "<b>", "OK", "2026-01-01", [], [1], [None], {}, {"a": 1}]
)


@st.composite
def altered(draw: st.DrawFn, tree: Any) -> Any:
    """Return a tree of dicts and lists with one to three of its nodes replaced, removed or added."""
    for _ in range(draw(st.integers(1, 3))):
        tree = _altered(draw, tree)
    return tree


def _altered(draw: st.DrawFn, node: Any) -> Any:
    if not isinstance(node, dict | list) or not node or draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    if isinstance(node, list):
        at = draw(st.integers(0, len(node) - 1))
        return [*node[:at], _altered(draw, node[at]), *node[at + 1 :]]
    key = draw(st.sampled_from(sorted(node, key=str)))
    rest = {name: value for name, value in node.items() if name != key}
    match draw(st.integers(0, 9)):
        case 0:
            return rest
        case 1:
            return {**node, "unknown": draw(VALUES)}
        case _:
            return {**rest, key: _altered(draw, node[key])}


def require_one_line(error: BaseException) -> None:
    """Fail for a message that is empty or has several lines: a user sees it as it is."""
    text = str(error)
    assert text.strip() and "\n" not in text.strip(), repr(error)
