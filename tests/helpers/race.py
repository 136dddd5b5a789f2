"""Two processes that do the same thing at the same time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
    """Run the code in two processes at once and return what each prints.

    In the code, `meet_after(module, name)` makes each process wait for the other behind that function. `published`
    lists the folders that a process published and whether it was the first.
    """
    others = folder / "others"
    others.mkdir()
    command = [sys.executable, "-c", MEETING + code, str(others)]
    both = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("first", "second")]
    printed = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    return printed
