"""Behaviour events as columns, and the loaders that read and check them.

The schema is user, item, actions (bit mask), weight, timestamp. An error in a file is one line that names the
file, row, column and value.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

LATEST = 4_102_444_800  # 2100-01-01: a later time is not in seconds
KUAIRAND_ACTIONS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")
RATING_ACTIONS = ("rated", "liked")  # liked: at least four fifths of the file's highest rating
FIX = "correct or remove the row"
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"


class DataError(ValueError):
    """Data that cannot be used. The message is one line with file, row, column, value and the fix."""


@dataclass(frozen=True)
class Events:
    """Events as columns of equal length, sorted by user, then by time. Ids are dense: 0 to count - 1."""

    users: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    actions: npt.NDArray[np.int64]  # bit masks over `action_names`
    weights: npt.NDArray[np.float32]  # 0 to 1: rating or watched share
    timestamps: npt.NDArray[np.int64]  # seconds
    num_users: int
    num_items: int
    action_names: tuple[str, ...]


def load_recbole(path: Path, sort: bool) -> Events:
    """Read a RecBole `.inter` file: tab-separated, header of `name:type`, optional rating. Raises DataError."""
    table = _Table(path, delimiter="\t")
    table.rename({name: name.split(":")[0] for name in table.names})
    return _ratings(table, "user_id", "item_id", "rating" if "rating" in table.names else None, "timestamp", sort)


def load_csv(path: Path, format: str, sort: bool) -> Events:
    """Read MovieLens ratings.csv or ratings.dat, or a KuaiRand log. Raises DataError.

    `format="auto"` recognises the format by the first line.
    """
    if format == "auto":
        format = _recognise(path)
    if format == "ratings_dat":
        names = ["userId", "movieId", "rating", "timestamp"]  # the file has no header
        return _ratings(_Table(path, "::", names), "userId", "movieId", "rating", "timestamp", sort)
    if format == "ratings_csv":
        return _ratings(_Table(path), "userId", "movieId", "rating", "timestamp", sort)
    table = _Table(path)
    bits = [name for name in KUAIRAND_ACTIONS if name in table.names]
    actions = np.zeros(table.rows, dtype=np.int64)
    for bit, name in enumerate(bits):
        actions |= (table.numbers(name) > 0).astype(np.int64) << bit
    if {"play_time_ms", "duration_ms"} <= set(table.names):
        duration = np.maximum(table.numbers("duration_ms"), 1.0)
        weights = np.clip(table.numbers("play_time_ms") / duration, 0.0, 1.0)
    else:
        weights = np.ones(table.rows)
    seconds = table.times("time_ms", per_second=1000)
    return _events(table, "user_id", "video_id", actions, weights, seconds, "time_ms", tuple(bits), sort)


def _recognise(path: Path) -> str:
    first = _bytes(path)[:4096].split(b"\n")[0]
    if b"::" in first:
        return "ratings_dat"
    if b"movieId" in first:
        return "ratings_csv"
    if b"video_id" in first:
        return "kuairand"
    raise DataError(
        f"{path}: row 1 is not from MovieLens or KuaiRand ({first[:60].decode(errors='replace')!r}); allowed are "
        "ratings.csv (userId,movieId,rating,timestamp), ratings.dat (1::1193::5::978300760) and KuaiRand logs "
        "(user_id,video_id,...,time_ms,...); a RecBole file needs workload=recbole"
    )


def _ratings(table: _Table, user: str, item: str, rating: str | None, time: str, sort: bool) -> Events:
    actions, weights = np.ones(table.rows, dtype=np.int64), np.ones(table.rows)
    if rating is not None:
        values = table.numbers(rating)
        weights = np.clip(values / max(values.max(), 1e-9), 0.0, 1.0)
        actions |= (weights >= 0.8).astype(np.int64) << 1
    return _events(table, user, item, actions, weights, table.times(time), time, RATING_ACTIONS, sort)


def _events(
    table: _Table,
    user: str,
    item: str,
    actions: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float64],
    seconds: npt.NDArray[np.float64],
    time_column: str,
    action_names: tuple[str, ...],
    sort: bool,
) -> Events:
    users, num_users = table.ids(user)
    items, num_items = table.ids(item)
    by_user = np.argsort(users, kind="stable")
    if not sort:
        goes_back = (np.diff(users[by_user]) == 0) & (np.diff(seconds[by_user]) < 0)
        if goes_back.any():
            row = int(by_user[1:][goes_back].min())
            raise table.error(
                row, time_column, "earlier than this user's previous row; workload.sort=true sorts the file on loading"
            )
    order = np.lexsort((seconds, users))
    return Events(
        users[order],
        items[order],
        actions[order],
        weights[order].astype(np.float32),
        np.floor(seconds[order]).astype(np.int64),  # after sorting: events of one second keep their order
        num_users,
        num_items,
        action_names,
    )


class _Table:
    """A delimited file as columns of strings, with the row numbers that errors name."""

    def __init__(self, path: Path, delimiter: str = ",", names: list[str] | None = None) -> None:
        self.path = path
        self._delimiter = delimiter
        data = _bytes(path).rstrip(b"\r\n") + b"\n"  # blank lines at the end hold no events
        if len(delimiter) > 1:
            data = data.replace(delimiter.encode(), b"\x1f")
        self._first = 1 if names else 2  # the line of the first event, counted from 1
        if delimiter == "," and (row := _open_quote(data)):
            raise DataError(f'{path}: row {row} has a quote (") that is opened and not closed; {FIX}')
        bad: list[Any] = []
        try:
            header = pa_csv.read_csv(
                io.BytesIO(data.split(b"\n", 1)[0] + b"\n"), parse_options=_parse(delimiter), read_options=_read(names)
            ).column_names
            self._table = pa_csv.read_csv(
                io.BytesIO(data),
                read_options=_read(names, len(data)),
                parse_options=_parse(delimiter, bad),
                convert_options=pa_csv.ConvertOptions(
                    column_types={name: pa.string() for name in header}, strings_can_be_null=False
                ),
            )
        except (pa.ArrowInvalid, UnicodeDecodeError) as e:
            raise DataError(f"{path}: {self._why(e, data)}") from None
        if twice := next((name for name in header if header.count(name) > 1), None):
            raise DataError(f"{path}: row 1 has column {twice!r} twice; rename or remove one")
        if bad:
            row = bad[0]
            cut = row.number == data.count(b"\n") and row.actual_columns < row.expected_columns
            raise DataError(
                f"{path}: row {row.number} has {row.actual_columns} fields instead of {row.expected_columns}: "
                f"{self._as_written(row.text)[:80]!r}; "
                + ("the file looks truncated, fetch it again or remove the row" if cut else FIX)
            )
        if not self._table.num_rows:
            raise DataError(f"{path}: no events after the header in row 1; set workload.path to a file with some")

    @staticmethod
    def _why(error: Exception, data: bytes) -> str:
        try:
            data.decode()
        except UnicodeDecodeError as e:
            return f"row {data[: e.start].count(10) + 1} is not UTF-8 (byte {data[e.start]:#04x}); convert the file"
        return " ".join(str(error).split())

    def _as_written(self, text: str) -> str:
        return text.replace("\x1f", self._delimiter)

    @property
    def names(self) -> list[str]:
        return list(self._table.column_names)

    @property
    def rows(self) -> int:
        return int(self._table.num_rows)

    def rename(self, names: dict[str, str]) -> None:
        renamed = [names[name] for name in self._table.column_names]
        if twice := next((name for name in renamed if renamed.count(name) > 1), None):
            raise DataError(f"{self.path}: row 1 has column {twice!r} twice; rename or remove one")
        self._table = self._table.rename_columns(renamed)

    def error(self, row: int, column: str, why: str) -> DataError:
        value = self._column(column)[row].as_py()
        return DataError(f"{self.path}: row {row + self._first}, column {column}: {value!r} is {why}")

    def numbers(self, column: str) -> npt.NDArray[np.float64]:
        """Return a column as finite float64. Raises DataError for the first other value."""
        strings = pc.utf8_trim_whitespace(self._column(column))
        try:
            values = pc.cast(strings, pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            numeric = pc.match_substring_regex(strings, _NUMBER)
            row = pc.index(numeric, pa.scalar(False)).as_py()
            raise self.error(row, column, f"not a number; {FIX}") from None
        if not np.isfinite(values).all():
            raise self.error(int(np.argmin(np.isfinite(values))), column, f"not a finite number; {FIX}")
        return np.asarray(values, dtype=np.float64)

    def times(self, column: str, per_second: int = 1) -> npt.NDArray[np.float64]:
        """Return a column of times as float64 seconds, with fractions."""
        seconds = self.numbers(column) / per_second
        outside = (seconds < 0) | (seconds > LATEST)
        if outside.any():
            what = "seconds" if per_second == 1 else "milliseconds"
            raise self.error(int(np.argmax(outside)), column, f"not a time: allowed are {what} from 1970 to 2100")
        return seconds

    def ids(self, column: str) -> tuple[npt.NDArray[np.int64], int]:
        """Return a column of ids as dense indices in order of first appearance, and their number."""
        strings = self._column(column)
        empty = pc.equal(pc.utf8_trim_whitespace(strings), "")
        if pc.any(empty).as_py():
            raise self.error(pc.index(empty, pa.scalar(True)).as_py(), column, f"no id; {FIX}")
        encoded = strings.combine_chunks().dictionary_encode()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.combine_chunks()
        return encoded.indices.to_numpy().astype(np.int64), len(encoded.dictionary)

    def _column(self, name: str) -> Any:
        if name not in self._table.column_names:
            raise DataError(f"{self.path}: row 1 has no column {name!r}; it has {', '.join(self.names)}; rename one")
        return self._table[name]


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(f"{path}: no such file; set workload.path")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(f"{path}: can't be read ({e.strerror}); set workload.path to a file that can") from None
    if not data.strip():
        raise DataError(f"{path}: the file is empty; set workload.path to one with events")
    return data


def _open_quote(data: bytes) -> int:
    """Return the number of the first row with a quote that is not closed in it, or 0: it would swallow rows."""
    if b'"' not in data:
        return 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.count(b'"') % 2:
            try:
                list(csv.reader([line.decode(errors="replace")], strict=True))
            except csv.Error:
                return number
    return 0


def _read(names: list[str] | None, size: int = 0) -> pa_csv.ReadOptions:
    """Return options that read `size` bytes as one block, because a row that is cut by a block's end is refused.

    Threads would lose the row numbers.
    """
    block = min(max(size, 1 << 20), (1 << 31) - 1)
    return pa_csv.ReadOptions(use_threads=False, column_names=names, block_size=block)


def _parse(delimiter: str, bad: list[Any] | None = None) -> pa_csv.ParseOptions:
    def note(row: Any) -> str:
        if bad is not None:
            bad.append(row)
        return "skip"

    return pa_csv.ParseOptions(
        delimiter="\x1f" if len(delimiter) > 1 else delimiter,
        quote_char='"' if delimiter == "," else False,
        invalid_row_handler=note,
        ignore_empty_lines=False,
    )
