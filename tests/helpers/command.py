"""The `grbench` command, in a process of its own or in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from grbench.cli import main
from helpers.forks import fork_command

Grbench = Callable[..., subprocess.CompletedProcess[str]]


def run_in(folder: Path, *args: str, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m grbench ARGS` in a folder; `env` adds environment variables."""
    return subprocess.run(
        [sys.executable, "-m", "grbench", *args],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


_FRESH = """
import contextlib, json, sys
import pytest
from grbench.cli import main
from helpers.forks import fork_workers
fork_workers(pytest.MonkeyPatch())
codes = []
for number, words in enumerate(json.loads(sys.argv[1])):
    with open(f"{number}.out", "w") as out, open(f"{number}.err", "w") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            codes.append(main(words))
print(json.dumps(codes))
"""


def run_fresh(folder: Path, commands: Sequence[Sequence[str]], **env: str) -> list[subprocess.CompletedProcess[str]]:
    """Run `grbench WORDS` for each command in a folder, all in one fresh process, whose workers are forks of it."""
    done = subprocess.run(
        [sys.executable, "-c", _FRESH, json.dumps(commands)],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    printed = [[(folder / f"{n}.{kind}").read_text() for kind in ("out", "err")] for n in range(len(commands))]
    codes = json.loads(done.stdout)
    return [subprocess.CompletedProcess(list(commands[n]), codes[n], *printed[n]) for n in range(len(commands))]


def run_forked(folder: Path, *args: str, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `grbench ARGS` in a folder and in a fork of this process, as its workers are."""
    process = fork_command(folder, *args, env={**os.environ, "COLUMNS": "200", **env})
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
    out, err = ((folder / name).read_text() for name in ("out.txt", "err.txt"))
    return subprocess.CompletedProcess(["grbench", *args], code, out, err)


def run_here(
    folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str], *args: str
) -> subprocess.CompletedProcess[str]:
    """Run `grbench ARGS` in a folder and in this process, which saves its start."""
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["grbench"])
    patch.setenv("HYDRA_FULL_ERROR", "0")
    patch.setenv("COLUMNS", "200")
    capture.readouterr()
    try:
        code = main(args)
    except SystemExit as ended:  # of --help
        code = int(ended.code or 0)
    printed = capture.readouterr()
    return subprocess.CompletedProcess(["grbench", *args], code, printed.out, printed.err)
