"""Two processes that do the same thing at the same time."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path

from helpers.forks import Fork

MEETING = """
import sys, time
from pathlib import Path
from grengines.runtime import atomic_io
others, own = Path(sys.argv[1]), sys.argv[2]

def meet_after(module, name):
    function = getattr(module, name)
    def both(*args, **options):
        result = function(*args, **options)
        (others / own).touch()
        end = time.monotonic() + 120
        while len(list(others.iterdir())) < 2:
            assert time.monotonic() < end, "the other process never came"
            time.sleep(0.01)
        return result
    setattr(module, name, both)

published = []
publish = atomic_io.publish
def publishing(made, folder):
    published.append((folder.parent.name, publish(made, folder)))
    return published[-1][1]
atomic_io.publish = publishing
"""


def race(code: str, folder: Path) -> list[str]:
    """Run the code in two forks of this process at once and return what each prints.

    In the code, `meet_after(module, name)` makes each process wait for the other behind that function. `published`
    lists the folders that a process published and whether it was the first.
    """
    others = folder / "others"
    others.mkdir()

    def run(name: str) -> None:
        sys.argv = ["-c", str(others), name]
        with (folder / f"{name}.txt").open("w") as printed, contextlib.redirect_stdout(printed):
            exec(MEETING + code, {})

    names = ("first", "second")
    both = [Fork(partial(run, name), folder / f"{name}.log") for name in names]
    codes = [fork.wait() for fork in both]
    assert codes == [0, 0], "".join((folder / f"{name}.log").read_text() for name in names)
    return [(folder / f"{name}.txt").read_text() for name in names]
