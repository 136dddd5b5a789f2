"""Digests of files and folders, and names in the folder of files that can be made again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from grkernels.cache_folder import cache_folder

_digests: dict[tuple[str, int, int], str] = {}  # by path, size and time of change


def content(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's files and their names. A file is read once in a process.

    An ONNX model's weights in MODEL.onnx.data belong to it. Raises OSError.
    """
    beside = path.with_name(f"{path.name}.data")
    if path.is_dir() or beside.is_file():
        folder = path if path.is_dir() else path.parent
        parts = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path, beside]
        lines = [f"{_content(part)} {part.relative_to(folder)}" for part in parts]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return _content(path)


def _content(path: Path) -> str:
    facts = path.stat()
    key = (str(path.resolve()), facts.st_size, facts.st_mtime_ns)
    if key not in _digests:
        _digests[key] = sha256(path)
    return _digests[key]


def in_cache(name: object) -> bool:
    """Return True for the name of a file in the cache folder, such as that of an OSError."""
    try:
        return isinstance(name, str) and Path(name).is_relative_to(cache_folder())
    except ValueError:  # there is no cache folder
        return False


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits. Raises OSError."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
