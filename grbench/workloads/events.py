"""Behaviour events as columns, and the loaders that read and check them.

The schema is user, item, actions (bit mask), weight, timestamp. An error in a file is one line that names the
file, row, column and value.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from grbench.streams import printable
from grkernels.nearest import nearest

EARLIEST, LATEST = 315_532_800, 4_102_444_800  # 1980 and 2100: times outside are in another unit
DAY = 86_400
UNITS = {
    "s": ("seconds", 1),
    "ms": ("milliseconds", 10**3),
    "us": ("microseconds", 10**6),
    "ns": ("nanoseconds", 10**9),
}
NO_TIMES = "none"
# Names of columns by what they hold, as MovieLens, KuaiRand, Amazon, Yelp, Steam, Yoochoose and Anime have them.
KNOWN = {
    "user": ("user_id", "userId", "user", "uid", "session_id", "reviewerID"),
    "item": ("item_id", "movieId", "video_id", "business_id", "product_id", "parent_asin", "asin", "item", "iid"),
    "time": ("timestamp", "time_ms", "unixReviewTime", "datetime", "time", "date"),
    "rating": ("rating", "stars", "overall"),
}
KUAIRAND_ACTIONS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")
RATING_ACTIONS = ("rated", "liked")  # liked: at least four fifths of the file's highest rating
NO_RATING_ACTIONS = RATING_ACTIONS[:1]  # of a file without ratings
FIX = "correct or remove the row"
# Words that pandas reads as a missing value. As ids, all rows that lack one would be of the same item or user.
MISSING = frozenset(("", "NaN", "nan", "NA", "N/A", "n/a", "<NA>", "#N/A", "NULL", "null", "None"))
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"


class DataError(ValueError):
    """Data that cannot be used. The message is one line with file, row, column, value and the fix."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text.replace("\n", "\\n")))


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
    item_ids: tuple[str, ...] = ()  # of recorded events: the id in the file of each dense id


@dataclass(frozen=True)
class Columns:
    """The columns of a file by what they hold. None: the first of `KNOWN` that the file has."""

    user: str | None = None
    item: str | None = None
    time: str | None = None  # NO_TIMES: the file has none, and its order counts
    rating: str | None = None
    unit: str = "auto"  # of UNITS; auto: the one that puts the times between 1980 and 2100


def load_recbole(path: Path, sort: bool, columns: Columns = Columns()) -> Events:
    """Read a RecBole `.inter` file: tab-separated, header of `name:type`, optional rating. Raises DataError."""
    table = _Table(path, delimiter="\t")
    table.rename({name: name.split(":")[0] for name in table.names})
    return _interactions(table, columns, sort)


def load_csv(path: Path, format: str, sort: bool, columns: Columns = Columns()) -> Events:
    """Read a table with a header, MovieLens ratings.dat, or a file of sequences. Raises DataError.

    `format="auto"` recognises the format by the first line.
    """
    if path.suffix == ".parquet":
        return _interactions(_Table(path), columns, sort)
    first = _first_line(_bytes(path))
    if format == "auto":
        format = _recognise(first)
    if format == "sequences":
        return _sequences(path)
    if format == "ratings_dat":
        names = ["userId", "movieId", "rating", "timestamp"]  # the file has no header
        return _interactions(_Table(path, "::", names), columns, sort)
    return _interactions(_Table(path, _delimiter(first)), columns, sort)


def check_columns(path: Path, format: str, columns: Columns = Columns()) -> None:
    """Raise DataError if a file is empty, can't be read, or lacks a column that `columns` names or that is needed.

    format: of `load_csv`, or recbole. Only the head of the file is read.
    """
    if path.suffix == ".parquet":
        names = _parquet(path, rows=False).column_names
    else:
        first = _first_line(_bytes(path, first_line=True))
        if format == "auto":
            format = _recognise(first)
        if format in ("sequences", "ratings_dat") or not first.strip() or _not_utf8(first):
            return
        names = _header(path, first, "\t" if format == "recbole" else _delimiter(first))
        if format == "recbole":
            names = [name.split(":")[0] for name in names]
    for role in ("user", "item", "time", "rating"):
        named = getattr(columns, role)
        if named != NO_TIMES and (named is not None or role != "rating"):
            _find(path, names, role, named)


def _find(path: Path, names: Sequence[str], role: str, name: str | None) -> str:
    """Return the column of a role (of KNOWN): the named one, else the first known one. Raises DataError."""
    if name is not None:
        if name not in names:
            _require_columns(path, names)
            near = nearest(name, names).removeprefix("nearest: ").removesuffix("; ")
            raise _no_column(path, names, name, f"set workload.{role}_column={near or 'NAME'}")
        return name
    if found := next((known for known in KNOWN[role] if known in names), None):
        return found
    _require_columns(path, names)
    none = f", or workload.time_column={NO_TIMES} to take the file's order" if role == "time" else ""
    raise DataError(
        f"{path}: no column is known to be the {role} ({', '.join(KNOWN[role])}); the file has "
        f"{', '.join(names)}; set workload.{role}_column=NAME{none}"
    )


def _require_columns(path: Path, names: Sequence[str]) -> None:
    """Raise DataError where a text has one column only: no name of a column helps there."""
    if len(names) == 1 and path.suffix != ".parquet":
        raise DataError(
            f"{path}: row 1 has one column only, {names[0]!r}; columns are separated by commas or tabs: write the file "
            "with one of these"
        )


def _no_column(path: Path, names: Sequence[str], name: str, fix: str = "rename one") -> DataError:
    its = f"{nearest(name, names)}it has {', '.join(names)}"
    return DataError(f"{path}: row 1 has no column {name!r}; {its}; {fix}")


def _recognise(first: bytes) -> str:
    if b"::" in first:
        return "ratings_dat"
    return "sequences" if len(first.split()) > 2 and not set(b",\t") & set(first) else "table"


def _first_line(data: bytes) -> bytes:
    """Return what stands before the first end of a line: LF, CR LF, or CR alone."""
    return data.split(b"\n", 1)[0].split(b"\r", 1)[0]


def _delimiter(first: bytes) -> str:
    return "\t" if b"\t" in first and b"," not in first else ","


def _header(path: Path, first: bytes, delimiter: str, names: list[str] | None = None) -> list[str]:
    """Return the names of the columns from the first line of a file, or `names`. Raises DataError."""
    _check_quotes(path, first, delimiter)
    try:
        options = {"parse_options": _parse(delimiter), "read_options": _read(names)}
        return list(pa_csv.read_csv(io.BytesIO(first + b"\n"), **options).column_names)
    except pa.ArrowInvalid as e:
        raise _refused(path, e) from None


def _refused(path: Path, error: pa.ArrowInvalid) -> DataError:
    return DataError(f"{path}: {' '.join(str(error).split())}")


def _interactions(table: _Table, columns: Columns, sort: bool) -> Events:
    """Return the rows of a table as events: with KuaiRand's columns as its actions, else with a rating or none."""
    user, item = (table.find(role, getattr(columns, role)) for role in ("user", "item"))
    time = None if columns.time == NO_TIMES else table.find("time", columns.time)
    seconds = None if time is None else table.times(time, columns.unit)
    if bits := [name for name in KUAIRAND_ACTIONS if name in table.names]:
        actions, weights = _watched(table, bits)
        return _events(table, user, item, actions, weights, seconds, time, tuple(bits), sort)
    actions, weights = np.ones(table.rows, dtype=np.int64), np.ones(table.rows)
    names: tuple[str, ...] = NO_RATING_ACTIONS
    if columns.rating is not None or any(name in table.names for name in KNOWN["rating"]):
        values = table.numbers(table.find("rating", columns.rating))
        weights = np.clip(values / max(values.max(), 1e-9), 0.0, 1.0)
        actions |= (weights >= 0.8).astype(np.int64) << 1
        names = RATING_ACTIONS
    return _events(table, user, item, actions, weights, seconds, time, names, sort)


def _watched(table: _Table, bits: list[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the actions and the watched shares of a KuaiRand log."""
    actions = np.zeros(table.rows, dtype=np.int64)
    for bit, name in enumerate(bits):
        actions |= (table.numbers(name) > 0).astype(np.int64) << bit
    if not {"play_time_ms", "duration_ms"} <= set(table.names):
        return actions, np.ones(table.rows)
    duration = np.maximum(table.numbers("duration_ms"), 1.0)
    return actions, np.clip(table.numbers("play_time_ms") / duration, 0.0, 1.0)


def _sequences(path: Path) -> Events:
    """Read lines of `user item item ...` in order of time. The file has no times: event k of a user lies on day k."""
    users: list[str] = []
    items: list[list[str]] = []
    lines = io.TextIOWrapper(io.BytesIO(_bytes(path).rstrip()), "utf-8-sig", "replace")  # with line ends of any kind
    for row, line in enumerate(lines, 1):
        user, *its = line.split() or [""]
        if not its:
            raise DataError(f"{path}: row {row} has no items ({line[:60]!r}); a row is: user item item ...; {FIX}")
        if not MISSING.isdisjoint(words := (user, *its)):
            missing = next(word for word in words if word in MISSING)
            raise DataError(f"{path}: row {row}: {missing!r} is no id; {FIX}")
        users.append(user)
        items.append(its)
    if len(set(users)) < len(users):
        twice = next(i for i, user in enumerate(users) if user in users[:i])
        raise DataError(f"{path}: row {twice + 1}: user {users[twice]!r} has a row already; join the two")
    lengths = np.array([len(its) for its in items])
    encoded = pa.array([item for its in items for item in its]).dictionary_encode()
    count, positions = int(lengths.sum()), np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    return Events(
        users=np.repeat(np.arange(len(users)), lengths),
        items=encoded.indices.to_numpy().astype(np.int64),
        actions=np.ones(count, dtype=np.int64),
        weights=np.ones(count, dtype=np.float32),
        timestamps=positions * DAY,
        num_users=len(users),
        num_items=len(encoded.dictionary),
        action_names=NO_RATING_ACTIONS,
        item_ids=tuple(encoded.dictionary.to_pylist()),
    )


def _events(
    table: _Table,
    user: str,
    item: str,
    actions: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float64],
    seconds: npt.NDArray[np.float64] | None,
    time_column: str | None,
    action_names: tuple[str, ...],
    sort: bool,
) -> Events:
    (users, user_ids), (items, item_ids) = table.ids(user), table.ids(item)
    by_user = np.argsort(users, kind="stable")
    if seconds is None:  # the file's order counts: event k of a user lies on day k
        starts = np.searchsorted(users[by_user], users[by_user])
        seconds = np.empty(len(users))
        seconds[by_user] = (np.arange(len(users)) - starts) * float(DAY)
    elif not sort:
        assert time_column is not None
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
        len(user_ids),
        len(item_ids),
        action_names,
        tuple(item_ids.to_pylist()),
    )


class _Table:
    """A delimited file as columns of strings, with the row numbers that errors name."""

    def __init__(self, path: Path, delimiter: str = ",", names: list[str] | None = None) -> None:
        self.path = path
        self._delimiter = delimiter
        if path.suffix == ".parquet":
            self._first, self._table = 1, _parquet(path)
            return
        data = _bytes(path).rstrip(b"\r\n") + b"\n"  # blank lines at the end hold no events
        if why := _not_utf8(data):  # of a row with too few fields pyarrow would only print it
            raise DataError(f"{path}: {why}")
        if len(delimiter) > 1:
            data = data.replace(delimiter.encode(), b"\x1f")
        self._first = 1 if names else 2  # the line of the first event, counted from 1
        _check_quotes(path, data, delimiter)
        bad: list[Any] = []
        header = _header(path, _first_line(data), delimiter, names)
        try:
            self._table = pa_csv.read_csv(
                io.BytesIO(data),
                read_options=_read(names, len(data)),
                parse_options=_parse(delimiter, bad),
                convert_options=pa_csv.ConvertOptions(
                    column_types={name: pa.string() for name in header}, strings_can_be_null=False
                ),
            )
        except pa.ArrowInvalid as e:
            raise _refused(path, e) from None
        if twice := next((name for name in header if header.count(name) > 1), None):
            raise DataError(f"{path}: row 1 has column {twice!r} twice; rename or remove one")
        if bad:
            row = bad[0]
            cut = row.number == data.count(b"\n") and row.actual_columns < row.expected_columns
            found = f"{row.actual_columns} field{'s' * (row.actual_columns != 1)}"
            raise DataError(
                f"{path}: row {row.number} has {found} instead of {row.expected_columns}: "
                f"{self._as_written(row.text)[:80]!r}; "
                + ("the file looks truncated, fetch it again or remove the row" if cut else FIX)
            )
        if not self._table.num_rows:
            raise DataError(f"{path}: no events after the header in row 1; set workload.path to a file with some")

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

    def find(self, role: str, name: str | None) -> str:
        """Return the column of a role, as `_find` does. Raises DataError."""
        return _find(self.path, self.names, role, name)

    def times(self, column: str, unit: str = "auto") -> npt.NDArray[np.float64]:
        """Return a column of times, numbers of a unit or ISO 8601, as float64 seconds with fractions."""
        strings = pc.utf8_trim_whitespace(self._column(column))
        if not pc.match_substring_regex(strings.slice(0, 1), _NUMBER)[0].as_py():
            return self._dates(column, strings)
        numbers = self.numbers(column)
        middle = float(np.median(numbers))
        fitting = next((u for u, (_, per_s) in UNITS.items() if EARLIEST <= middle / per_s <= LATEST), None)
        if unit == "auto":
            unit = fitting or "s"  # times that fit no unit, such as 0, 1, 2, only order the events
        elif fitting not in (None, unit):
            likely = f"the column looks like {UNITS[str(fitting)][0]}: set workload.time_unit={fitting}"
            raise self.error(0, column, f"no likely time in {UNITS[unit][0]}; {likely}")
        what, per_second = UNITS[unit]
        seconds = numbers / per_second
        outside = (seconds < 0) | (seconds > LATEST)
        if outside.any():
            raise self.error(int(np.argmax(outside)), column, f"not a time: allowed are {what} from 1970 to 2100")
        if fitting and (seconds < EARLIEST).any():
            row = int(np.argmax(seconds < EARLIEST))
            raise self.error(row, column, f"before 1980 in {what}, in which the column is; {FIX}")
        return seconds

    def _dates(self, column: str, strings: Any) -> npt.NDArray[np.float64]:
        import pandas as pd  # it takes a second, and few files need it

        times = pd.to_datetime(strings.to_pandas(), format="ISO8601", utc=True, errors="coerce")
        if times.isna().any():
            row = int(times.isna().to_numpy().argmax())
            raise self.error(row, column, f"not a number and no time as 2023-11-14T22:16:15Z; {FIX}")
        # Not in nanoseconds, as pandas subtracts: they overflow in the year 2262, and a typing error goes further.
        seconds = times.dt.tz_localize(None).to_numpy().astype("datetime64[us]").astype(np.float64) / UNITS["us"][1]
        outside = (seconds < 0) | (seconds > LATEST)
        if outside.any():
            raise self.error(int(np.argmax(outside)), column, f"not a time: allowed are the years 1970 to 2099; {FIX}")
        return np.asarray(seconds)

    def ids(self, column: str) -> tuple[npt.NDArray[np.int64], Any]:
        """Return a column of ids as dense indices in order of first appearance, and the ids in that order.

        Raises DataError for the first that is missing.
        """
        encoded = self._column(column).combine_chunks().dictionary_encode()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.combine_chunks()
        indices = encoded.indices.to_numpy().astype(np.int64)
        missing = pc.is_in(pc.utf8_trim_whitespace(encoded.dictionary), value_set=pa.array(sorted(MISSING)))
        if pc.any(missing).as_py():
            row = int(missing.to_numpy(zero_copy_only=False)[indices].argmax())
            raise self.error(row, column, f"no id; {FIX}")
        return indices, encoded.dictionary

    def _column(self, name: str) -> Any:
        """Return a column as strings; what is missing in a parquet file is empty."""
        if name not in self._table.column_names:
            raise _no_column(self.path, self.names, name)
        column = self._table[name]
        if pa.types.is_string(column.type):
            return pc.fill_null(column, "")
        try:
            return pc.fill_null(pc.cast(column, pa.string()), "")
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise DataError(
                f"{self.path}: column {name!r} is {column.type}; numbers, texts or times are needed"
            ) from None


def _parquet(path: Path, rows: bool = True) -> Any:
    """Return the table of a file, without its rows for the names of the columns alone. Raises DataError."""
    import pyarrow.parquet as pq

    try:
        if not rows:
            return pq.read_schema(path).empty_table()
        table = pq.read_table(path)
        table.validate(full=True)
        _ = table.column_names
    except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not readable as parquet ({' '.join(str(e).split())}); write it again") from None
    if not table.num_rows:
        raise DataError(f"{path}: no events; set workload.path to a file with some")
    return table


def _bytes(path: Path, first_line: bool = False) -> bytes:
    """Return the content of a file, or its first line, unpacked if its name ends in .gz. Raises DataError."""
    if path.is_dir():
        raise DataError(f"{path}: it is a folder; set workload.path to a file")
    if not path.is_file():
        raise DataError(f"{path}: no such file; set workload.path")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as f:
            data = f.readline() if first_line else f.read()
    except (OSError, EOFError, zlib.error) as e:  # the last two: a damaged .gz file
        why = getattr(e, "strerror", None) or " ".join(str(e).split())
        raise DataError(f"{path}: can't be read ({why}); set workload.path to a file that can") from None
    if not data if first_line else not data.strip():
        raise DataError(f"{path}: the file is empty; set workload.path to one with events")
    return data


def _check_quotes(path: Path, data: bytes, delimiter: str) -> None:
    """Raise DataError for a row with a quote that is not closed in it: it would swallow rows."""
    if delimiter != "," or b'"' not in data:
        return
    for number, line in enumerate(data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"), 1):
        if line.count(b'"') % 2:
            try:
                list(csv.reader([line.decode(errors="replace")], strict=True))
            except csv.Error:
                raise DataError(f'{path}: row {number} has a quote (") that is opened and not closed; {FIX}') from None


def _not_utf8(data: bytes) -> str:
    """Return where a file is not UTF-8; "" if it is."""
    try:
        data.decode()
    except UnicodeDecodeError as e:
        return f"row {data[: e.start].count(10) + 1} is not UTF-8 (byte {data[e.start]:#04x}); convert the file"
    return ""


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
