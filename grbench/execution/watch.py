"""The progress of long work on standard error: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from grbench.execution.clock import SILENCE_S, at_most_every, pace

Show = Callable[..., None]  # takes (done, total), and if given the seconds of what follows


def unseen(done: float, total: float) -> None:
    """Show nothing."""


@contextlib.contextmanager
def watch(screen: Console, what: str, most_s: float = math.inf) -> Iterator[Show]:
    """Show how far work is. most_s: of the work, which ends then."""
    begun = time.monotonic()
    say = at_most_every(SILENCE_S, lambda line: screen.print(line, soft_wrap=True, markup=False, highlight=False))
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[pace]}"),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    ) as bar:
        task = bar.add_task(escape(what), total=None, pace="")

        def show(done: float, total: float, after_s: float = 0.0) -> None:
            took = pace(time.monotonic() - begun, done, total, most_s, after_s)
            bar.update(task, completed=done, total=total, pace=took)
            if not screen.is_terminal:
                say(f"{what}: {done:,.0f} of {total:,.0f}, {took}")

        yield show
