"""The loops in C against their forms in NumPy, and a machine without a compiler."""

from __future__ import annotations

import dataclasses
import shutil
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st

from grengines.api import Request
from grengines.cache.history import History
from grengines.cache.index import Plan
from grengines.cache.places import HostPlaces
from grengines.cache.pool import PagePool
from grengines.runtime import native as module
from grengines.runtime.batch import Bucket, Encoding, HostBatch, Layout, pack, pack_slices
from grengines.runtime.native import Native, native
from grengines.runtime.slots import Slot, Slots

HAVE_COMPILER = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
HISTORY = [name for name in Request.__dataclass_fields__ if name.startswith("history_")]
SEEDS = st.integers(0, 2**32 - 1)
PAGE = 16


def a_request(rng: np.random.Generator, user: int, events: int, candidates: int) -> Request:
    """A request with items outside the table, times that run backwards, and arrays with gaps or at odd addresses."""
    step = int(rng.integers(1, 3))
    shift = int(rng.integers(0, 4))

    def moved(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The values as a call's body has them: after `shift` bytes."""
        return np.frombuffer(bytes(shift) + values.tobytes(), values.dtype, offset=shift)

    times = np.cumsum(rng.choice([-50, 0, 1, 2, 1000, 10**9, 2**53], 2 * events + 1)).astype(np.int64)
    return Request(
        request_id=user,
        user_id=user,
        history_items=moved(rng.integers(-5, 90, events * step))[::step],
        history_actions=moved(rng.integers(0, 2**6, events * step))[::step],
        history_weights=moved(rng.random(events * step, dtype=np.float32))[::step],
        history_timestamps=moved(times)[: events * step : step],
        num_seen=0,
        candidates=moved(rng.integers(0, 90, candidates)),
        timestamp=int(times[rng.integers(len(times))]) + int(rng.choice([0, 1, 10**6, 2**40])),
        arrival_s=0.0,
        deadline_ms=80.0,
    )


def requests_of(rng: np.random.Generator, most: int = 60) -> list[Request]:
    count = int(rng.integers(1, 6))
    return [a_request(rng, user, int(rng.integers(0, most)), int(rng.integers(0, 9))) for user in range(count)]


def an_encoding(rng: np.random.Generator) -> Encoding:
    C = int(rng.choice([0, 0, 3]))
    missing = int(rng.choice([0, 20])) if C else 0
    return Encoding(
        item_rows=50,
        user_rows=7 * max(C, 1),
        num_actions=4,
        contextual_seq_len=C,
        max_positions=int(rng.integers(1, 80)),
        time_buckets=int(rng.choice([1, 8, 64])),
        from_end=bool(rng.integers(2)),
        combinations=bool(rng.integers(2)),
        target_action=bool(rng.integers(2)),
        contextual_from=missing,
        blank_rows=C if missing and rng.integers(2) else 0,
        arrays=(("times", "until") if rng.integers(2) else ()) + (("num_contextuals",) if C else ()),
    )


def dirty(n: int) -> Slot:
    """A slot that an earlier batch has used."""
    slot = Slots(torch.device("cpu")).take()
    slot.reserve(n)
    slot.inputs.fill_(-7)
    return slot


def in_numpy(monkeypatch: pytest.MonkeyPatch, call: Any) -> Any:
    with monkeypatch.context() as change:
        change.setattr(native(), "functions", None)
        return call()


def facts(host: HostBatch) -> dict[str, Any]:
    return {k: v for k, v in vars(host).items() if k != "buffer"}


@HAVE_COMPILER
@given(seed=SEEDS)
@examples(400)
def test_batches_are_packed_alike(seed: int) -> None:
    monkeypatch, rng = pytest.MonkeyPatch(), np.random.default_rng(seed)
    encoding, requests = an_encoding(rng), requests_of(rng)
    whole = [encoding.contextual(len(r.history_items)) + len(r.history_items) for r in requests]
    share = rng.choice([0, 1], len(requests)) if encoding.contextual_seq_len else rng.random(len(requests))
    cached = [int(n * part) for n, part in zip(whole, share, strict=True)]
    bucket = Bucket(8, 800, 60, 100, 9, 100)
    slots = [dirty(Layout.of([], encoding, []).length(bucket)) for _ in range(2)]
    size = int(rng.integers(1, 5))

    def both(call: Any) -> list[list[HostBatch]]:
        return [call(slots[0]), in_numpy(monkeypatch, lambda: call(slots[1]))]

    for call in (
        lambda slot: [Layout.of(requests, encoding, cached).pack(bucket, slot=slot)],
        lambda _: [pack(requests, encoding)],
        lambda _: pack_slices(Layout.of(requests, encoding, cached), size),
    ):
        in_c, as_before = both(call)
        assert len(in_c) == len(as_before)
        for a, b in zip(in_c, as_before, strict=True):
            assert torch.equal(a.buffer, b.buffer)
            assert facts(a) == facts(b)


@HAVE_COMPILER
@given(seed=SEEDS)
@examples(200)
def test_places_are_written_alike(seed: int) -> None:
    monkeypatch, rng = pytest.MonkeyPatch(), np.random.default_rng(seed)
    pool = PagePool(layers=1, pages=40, page=PAGE, heads=1, qk_dim=1, v_dim=1, dtype=torch.float32, device="meta")
    plans, first_rows, rows, ids = [], [], 0, rng.permutation(40).tolist()
    for user in range(int(rng.integers(0, 4))):
        stored = int(rng.integers(0, 8 * PAGE + 1))
        plan = Plan(user, user, History(*[np.zeros(0)] * 4), stored, 0.0, stored=stored)
        plan.cached = int(rng.integers(0, stored + 1))
        plan.pages = array("i", [ids.pop() for _ in range(pool.pages_for(stored))])
        plans.append(plan)
        first_rows.append(rows)
        rows += stored - plan.cached + int(rng.integers(0, 5))
    sequences, pages = (5, 9) if rng.integers(2) else (len(plans), 1 + max([0, *(len(p.pages) for p in plans)]))

    def places() -> HostPlaces:
        slot = dirty(HostPlaces.length(sequences, rows + 3, pages))
        return HostPlaces.of(pool, plans, first_rows, rows + 3, sequences=sequences, pages=pages, slot=slot)

    assert torch.equal(places().buffer, in_numpy(monkeypatch, places).buffer)


@HAVE_COMPILER
@given(seed=SEEDS)
@examples(200)
def test_histories_are_compared_alike(seed: int) -> None:
    monkeypatch, rng = pytest.MonkeyPatch(), np.random.default_rng(seed)
    before = a_request(rng, 0, int(rng.integers(1, 60)), 1)
    kept = int(rng.integers(0, len(before.history_items) + 1))
    columns = {name: getattr(before, name)[:kept] for name in HISTORY}
    for name in HISTORY:
        if rng.integers(2):
            columns[name] = columns[name].copy()
            if kept and rng.integers(2):
                columns[name][rng.integers(kept)] = 3 if name != "history_weights" else np.nan
    now = dataclasses.replace(before, **columns)
    a, b = History.of(before), History.of(now)
    assert a.common(b) == b.common(a) == in_numpy(monkeypatch, lambda: a.common(b))


@pytest.fixture(params=[pytest.param("C", marks=HAVE_COMPILER), "NumPy"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form of the loops in turn."""
    if request.param == "NumPy":
        monkeypatch.setattr(native(), "functions", None)
    else:
        assert native().functions is not None, native().problem


ENCODING = Encoding(50, 0, 4, 0, 9, 80)


@pytest.mark.usefixtures("form")
def test_arrays_of_another_type_are_refused() -> None:
    r = a_request(np.random.default_rng(0), 0, 5, 3)
    for name in (*HISTORY, "candidates"):
        other = getattr(r, name).astype(np.int32 if name == "candidates" else np.float64)
        asked = "float32" if name == "history_weights" else "int64"
        with pytest.raises(TypeError, match=f"{name} must be {asked}"):
            pack([r, dataclasses.replace(r, **{name: other})], ENCODING)
    with pytest.raises(TypeError, match="candidates must be int64 with one dimension"):
        pack([dataclasses.replace(r, candidates=r.candidates[:, None])], ENCODING)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", HISTORY)
def test_arrays_of_other_lengths_are_refused(name: str) -> None:
    r = a_request(np.random.default_rng(0), 0, 5, 3)
    for part in (slice(1), slice(1, None)):
        with pytest.raises(ValueError, match="request 1 of the batch: its arrays have other lengths"):
            pack([r, dataclasses.replace(r, **{name: getattr(r, name)[part]})], ENCODING)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("gap", [0, 1, 2, 2**31 - 1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1])
def test_the_gap_to_a_candidate_does_not_wrap(gap: int) -> None:
    r = a_request(np.random.default_rng(0), 0, 1, 3)
    r = dataclasses.replace(r, history_timestamps=np.array([-(2**63)]), timestamp=gap - 2**63)
    batch = pack([r], ENCODING).to(torch.device("cpu"))
    assert batch.time_buckets.tolist() == [0, *[(1 + gap).bit_length() - 1] * 3]


class Owning(Request):
    """A request whose arrays nobody else holds: each look at them makes a new one."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return found.copy() if name in HISTORY else found


@HAVE_COMPILER
def test_arrays_are_held_while_they_are_read() -> None:
    rng = np.random.default_rng(0)
    r = a_request(rng, 0, 5000, 3)
    other = Owning(**{name: getattr(r, name) for name in Request.__dataclass_fields__})
    assert torch.equal(pack([other], ENCODING).buffer, pack([r], ENCODING).buffer)


@HAVE_COMPILER
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"item_rows": 0}, "item_rows=0"),
        ({"time_buckets": 0}, "time_buckets=0"),
        ({"combinations": True, "num_actions": 7}, "got 127"),
    ],
)
def test_sizes_that_would_stop_the_process_are_refused(changed: dict[str, Any], message: str) -> None:
    r = a_request(np.random.default_rng(0), 0, 5, 3)
    with pytest.raises(ValueError, match=message):
        pack([r], dataclasses.replace(ENCODING, **changed))


@HAVE_COMPILER
@pytest.mark.parametrize(
    ("changed", "row", "error"),
    [
        ({}, -1, ValueError),
        ({}, 64, ValueError),
        ({}, 2**63 - 1, ValueError),
        ({}, "0", TypeError),
        ({}, 2**70, OverflowError),
        ({"cached": -1}, 0, ValueError),
        ({"cached": -1}, 1, ValueError),
        ({"stored": -1}, 0, ValueError),
        ({"stored": 2 * PAGE + 1}, 0, ValueError),
        ({"cached": None}, 0, TypeError),
        ({"pages": array("q", [1, 2])}, 0, TypeError),
        ({"pages": array("h", [1, 2, 3, 4])}, 0, TypeError),
        ({"pages": [1, 2]}, 0, TypeError),
    ],
)
def test_places_outside_the_arrays_are_refused(changed: dict[str, Any], row: Any, error: type[Exception]) -> None:
    """Only the memory of the batch is written, and slots only if everything fits."""
    plan = Plan(0, 0, History(*[np.zeros(0)] * 4), 20, 0.0, stored=20, pages=array("i", [1, 2]))
    for name, value in changed.items():
        setattr(plan, name, value)
    rows, width = 64, 8
    memory = np.full(16 + HostPlaces.length(1, rows, width), -7)
    with pytest.raises(error):
        native().functions.write_places(memory[8:-8], [plan], [row], rows, 1, width, PAGE)
    assert set(memory[:8]) == set(memory[-8:]) == {-7}
    assert set(memory[10:][:rows]) == {-1}


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    lacking = Native()
    assert lacking.functions is None
    assert "no-such-compiler" in lacking.actual()["host_loops"]
    assert "apt-get install gcc python3-dev" in lacking.actual()["host_loops"]
    assert not list((tmp_path / "native").iterdir())


def test_a_compiler_that_says_nothing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    lacking = Native()
    assert lacking.problem == f"native.c can't be used: false ended with 1; {module.NEEDS}"
    assert [r.getMessage() for r in caplog.records] == [f"NumPy does the host's loops, more slowly: {lacking.problem}"]


@HAVE_COMPILER
def test_a_compiled_file_that_does_not_load_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path))
    path = module._built()
    path.write_bytes(b"another machine's")
    problem = Native().problem
    assert str(path) in problem
    assert "GRBENCH_CACHE" in problem
    assert "compiler" not in problem


@HAVE_COMPILER
def test_an_error_of_the_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path))
    source = tmp_path / "native.c"
    source.write_text("#warning look out\n#error unknown machine\n")
    monkeypatch.setattr(module, "SOURCE", source)
    assert "unknown machine" in Native().problem


@HAVE_COMPILER
def test_the_functions_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path))
    assert Native().actual() == {"host_loops": "C"}
    monkeypatch.setenv("CC", "no-such-compiler")
    assert Native().actual() == {"host_loops": "C"}
