"""The index of the storage tier on disk: which users have a state, where its pages are, and their checksums.

SQLite with a write-ahead log: a record is there whole or not at all, also after the process or the machine dies.
"""

from __future__ import annotations

import contextlib
import io
import sqlite3
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grengines.cache.extents import Extent
from grengines.cache.history import History

Sums = npt.NDArray[np.uint32]  # [layers, pages]: CRC-32 of each page's row in each layer
_COLUMNS = ("items", "actions", "weights", "timestamps")


@dataclass
class Record:
    """The state of one user on disk."""

    tokens: int
    history: History
    extents: list[Extent]
    sums: Sums


class DiskIndex:
    """Records of states, on disk when a call returns. One thread at a time.

    pages: of the data file, for which the records are; `keep_size` writes it once that file is there. Raises
    ValueError, as `keep_size` and `load` do, for an index that can't be read, and for one of another number of pages;
    further calls raise OSError.
    """

    def __init__(self, folder: Path, pages: int) -> None:
        self._folder, self._pages = folder, pages
        with self._readable():
            self._base = sqlite3.connect(folder / "index.sqlite", check_same_thread=False)
            self._base.execute("pragma journal_mode=wal")
            self._base.execute("pragma synchronous=full")
            with self._base:
                self._base.execute("create table if not exists size (pages integer)")
                self._base.execute(
                    "create table if not exists states (user integer unique, tokens integer, arrays blob)"
                )
                found = self._base.execute("select pages from size").fetchone()
        if found is not None and found[0] != pages:
            self._base.close()
            raise ValueError(
                f"cache.storage_gb: {folder} was made for {found[0]} pages, and this run asks for {pages}; set "
                "cache.storage_gb as then, or remove the folder"
            )

    def keep_size(self) -> None:
        """Write the number of pages, if it is not there. Raises ValueError."""
        with self._readable(), self._base:
            self._base.execute("insert into size select ? where not exists (select 1 from size)", (self._pages,))

    def load(self) -> dict[int, Record]:
        """Return the records by user, the oldest first. Those that can't be read or overlap others are left out.

        Raises ValueError if the index itself can't be read.
        """
        taken, records = np.zeros(self._pages, bool), dict[int, Record]()
        with self._readable():
            for user, tokens, arrays in self._base.execute("select user, tokens, arrays from states order by rowid"):
                try:
                    found = np.load(io.BytesIO(arrays), allow_pickle=False)
                    extents = [(int(begin), int(n)) for begin, n in found["extents"]]
                    record = Record(tokens, History(*(found[name] for name in _COLUMNS)), extents, found["sums"])
                except (ValueError, KeyError, OSError, zipfile.BadZipFile):
                    continue
                places = [place for begin, n in extents for place in range(begin, begin + n)]
                if places and min(places) >= 0 and max(places) < self._pages and not taken[places].any():
                    taken[places] = True
                    records[user] = record
        return records

    def drop(self, users: Collection[int]) -> None:
        """Remove the records of users. Raises OSError."""
        try:
            with self._base:
                self._base.executemany("delete from states where user = ?", [(user,) for user in users])
        except sqlite3.Error as error:
            raise OSError(f"the index can't be written: {error}") from error

    def put(self, records: Mapping[int, Record]) -> None:
        """Add the records of users who have none. Raises OSError."""
        rows = [(user, record.tokens, _arrays(record)) for user, record in records.items()]
        try:
            with self._base:
                self._base.executemany("insert into states values (?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise OSError(f"the index can't be written: {error}") from error

    def close(self) -> None:
        self._base.close()

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ValueError(f"cache.storage_path: {self._folder} has no readable index ({error}); remove it") from None


def _arrays(record: Record) -> bytes:
    """Return the arrays of a record as an npz file."""
    file, columns = io.BytesIO(), {name: getattr(record.history, name) for name in _COLUMNS}
    np.savez(file, extents=np.array(record.extents, np.int64), sums=record.sums, **columns)
    return file.getvalue()
