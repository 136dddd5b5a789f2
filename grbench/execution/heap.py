"""The memory of a process that runs for long: pauses of Python's garbage collector, and the arenas of glibc.

A full collection looks at every object that is alive. In a process that has imported PyTorch it takes 130 to 250 ms, in
which no request is answered, and it comes once in some thousand requests. What lives before the first request will
live after the last one: looking at it again finds nothing.

glibc gives threads arenas of their own, up to eight for each core. What a thread frees goes back to the arena that it
came from, where other threads do not find it. A reload runs on other threads than the start, so it fills further arenas
while the bytes in use stay level. Within an arena, free pages stay with the process up to the largest batch so far.
"""

from __future__ import annotations

import ctypes
import gc

M_ARENA_MAX = -8  # of malloc.h


class _Mallinfo2(ctypes.Structure):
    """glibc's struct of this name: bytes and counts."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def share_arena() -> None:
    """Have all threads allocate from one arena. Call it before others start. Without glibc it does nothing."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_ARENA_MAX, 1)


def leave_out() -> None:
    """Leave all objects that there are now out of later collections."""
    gc.freeze()


def settle() -> None:
    """Collect the garbage among all objects, those that were left out too, and leave the others out again."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    give_back()


def give_back() -> None:
    """Give free pages back to the system. It takes some milliseconds, in which nothing can be allocated."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def in_use() -> int | None:
    """Return the bytes that are allocated from glibc: the process's memory without free pages. None: not glibc."""
    if (mallinfo := getattr(ctypes.CDLL(None), "mallinfo2", None)) is None:
        return None
    mallinfo.restype = _Mallinfo2
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)
