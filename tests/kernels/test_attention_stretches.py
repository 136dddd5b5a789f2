"""Stretches of tiles in the Hopper attention kernel: its own functions of the schedule, run in plain Python.

A warp is 32 threads that meet at each shuffle and vote. What the sums depend on is checked for every CTA of random
batches: each tile belongs to one CTA, and those that share an item agree on how many they are and where they write.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

SM90 = Path(importlib.util.find_spec("grkernels").submodule_search_locations[0], "hstu_attention", "sm90")  # type: ignore
WARP = 32


@dataclass
class Warp:
    """Lanes of one warp. `exchange` gives each lane the values of all."""

    cta: int = 0
    ctas: int = 1
    lanes: int = 1
    local: threading.local = field(default_factory=threading.local)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(WARP, timeout=20))
    given: list[Any] = field(default_factory=lambda: [None] * WARP)

    def exchange(self, value: Any) -> list[Any]:
        self.given[self.local.lane] = value
        self.barrier.wait()
        values = list(self.given)
        self.barrier.wait()
        return values

    def run(self, work: Any) -> Any:
        """Return what all lanes return alike."""
        returned: list[Any] = [None] * WARP

        def lane(index: int) -> None:
            self.local.lane = index
            try:
                returned[index] = work()
            except Exception as e:
                returned[index] = e
                self.barrier.abort()

        threads = [threading.Thread(target=lane, args=(i,)) for i in range(WARP)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for value in returned:
            if isinstance(value, Exception) and not isinstance(value, threading.BrokenBarrierError):
                raise value
        assert all(value == returned[0] for value in returned)
        return returned[0]

    def up(self, value: int, offset: int, **_: Any) -> int:
        lane, values = self.local.lane, self.exchange(value)
        return values[lane - offset] if lane >= offset else value

    def arch(self) -> SimpleNamespace:
        return SimpleNamespace(
            lane_idx=lambda: self.local.lane,
            block_idx=lambda: (self.cta, 0, 0),
            grid_dim=lambda: (self.ctas, 1, 1),
            shuffle_sync_up=self.up,
            shuffle_sync=lambda value, offset: self.exchange(value)[offset],
            vote_ballot_sync=lambda vote: sum(1 << i for i, yes in enumerate(self.exchange(vote)) if yes),
            popc=lambda word: word.bit_count(),
        )


@pytest.fixture
def schedule(monkeypatch: pytest.MonkeyPatch) -> Any:
    """sm90/schedule.py with Python's numbers and lists instead of the device's, and `schedule.warp`."""
    warp = Warp()
    subscript = type("Subscript", (), {"__class_getitem__": classmethod(lambda cls, _: Any)})
    cute = SimpleNamespace(
        jit=lambda f: f, arch=warp.arch(), make_layout=lambda n: n, make_tensor=lambda values, n: values, Tensor=Any
    )
    stub = ModuleType("cutlass")
    numbers = dict.fromkeys(("Int32", "Int64", "Boolean"), int)
    names = {"cute": cute, "Constexpr": subscript, "range_constexpr": range, "min": min, "max": max}
    others = {"const_expr": bool} | dict.fromkeys(("BFloat16", "Float16", "Float32", "Float8E4M3FN"), object)
    stub.__dict__.update(numbers | names | others, range=lambda *ends, unroll: range(*ends))
    pointers = ModuleType("grkernels.cute_common")
    pointers.__dict__.update(dict.fromkeys(("ElementPointer", "Float32Pointer", "Int32Pointer", "Int64Pointer"), list))
    monkeypatch.setitem(sys.modules, "cutlass", stub)
    monkeypatch.setitem(sys.modules, "grkernels.cute_common", pointers)
    registers = ModuleType("grkernels.hstu_attention.sm90.registers")
    registers.__dict__.update(Thread=Any, flat=lambda sums: sums, round_pair=None, transpose=None)
    monkeypatch.setitem(sys.modules, registers.__name__, registers)
    for name in ("sizes", "visible", "schedule", "epilogue"):
        full = f"grkernels.hstu_attention.sm90.{name}"
        spec = importlib.util.spec_from_file_location(full, SM90 / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full, module)
        spec.loader.exec_module(module)
    module = sys.modules["grkernels.hstu_attention.sm90.schedule"]
    module.warp, module.epilogue = warp, sys.modules["grkernels.hstu_attention.sm90.epilogue"]  # type: ignore[attr-defined]
    return module


@dataclass
class Part:
    """Share of one CTA in one work item."""

    cta: int
    begin: int
    end: int
    first: int  # CTA that has the item's first tile
    number: int  # of parts
    slot: int
    tiles: int


def parts_by_item(schedule: Any, sizes: Any, batch: Any, table: Any, ctas: int) -> dict[tuple[int, int], list[Part]]:
    """Walk through the stretch of every CTA as the kernel does. Keys are sequence and position."""
    found: dict[tuple[int, int], list[Part]] = {}
    warp = schedule.warp
    warp.ctas = ctas
    for warp.cta in range(ctas):
        place = warp.run(lambda: schedule.first_stretch(sizes, batch, table))
        own = max(place.left, 0)
        while place.sequence >= 0:
            work = schedule.work_at(sizes, batch, table, 1, place)
            tiles = work.ranges.total()
            assert tiles >= 1 and 0 <= work.begin < work.end <= tiles
            earlier, later = schedule.parts_of(place, tiles)
            slot = schedule.slot_of(warp.cta, earlier)
            part = Part(warp.cta, work.begin, work.end, warp.cta - earlier, earlier + 1 + later, slot, tiles)
            found.setdefault((place.sequence, place.position), []).append(part)
            own -= work.end - work.begin
            place = schedule.next_place(sizes, batch, 1, 0, place, work)
        assert own == 0
    return found


def check_parts(schedule: Any, found: dict[tuple[int, int], list[Part]], ctas: int) -> Counter[int]:
    """Each tile once; sharers agree; no place is written twice or beyond two for each CTA. Return the CTAs' tiles."""
    slots: Counter[int] = Counter()
    counters: Counter[int] = Counter()
    loads: Counter[int] = Counter()
    for parts in found.values():
        ends = [0, *(part.end for part in parts)]
        assert [part.begin for part in parts] == ends[:-1] and ends[-1] == parts[0].tiles
        first = parts[0].cta
        for i, part in enumerate(parts):
            assert (part.cta, part.first, part.number) == (first + i, first, len(parts))
            loads[part.cta] += part.end - part.begin
        if len(parts) > 1:
            slots.update(part.slot for part in parts)
            counters[first] += 1
    assert all(0 <= slot < 2 * ctas for slot in slots) and all(0 <= counter < ctas for counter in counters)
    assert {*slots.values(), *counters.values()} <= {1}
    total = sum(loads.values())
    assert max(loads.values()) <= max(-(-total // ctas), schedule.TILES_A_SPLIT)
    return loads


def random_batch(schedule: Any, rng: np.random.Generator, sequences: int, page: int, longest: int) -> tuple[Any, Any]:
    """A batch with empty sequences, appends, targets, windows and contextual tokens."""
    tokens = rng.integers(0, longest, sequences) * (rng.random(sequences) < 0.8)
    queries = np.where(rng.random(sequences) < 0.5, tokens, np.minimum(tokens, rng.integers(0, 200, sequences)))
    queries[0], tokens[0] = max(queries[0], 1), max(tokens[0], 1)
    targets = np.minimum(queries, rng.integers(0, 90, sequences))
    kept = queries if page else tokens
    ends = [[0, *np.cumsum(x).tolist()] for x in (queries, kept)]
    limits = schedule.Limits(int(rng.choice([0, 0, 5, 70])), int(rng.choice([0, 0, 1, 300])))
    heads = int(rng.integers(1, 5))
    batch = schedule.Batch(*ends, targets.tolist(), ends[0][-1] + 3, heads, sequences, limits, int(rng.integers(0, 2)))
    return batch, schedule.PageTable(None, 0, (tokens - queries).tolist())


def expected_items(batch: Any, m: int) -> set[tuple[int, int]]:
    ends = batch.q_offsets
    blocks = [-(-(b - a) // m) for a, b in itertools.pairwise(ends)]
    return {(i, position) for i, count in enumerate(blocks) for position in range(count * batch.heads)}


@pytest.mark.parametrize(("page", "products"), [(0, ""), (64, ""), (0, "fp8")])
@pytest.mark.parametrize(("m", "n"), [(64, 64), (128, 64), (128, 128)])
def test_every_tile_belongs_to_one_cta(schedule: Any, m: int, n: int, page: int, products: str) -> None:
    rng = np.random.default_rng(m + n + page)
    sizes = SimpleNamespace(tiles=SimpleNamespace(m=m, n=n, stream=True), page=page, products=products)
    several = 0
    for sequences, longest, ctas in ((1, 3000, 7), (2, 900, 5), (5, 2000, 3), (9, 1000, 6), (40, 500, 4), (70, 300, 3)):
        batch, table = random_batch(schedule, rng, sequences, page, longest)
        found = parts_by_item(schedule, sizes, batch, table, ctas)
        assert found.keys() == expected_items(batch, m)
        check_parts(schedule, found, ctas)
        several += any(len(parts) > 1 for parts in found.values())
    assert several > 2


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("n", [64, 128])
def test_tiles_have_all_that_rows_see_once(schedule: Any, n: int, aligned: bool) -> None:
    """Appends and whole histories: the mask's pairs are in the tiles, and tiles without a mask have no others."""
    rng = np.random.default_rng(n + aligned)
    visible = sys.modules["grkernels.hstu_attention.sm90.visible"]
    for _ in range(300):
        tokens = int(rng.integers(1, 700))
        history = tokens - int(rng.choice([0, 0, 1, tokens, rng.integers(0, tokens + 1)]))
        queries = int(rng.integers(1, tokens + 1)) if rng.random() < 0.5 else tokens
        row = tokens - queries + int(rng.integers(0, -(-queries // 128))) * 128
        rows = min(128, tokens - row)
        limits = visible.Limits(int(rng.choice([0, 0, 5, 70])), int(rng.choice([0, 0, 1, 300])))
        ranges = visible.ranges_of(n, row, rows, history, limits, 0, aligned)
        columns = [ranges.column(n, i) for i in range(ranges.total())]
        assert len({*columns}) == len(columns) and not (aligned and any(column % n for column in columns))
        seen = [(visible.interval(i, history, limits), i) for i in range(row, row + rows)]
        needed = {j for (_, low, high), i in seen for j in (*range(low, high), i)}
        tiles = [range(column, column + n) for column in columns]
        assert all(sum(j in tile for tile in tiles) == 1 for j in needed)
        for tile in tiles[: ranges.unmasked()]:
            assert all((low <= tile[0] and tile[-1] < high) or {*tile} <= {i} for (_, low, high), i in seen)


def test_the_batch_that_it_is_for(schedule: Any) -> None:
    """8 appends of 128 + 256 rows to 3968 tokens, 4 heads, on 132 CTAs: 96 items of 62 to 66 tiles."""
    sizes = SimpleNamespace(tiles=SimpleNamespace(m=128, n=64, stream=True), page=64, products="")
    ends = [384 * i for i in range(9)]
    batch = schedule.Batch(ends, ends, [256] * 8, 3072, 4, 8, schedule.Limits(0, 0), 1)
    found = parts_by_item(schedule, sizes, batch, schedule.PageTable(None, 0, [3968] * 8), 132)
    assert found.keys() == expected_items(batch, 128) and len(found) == 96
    loads = check_parts(schedule, found, 132)
    whole = max(parts[0].tiles for parts in found.values())
    assert max(loads.values()) < 0.75 * whole  # with whole items a CTA would have all tiles of one
    assert max(len(parts) for parts in found.values()) <= 3


def test_few_tiles_leave_ctas_without_any(schedule: Any) -> None:
    sizes = SimpleNamespace(tiles=SimpleNamespace(m=64, n=64, stream=True), page=0, products="")
    batch = schedule.Batch([0, 1, 1, 70], [0, 300, 300, 370], None, 73, 1, 3, schedule.Limits(0, 0), 0)
    found = parts_by_item(schedule, sizes, batch, None, 9)
    assert found.keys() == expected_items(batch, 64)
    check_parts(schedule, found, 9)
    assert max(part.cta for parts in found.values() for part in parts) < 8
    empty = schedule.Batch([0, 0, 0], [0, 0, 0], None, 3, 1, 2, schedule.Limits(0, 0), 0)
    assert parts_by_item(schedule, sizes, empty, None, 3) == {}


@dataclass
class Pointer:
    """An address in memory that is a list or an array."""

    memory: Any
    at: int = 0

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.memory, self.at + offset)

    def __getitem__(self, four: slice) -> Any:
        return self.memory[self.at : self.at + 4][four]

    def __setitem__(self, four: slice, values: Any) -> None:
        self.memory[self.at : self.at + 4] = values


def added(schedule: Any, parts: np.ndarray, order: tuple[int, ...], unseen: bool) -> np.ndarray:
    """Add the parts of an item by its CTAs' own function, one CTA after another in `order`. Return what the last has.

    unseen: each looks for the others before any has written, as if all ended at once.
    """
    ctas, first, m, v_dim = len(parts) + 3, 2, 16, 16
    memory = np.full(2 * ctas * m * v_dim, np.nan, dtype=np.float32)
    arrivals = [0] * ctas

    def atomic_add(counter: Pointer, value: int, **_: Any) -> int:
        before = arrivals[counter.at]
        arrivals[counter.at] += value
        return 0 if unseen and not value else before

    def copy(source: Any, target: Any) -> None:
        target[:] = source[:]

    cute, arch = schedule.epilogue.cute, schedule.epilogue.cute.arch
    cute.__dict__.update(size=len, make_rmem_tensor=lambda n, dtype: np.zeros(n, dtype), autovec_copy=copy)
    cute.__dict__.update(assume=lambda offset, divby: offset)
    nothing = dict.fromkeys(("fence_acq_rel_gpu", "sync_warp"), lambda: None)
    arch.__dict__.update(nothing, atomic_add=atomic_add, shuffle_sync=lambda value, offset: value)
    schedule.epilogue.Float32 = np.float32
    sizes = SimpleNamespace(tiles=SimpleNamespace(m=m), v_dim=v_dim)
    sharing = schedule.epilogue.Sharing(Pointer(memory), Pointer(arrivals), 1)
    thread = SimpleNamespace(index=0, lane=0)
    length, begun = 10, 4  # tiles of a stretch, and those that the first CTA has of other items
    total = len(parts) * length - begun - 1
    complete = []
    for part in order:
        schedule.warp.cta = first + part
        before = max(part * length - begun, 0)
        left = length - begun if part == 0 else length
        stretch = schedule.Stretch(0, 0, before, left, length)
        sums = parts[part].copy()
        if schedule.epilogue.add_parts(sizes, sums, sharing, stretch, total, thread):
            complete.append((part, sums))
    [(last, sums)] = complete
    assert last == order[-1] and len(order) == len(parts)
    return sums


def test_sums_do_not_depend_on_the_order_in_which_ctas_end(schedule: Any) -> None:
    rng = np.random.default_rng(0)
    for number in (1, 2, 3, 4):
        parts = (rng.standard_normal((number, 8)) * 10 ** rng.uniform(-3, 3, (number, 8))).astype(np.float32)
        expected = parts[0]
        for part in parts[1:]:
            expected = expected + part
        for order in itertools.permutations(range(number)):
            for unseen in (False, True):
                assert np.array_equal(added(schedule, parts, order, unseen), expected), (order, unseen)
