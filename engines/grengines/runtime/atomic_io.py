"""Files and folders that appear whole or not at all, also while other processes read, write or replace them."""

from __future__ import annotations

import contextlib
import errno
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path for a file that replaces `path` at the end. After an error, what was there is left. Raises OSError.

    Others may read the file as any new one: libraries such as safetensors would keep it to its owner.
    """
    made = _beside(path)
    try:
        made.touch()
        mode = stat.S_IMODE(made.stat().st_mode)
        yield made
        made.chmod(mode)
        made.replace(path)
    except OSError as e:
        if e.filename == str(made):
            e.filename, e.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Write a file, replacing an existing one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as made:
        made.write_bytes(data)


def check(folder: Path, sign: str, what: str) -> None:
    """Raise ValueError for a folder with other contents: it is not empty and lacks the file `sign`."""
    if folder.exists() and not (folder / sign).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty and holds no {what}; give another folder")


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Make a folder beside `folder`, to be filled and published. It is deleted unless published. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = _beside(folder)
    made.mkdir()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def publish(made: Path, folder: Path) -> bool:
    """Rename `made` to `folder`. Return False, changing nothing, if `folder` has contents. Raises OSError."""
    try:
        made.replace(folder)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def discard(folder: Path) -> None:
    """Delete a folder if it exists, in one step for readers. Raises OSError."""
    aside = _beside(folder)
    with contextlib.suppress(FileNotFoundError):
        folder.replace(aside)
        shutil.rmtree(aside)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")
