"""Standard streams without a reader, on a full disk, and closed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grbench.streams import Lossy

FULL = os.strerror(errno.ENOSPC)


@pytest.fixture
def unread() -> int:
    """The write end of a pipe without a reader."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


def test_lines_without_a_reader_are_dropped(unread: int) -> None:
    with open(unread, "w") as stream:
        lossy = Lossy(stream)
        for _ in range(2):
            print("a line", file=lossy, flush=True)
    assert isinstance(lossy.lost, BrokenPipeError)  # and closing the stream raised nothing


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_loses_lines_and_no_more() -> None:
    with Path("/dev/full").open("w") as stream:
        lossy = Lossy(stream)
        print("a line", file=lossy, flush=True)
    assert lossy.lost is not None and lossy.lost.errno == errno.ENOSPC


@pytest.mark.parametrize(
    "command, code, said",
    [
        ("{grbench} --version <&- >&-", 0, ""),
        ("{grbench} --version >/dev/full", 1, f"grbench: standard output: {FULL}; a part of it is lost\n"),
        ("{grbench} --version | true; exit ${{PIPESTATUS[0]}}", 141, ""),
    ],
)  # fmt: skip
def test_a_command_says_what_became_of_its_output(command: str, code: int, said: str) -> None:
    line = command.format(grbench=f"{sys.executable} -m grbench")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)
