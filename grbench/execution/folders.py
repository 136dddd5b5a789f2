"""Folders that one process at a time writes results into."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from grbench.config.schema import ConfigError
from grbench.execution import records
from grbench.execution.records import JOB_FILE, RECORD_FILE


@contextlib.contextmanager
def unused(folder: Path) -> Iterator[Path]:
    """Hold `folder`, or the first of folder.1, folder.2, ... that has no record and that no other process holds."""
    for name in itertools.chain([folder.name], (f"{folder.name}.{i}" for i in itertools.count(1))):
        path = folder.with_name(name)
        with _claimed(path) as mine:
            if mine and not (path / RECORD_FILE).exists():  # looked for only now: the one before may just have ended
                yield path
                return


@contextlib.contextmanager
def only_writer(folder: Path, option: str) -> Iterator[None]:
    """Hold `folder`. Raises ConfigError, with the option that names another folder, if another process holds it."""
    with _claimed(folder) as mine:
        if not mine:
            where = os.path.relpath(folder)
            raise ConfigError(f"{where}: another command is writing there; wait for it, or set {option}=FOLDER")
        yield


@contextlib.contextmanager
def only_command(root: Path, words: Sequence[str]) -> Iterator[None]:
    """Hold a command line under the output root `root`: a second one would measure the same cells beside it.

    The system lets go of what a process held when it ends, even if it is killed. There are two limits. A forked child
    shares the hold, so a child that outlives a killed parent keeps it. A file system without locks refuses nobody.
    Raises ConfigError, with the number of the process, if another one holds the command line; OSError.
    """
    name = hashlib.sha256("\0".join(sorted(words)).encode()).hexdigest()[:16]
    path = root / ".running" / name
    with new_folder(path.parent), _only_holder(path, root):
        yield


@contextlib.contextmanager
def _only_holder(path: Path, root: Path) -> Iterator[None]:
    """Hold the file at `path`, which is removed at the end. Raises as `only_command`."""
    while True:
        with _opened(path) as holder:
            if not _locked(holder.fileno()):
                holder.seek(0)
                number = holder.read()  # empty if it has just begun
                raise ConfigError(
                    f"{f'process {number}' if number else 'another process'} runs the same command in "
                    f"{os.path.relpath(root)}; wait for it, or set runner.output_root=FOLDER"
                )
            if not _is_at(path, holder.fileno()):  # the one before removed it after it was opened here
                continue
            holder.truncate(0)
            holder.write(str(os.getpid()))
            holder.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # while it is held, so that it is no other's
            return


def _opened(path: Path) -> TextIO:
    """Open a file in a folder, which is made again if another command removes it in between, as `new_folder` does."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return path.open("a+", encoding="utf-8")


def left_out(roots: Sequence[Path]) -> list[str]:
    """Return a line for each cell under `roots` that has no record that can be read: why, and what to do.

    A cell whose command was killed has none, unless it was measured again.
    """
    lines = records.unreadable(roots)
    begun = dict.fromkeys(folder for root in roots for folder in records.without_record(root))
    measured = [record.spec for root in roots for _, record in records.find(root)] if begun else []
    for folder in begun:
        with _claimed(folder) as mine:
            if not mine:
                lines.append(f"{folder}: its cell is being measured")
            elif _spec_of(folder) not in measured:
                lines.append(f"{folder}: its command was killed and left no record; run it again, or remove the folder")
    return lines


def _spec_of(folder: Path) -> Any:
    """Return what the worker was to measure in a folder; None where the command was killed before it said so."""
    try:
        return json.loads(json.loads((folder / JOB_FILE).read_text())["spec"])["values"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder for results. If the block raises, what was made here and is still empty is removed."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):  # it is not empty, or not there
                path.rmdir()
        raise


def require_writable(folder: Path, typed: str, fix: str) -> None:
    """Make a folder, before the work whose results it is for. Raises ConfigError if nothing can be written there.

    typed: the option or flag, with the path as the user typed it. fix: the words before "a folder".
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ConfigError(f"{typed}: {e.strerror or e}; {fix} a folder that can be written") from None


def require_parent(out: Path) -> None:
    """Make the folder of a file that `--out` names, before the work whose result it is, and say so where it is new.

    Raises as `require_writable`.
    """
    new = not out.parent.exists()
    require_writable(out.parent, f"--out {out}", "give")
    if new:
        print(f"grbench: made the folder {out.parent}", file=sys.stderr)


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Make a folder and hold it until the end of the block, or of this process; yield False if another one holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # the reason follows when something is written there
        yield True
        return
    try:
        yield _locked(handle)
    finally:
        os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    """Return whether an open file is the one at `path`, and was neither removed nor replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that has no locks
        return True
    return True
