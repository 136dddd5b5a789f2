"""Copies between the device and the host tier: late ones, in memory that is used in turn, without any of their own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from helpers.streams import MAIN, Streams
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grengines.cache import host
from grengines.cache.host import HostTier, Load
from grengines.cache.pool import PagePool
from grengines.cache.transfer import Ring
from grengines.runtime.timing import Mark

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PAGES, HOST_PAGES, LAYERS, PAGE = 12, 16, 3, 4
NO_HISTORY: Any = None


def make_pool(device: str, pages: int = PAGES) -> PagePool:
    sizes = {"layers": LAYERS, "page": PAGE, "heads": 1, "qk_dim": 2, "v_dim": 6}
    return PagePool(pages=pages, **sizes, dtype=torch.float32, device=device)


def make_tier(device: str, **options: Any) -> HostTier:
    pool = make_pool(device)
    return HostTier(pool, HOST_PAGES * pool.page_bytes, **options)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave memory for 5 gathered pages, for layers of 3 pages, and for 6 prefetched pages."""
    one = make_pool("cpu").page_bytes
    monkeypatch.setattr(host, "DOWN_BYTES", 5 * one)
    monkeypatch.setattr(host, "UP_BYTES", 3 * host.AHEAD * one // LAYERS)
    monkeypatch.setattr(host, "UP_LOADS", 1)
    monkeypatch.setattr(host, "STAGED_SHARE", 0.5)


class Traffic:
    """States that are written, sent to the host, loaded from there, prefetched and dropped, at random.

    Pages are overwritten as soon as a state was sent or read. `check` compares all that was read with what was written.
    """

    def __init__(self, tier: HostTier, seed: int) -> None:
        self.tier, self.pool, self.random = tier, tier.pool, random.Random(seed)
        words = tier.layers[0].view(torch.float32).shape[1] - PAGE * 8
        self.rest = [words] if tier.reserve else []  # of a page, for a disk
        self.expected: dict[int, list[int]] = {}  # of each user: the number in every page of the state
        self.read: list[tuple[Tensor, list[int]]] = []
        self.numbers = iter(range(1, 10**6))
        self.counts = dict.fromkeys(("sent", "more", "refused", "loaded", "mixed", "near", "prefetched", "dropped"), 0)

    def pages(self, most: int) -> list[int]:
        return self.random.sample(range(PAGES), self.random.randint(1, most))

    def write(self, page: int, number: int) -> None:
        """Fill a page with numbers that differ in each layer, and in keys and values."""
        for layer in range(LAYERS):
            for kind, rows in enumerate((self.pool.k[layer], self.pool.v[layer])):
                rows[page].copy_(torch.full_like(rows[page], number + (2 * layer + kind) / 8))

    def send(self, user: int) -> None:
        old, pages = self.expected.get(user, []), self.pages(self.random.choice([2, 7]))
        same = self.random.randint(0, min(len(old), len(pages) - 1))
        new = [next(self.numbers) for _ in pages]
        for page, number in zip(pages, new, strict=True):
            self.write(page, number)
        while self.tier.lacking(user, len(pages)):
            self.drop(self.random.choice([u for u in self.expected if u != user]))
        before = self.tier.bytes_down
        if self.tier.store(user, len(pages) * PAGE, NO_HISTORY, pages, same * PAGE):
            self.expected[user] = old[:same] + new[same:]
            assert self.tier.bytes_down - before == (len(pages) - same) * self.pool.page_bytes
            self.counts["more" if same else "sent"] += 1
        else:
            self.counts["refused"] += 1
        for page in pages:
            self.write(page, 0)

    def load(self, user: int) -> None:
        """Load a user's state, half of the time with another one, which may be nearer or farther."""
        others = sorted(self.expected.keys() - {user}, key=lambda one: (not self.tier.prefetched(one), one))
        users = [user, *others[:1]]
        free, loads, wanted = self.random.sample(range(PAGES), PAGES), list[Load](), list[tuple[int, int]]()
        for one in users[: self.random.randint(1, 2)]:
            numbers = self.expected[one]
            first = self.random.randrange(len(numbers))
            pages, free = free[: len(numbers) - first], free[len(numbers) - first :]
            if len(pages) < len(numbers) - first:
                break  # no room for both
            loads.append(Load(one, first, pages))
            wanted += zip(pages, numbers[first:], strict=True)
        near = [self.tier.prefetched(load.user) for load in loads]
        onload = self.tier.load(loads)
        assert onload.host_bytes == self.pool.page_bytes * sum(
            len(load.pages) for load, staged in zip(loads, near, strict=True) if not staged
        )
        if self.random.random() < 0.5:
            onload.all_layers()
        else:
            for layer in range(LAYERS):
                onload.layer(layer)
                other = self.random.randrange(8)
                if other not in users and other in self.expected:
                    self.prefetch(other)
        assert onload.queued and onload.bytes == len(wanted) * self.pool.page_bytes
        for page, number in wanted:
            for layer in range(LAYERS):
                for kind, rows in enumerate((self.pool.k[layer], self.pool.v[layer])):
                    there = torch.empty_like(rows[page])
                    self.read.append((there.copy_(rows[page]), number + (2 * layer + kind) / 8))
            self.write(page, 0)
        self.counts["loaded"] += 1
        self.counts["mixed"] += len(set(near)) > 1
        self.counts["near"] += len(near) > 1 and all(near)

    def prefetch(self, user: int) -> None:
        self.counts["prefetched"] += self.tier.prefetch(user)

    def drop(self, user: int) -> None:
        self.tier.drop(user)
        del self.expected[user]
        self.counts["dropped"] += 1

    def step(self) -> None:
        act: Callable[[int], None] = self.random.choice([self.send, self.send, self.load, self.prefetch, self.drop])
        user = self.random.randrange(8)
        if act == self.send or user in self.expected:
            act(user)

    def check(self) -> None:
        assert all(bool((there == number).all()) for there, number in self.read)
        for user, numbers in self.expected.items():
            rows = [page for begin, n in self.tier.states[user].extents for page in range(begin, begin + n)]
            for layer, there in enumerate(self.tier.layers):
                k, v, *rest = there[rows].view(torch.float32).split([PAGE * 2, PAGE * 6, *self.rest], dim=1)
                assert not any(x.any() for x in rest)
                for kind, x in enumerate((k, v)):
                    wanted = torch.tensor(numbers, dtype=torch.float32)[:, None] + (2 * layer + kind) / 8
                    assert bool((x == wanted).all())


@pytest.mark.parametrize("lazy", [MAIN, "side1", "side2", ""])
def test_late_copies_find_their_memory_as_it_was(lazy: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory on the way is written to before it was read, whatever stream is late."""
    total: dict[str, int] = {}
    for seed in range(20):
        with Streams(seed, lazy) as streams:
            monkeypatch.setattr(host, "Mark", streams.mark)
            monkeypatch.setattr(host, "side_stream", streams.side)
            traffic = Traffic(make_tier("cpu", reserve=seed % 2), seed)
            for _ in range(60):
                traffic.step()
                streams.run(streams.random.randrange(400))
            streams.run_until(lambda: not any(streams.queues.values()))
        traffic.check()
        total = {name: n + total.get(name, 0) for name, n in traffic.counts.items()}
    assert min(n for name, n in total.items() if name not in ("refused", "near")) > 5, total
    assert min(total["refused"], total["near"]) > 0, total


def test_layers_are_sent_under_the_lock_of_prefetches() -> None:
    """A prefetch of another thread enters the same stream, and notes the last read of the host's pages too."""
    tier, held = make_tier("cpu"), list[bool]()
    assert tier.store(1, PAGE, NO_HISTORY, [0], 0)

    @contextmanager
    def up() -> Iterator[None]:
        held.append(cast(Any, tier.lock)._is_owned())
        yield

    tier._up = up
    onload = tier.load([Load(1, 0, [1])])
    held.clear()
    onload.all_layers()
    assert held == [True] * (LAYERS - host.AHEAD)


@pytest.mark.gpu
def test_threads_enter_a_stream_beside_each_other() -> None:
    stream, main = host.side_stream(torch.device("cuda")), torch.cuda.current_stream()
    with stream(), ThreadPoolExecutor(1) as thread:

        def enter() -> bool:
            with stream():
                return torch.cuda.current_stream() != main

        assert thread.submit(enter).result()
        assert thread.submit(torch.cuda.current_stream).result() == main
    assert torch.cuda.current_stream() == main


@pytest.mark.gpu
def test_copies_behind_a_busy_gpu_find_their_memory_as_it_was(small: None) -> None:
    """The same traffic, while products of matrices hold up the main stream."""
    total: dict[str, int] = {}
    square = torch.ones(2048, 2048, device="cuda")
    for seed in range(10):
        traffic = Traffic(make_tier("cuda", reserve=seed % 2), seed)
        for _ in range(60):
            traffic.step()
            torch.mm(square, square)
        torch.cuda.synchronize()
        traffic.check()
        traffic.tier.close()
        total = {name: n + total.get(name, 0) for name, n in traffic.counts.items()}
    assert min(n for name, n in total.items() if name not in ("refused", "near")) > 0, total


class Late:
    """A mark that is reached once `done` is set. Waiting for it ends what was taken before it, too."""

    def __init__(self, used: list[tuple[set[int], Late]]) -> None:
        self.used, self.done = used, False

    def reached(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        while not self.done:
            self.used.pop(0)[1].done = True


def test_rows_are_taken_in_turn_and_only_when_they_are_free() -> None:
    """Compare with a list of the rows in use. Rows end in the order in which they were taken."""
    rng, waits, wraps = random.Random(0), 0, 0
    for _ in range(200):
        ring, used = Ring(rng.randint(1, 12)), list[tuple[set[int], Late]]()
        for _ in range(40):
            n = rng.randint(1, ring.rows)
            held = {row for rows, _ in used for row in rows}
            free = ring.room(n)
            assert held if free is None else not held & set(range(free, free + n))
            waits += free is None
            begin = ring.take(n)
            rows, held = set(range(begin, begin + n)), {row for rows, _ in used for row in rows}
            assert not rows & held and max(rows) < ring.rows
            wraps += bool(used) and begin == 0
            used.append((rows, Late(used)))
            ring.hold(begin, n, cast(Mark, used[-1][1]))
            for _ in range(rng.randint(0, len(used))):
                used[0][1].synchronize()
    assert waits > 100 and wraps > 100
    with pytest.raises(IndexError):
        Ring(3).take(4)
    assert Ring(3).take(3) == 0


def test_rows_are_found_behind_and_before_those_in_use() -> None:
    ring, marks = Ring(10), [Late([]) for _ in range(3)]
    for n, mark in zip((4, 4), marks, strict=False):
        ring.hold(ring.take(n), n, cast(Mark, mark))
    assert [ring.room(n) for n in (2, 3)] == [8, None]
    marks[0].done = True
    assert [ring.room(n) for n in (2, 3, 4, 5)] == [8, 0, 0, None]
    ring.hold(ring.take(3), 3, cast(Mark, marks[2]))
    assert [ring.room(n) for n in (1, 2)] == [3, None]
    marks[1].done = True
    assert [ring.room(n) for n in (7, 8)] == [3, None]
    marks[2].done = True
    assert [ring.room(n) for n in (10, 11)] == [0, None]


class Allocations(TorchDispatchMode):
    """Notes the operators whose result is in memory that no tensor had when this began, on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in {y.untyped_storage()._cdata for y in given}:
                self.names.append(func.name())
        return made


@contextmanager
def no_new_memory(device: str) -> Iterator[None]:
    """Fail if PyTorch makes or hands out memory within."""
    if device == "cpu":
        with Allocations() as made:
            yield
        assert made.names == []
        return
    before = taken()
    yield
    assert taken() == before


def taken() -> list[int]:
    """Return how often PyTorch handed out memory of the GPU, and asked for page-locked memory."""
    return [torch.cuda.memory_stats()["allocation.all.allocated"], torch.cuda.host_memory_stats()["num_host_alloc"]]


@pytest.mark.parametrize("device", DEVICES)
def test_copies_take_no_memory_of_their_own(device: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """States in pieces, parts of states, loads in steps and prefetches use the memory that the tier was made with."""
    traffic = Traffic(make_tier(device, reserve=2, prefetches=True), 0)
    for owner, name in ((HostTier, "store"), (HostTier, "load"), (HostTier, "prefetch"), (host.Onload, "layer")):
        monkeypatch.setattr(owner, name, without_new_memory(getattr(owner, name), device))
    for _ in range(300):
        traffic.step()
    traffic.check()
    assert min(n for name, n in traffic.counts.items() if name not in ("refused", "mixed", "near")) > 5, traffic.counts
    traffic.tier.close()


def without_new_memory(call: Callable[..., Any], device: str) -> Callable[..., Any]:
    def watched(*args: Any) -> Any:
        with no_new_memory(device):
            return call(*args)

    return watched


def test_prefetched_states_leave_their_memory(small: None) -> None:
    """A state fills the memory of prefetched ones. The next finds it free after a load, a drop or a newer state."""
    tier, pages = make_tier("cpu"), list(range(6))
    for tokens, end in enumerate(["load", "drop", "store"] * 4, 20):
        assert tier.store(1, tokens, NO_HISTORY, pages, 0) and tier.prefetch(1) and tier.prefetched(1)
        assert not tier.prefetch(1)
        if end == "load":
            onload = tier.load([Load(1, 0, pages)])
            assert not tier.prefetched(1) and not tier.prefetch(1)  # the load still reads it
            onload.all_layers()
            assert tier.prefetch(1)
        if end != "store":
            tier.drop(1)
    tier.load([Load(1, 0, pages)])  # of a batch that failed
    assert not tier.prefetch(1)
    tier.load([Load(1, 0, pages)])
    assert tier.prefetch(1)


def test_the_tier_begins_with_copies_of_few_pages_and_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels differ with the number of rows, and the first of each kind must not wait for a request."""
    copied: dict[str, set[int]] = {"aten::index_select.out": set(), "aten::index_copy_": set()}

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.name() in copied:
                copied[func.name()].add(len(args[2]))
            return func(*args, **(kwargs or {}))

    pool = make_pool("cpu", pages=50)
    for x in (pool.all_k, pool.all_v):
        x.copy_(torch.randn_like(x))
    before = pool.all_k.clone(), pool.all_v.clone()
    with Rows():
        tier = HostTier(pool, 40 * pool.page_bytes)
    assert copied["aten::index_copy_"] == {1, 2, 4, 8, 16, 32}
    assert copied["aten::index_select.out"] == {LAYERS * n for n in copied["aten::index_copy_"]}
    assert torch.equal(pool.all_k, before[0]) and torch.equal(pool.all_v, before[1])
    assert (tier.bytes_down, tier.used, tier.extents.available) == (0, 0, 40)
