"""The file of the storage tier: rows of pages, read and written past the kernel's page cache, and its folder."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grengines.runtime.scratch import Scratch

BLOCK = 4096  # bytes: direct I/O takes multiples of the disk's block, at addresses that are multiples too
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}  # of a disk or a limit with too little room
Rows = npt.NDArray[np.uint8]  # [rows, bytes of one], contiguous


class Folder:
    """A folder for one engine at a time, made if it is missing. path="": a temporary one, removed by `close`.

    Raises ValueError for a folder that can't be written to or that another process uses.
    """

    def __init__(self, path: str, key: str) -> None:
        self.temporary = None if path else Scratch("grbench-states-")
        self.path = self.temporary.path if self.temporary else Path(path) / key
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(
                f"cache.storage_path={path}: it can't be written to ({error.strerror}); name a folder that can"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ValueError(
                f"cache.storage_path={path}: another run uses {self.path}; give each a folder of its own, or none"
            ) from None

    def close(self) -> None:
        """Let others use the folder, and remove a temporary one."""
        os.close(self._lock)
        if self.temporary is not None:
            self.temporary.close()


class RowFile:
    """`rows` rows of `row_bytes` bytes, a multiple of BLOCK, with their room on the disk reserved.

    direct: the kernel keeps no copy of what is read or written, where the file system can do that. Thread-safe.
    Raises ValueError if the disk has too little room or the file can't be used. A file that was there before stays.
    """

    def __init__(self, folder: Folder, rows: int, row_bytes: int) -> None:
        self._row_bytes, size = row_bytes, rows * row_bytes
        path, flags = folder.path / "pages", os.O_RDWR | os.O_CREAT
        kept, free = path.exists(), shutil.disk_usage(folder.path).free
        try:
            try:
                self._fd = os.open(path, flags | os.O_DIRECT, 0o644)
                self.direct = True
            except OSError:
                self._fd = os.open(path, flags, 0o644)
                self.direct = False
            try:
                if size - os.fstat(self._fd).st_blocks * 512 > free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.posix_fallocate(self._fd, 0, size)
            except OSError:
                os.close(self._fd)
                if not kept:
                    path.unlink()
                raise
        except OSError as error:
            if error.errno in FULL:
                raise ValueError(
                    f"cache.storage_gb={size / 1e9:.3g}: {folder.path} has {free / 1e9:.3g} GB free; lower it, or name "
                    "a folder on another disk in cache.storage_path"
                ) from None
            raise ValueError(
                f"cache.storage_path: {path} can't be used ({error.strerror}); remove it, or name another folder"
            ) from None
        if folder.temporary is not None:
            path.unlink()  # its room is free once the process ends, however it ends

    def read(self, row: int, into: Rows) -> None:
        """Read rows from `row` on. Raises OSError, also where the file ends too early."""
        self._move(os.preadv, row, into)

    def write(self, row: int, rows: Rows) -> None:
        """Write rows from `row` on. Raises OSError."""
        self._move(os.pwritev, row, rows)

    def sync(self) -> None:
        """Wait until what was written is on the disk. Raises OSError."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _move(self, call: Callable[[int, list[Any], int], int], row: int, rows: Rows) -> None:
        left, at = rows.data.cast("B"), row * self._row_bytes
        while left:
            moved = call(self._fd, [left], at)
            if moved <= 0:
                raise OSError(errno.EIO, "the file ends too early")
            left, at = left[moved:], at + moved


def disk_of(path: Path) -> str:
    """Return the file system of a path and the device below it, such as "ext4 on /dev/nvme0n1"; "" if unknown."""
    best, found = Path(), ""
    try:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            device, at, kind = line.split()[:3]
            if path.resolve().is_relative_to(at) and len(Path(at).parts) >= len(best.parts):
                best, found = Path(at), f"{kind} on {device}"
    except OSError:
        return ""
    return found
