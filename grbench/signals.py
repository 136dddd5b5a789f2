"""Signals that end a command: what is finished by then is kept."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

AGAIN_S = 0.01  # until a signal that was lost comes again
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a scheduler or container, a closed terminal


class Stopped(KeyboardInterrupt):
    """A signal, `number`, asked the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return the exit code of a command that a signal ended: 128 and the signal's number, which is 130 for Ctrl-C."""
    return 128 + getattr(interrupt, "number", signal.SIGINT)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within it the first signal of `ENDING` raises Stopped. Later ones are ignored, because records are being kept.

    They are ignored after it too, because the process is about to end. A signal that the process ignores, as under
    nohup, stays ignored. Only the main thread can take signals: on another one this does nothing.

    Python drops what is raised in a callback of its memory management (weakref, __del__). Such a signal comes again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    stopped, dropped = False, sys.unraisablehook

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            raise Stopped(number)

    def again(lost: sys.UnraisableHookArgs) -> None:
        nonlocal stopped
        if isinstance(lost.exc_value, Stopped):
            stopped = False
            threading.Timer(AGAIN_S, os.kill, (os.getpid(), lost.exc_value.number)).start()
        else:
            dropped(lost)

    for number in taken:
        signal.signal(number, stop)
    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = dropped
        for number in taken if not stopped else ():
            signal.signal(number, before[number])


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Put a signal of `ENDING` off until the end of this block, which keeps a result. Then its handler is called."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: handler for number in ENDING if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            handlers[signal.Signals(came[0])](came[0], None)
