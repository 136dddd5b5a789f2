"""The storage tier: answers from the disk, what survives a kill, bytes that are lost, folders and disks that fail."""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import shutil
import threading
import time
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.forks import Fork
from helpers.hstu_oracle import make_requests

from grengines.api import Catalogue, RankResult, Request, Setup, Tier
from grengines.cache import storage
from grengines.cache.config import PagedCacheConfig
from grengines.cache.events import EventLog
from grengines.cache.guarded_policy import GuardedPolicy
from grengines.cache.history import History
from grengines.cache.host import HostState, HostTier
from grengines.cache.index import StateIndex
from grengines.cache.policies import LRU
from grengines.cache.pool import PagePool
from grengines.cache.storage import ReadError, StorageTier
from grengines.cache.storage_file import BLOCK, Folder, RowFile, Rows, disk_of
from grengines.cache.storage_offload import StorageOffloader
from grengines.hstu.config import HSTUEngineConfig
from grengines.hstu.engine import HSTUEngine
from grengines.hstu.load_costs import together
from grengines.models.hstu.config import HSTUConfig
from grkernels.choice import requested
from grkernels.hstu_attention import fp8

CATALOGUE = Catalogue(num_users=30, num_items=400, num_actions=4)
MODEL = HSTUConfig(embedding_dim=32, layers=3, heads=2, qk_dim=16, v_dim=16, scaling_seqlen=128)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
USERS = 5


def returning() -> list[Request]:
    """One request of each user, with histories of 60 events and more."""
    made = make_requests(np.random.default_rng(0), CATALOGUE, [60 + 3 * i for i in range(USERS)], [6] * USERS)
    return [dataclasses.replace(request, user_id=i, arrival_s=float(i)) for i, request in enumerate(made)]


def started(
    device: str = "cpu",
    *,
    seed: int = 0,
    precision: str = "fp32",
    pages: str = "engine",
    attention: str = "torch",
    **cache: Any,
) -> HSTUEngine:
    """An engine whose pages are stored as `pages` says. attention: the kernel variant."""
    options: dict[str, Any] = {"page": 16, "memory_gb": 0.01, "host_gb": 0.01, "storage_gb": 0.01, "onload_share": 1.0}
    config = PagedCacheConfig(**(options | {"host_admit_visit": 1, "precision": pages} | cache))
    setup = Setup(MODEL, requested("torch", {"hstu_attention": attention}), CATALOGUE, seed, config)
    engine = HSTUEngine(HSTUEngineConfig(device=device, precision=precision), setup)
    engine.prepare(returning(), USERS)
    return engine


def error(result: RankResult, expected: RankResult) -> float:
    ours, theirs = np.concatenate(result.scores), np.concatenate(expected.scores)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def tier_of(engine: HSTUEngine) -> StorageTier:
    assert engine.user_cache is not None and engine.user_cache.states.storage is not None
    return engine.user_cache.states.storage


def row_of(tier: StorageTier, user: int, page: int, layer: int = 0) -> tuple[int, Rows]:
    """The row of a page in the file, and memory for it that the disk can read into."""
    pages = [i for begin, n in tier.states[user].extents for i in range(begin, begin + n)]
    return layer * tier.pages + pages[page], tier.rows[0][-1:]  # the last page of the reserve, which is free


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["engine", "int8", "fp8"])
def test_answers_from_the_disk_are_those_from_the_device(
    device: str, share: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded whole they are equal; of half a state the rest is computed again, and rounded in another order."""
    engine, requests = started(device, precision="bf16", onload_share=share, pages=kind), returning()
    engine.rank(requests)
    expected = engine.rank(requests)
    assert expected.details["cache_hits"] == USERS and expected.cached[0].from_storage == 0
    allowed = 0.0 if device == "cpu" and share == 1 else 0.02 if kind == "engine" else 0.1
    for ahead in (False, True):
        engine.reset_cache(keep=Tier.STORAGE)
        assert [engine.tier_of(user) for user in range(USERS)] == [Tier.STORAGE] * USERS
        if ahead:
            engine.prefetch(range(USERS))
        found = engine.rank(requests)
        assert error(found, expected) <= allowed
        assert found.details["cache_storage_hits"] == USERS and not found.details["cache_host_hits"]
        assert [c.from_storage == int(share * c.of) // 16 * 16 or share == 1 for c in found.cached] == [True] * USERS
        assert found.details["cache_storage_tokens"] == sum(c.tokens for c in found.cached)
        assert (found.details["cache_prefetches"], found.details["cache_faults"]) == (0, 0)
    assert engine.actual()["cache_storage_gb_s"] > 0 and engine.actual()["cache_storage_disk"]
    monkeypatch.setattr(storage.zlib, "crc32", lambda row: 0)
    monkeypatch.setattr(RowFile, "read", lambda self, row, into: into.fill(0))
    engine.reset_cache(keep=Tier.STORAGE)
    for state in tier_of(engine).states.values():
        state.sums[:] = 0
    assert error(engine.rank(requests), expected) > 2 * max(allowed, 0.01)  # what zeros would do
    engine.close()


def test_a_changed_byte_is_noticed_and_its_user_computed_again() -> None:
    engine, requests = started(), returning()
    expected = engine.rank(requests)
    engine.reset_cache(keep=Tier.STORAGE)
    tier = tier_of(engine)
    for user, page, layer in ((1, 2, 2), (3, 0, 0), (3, 1, 0)):
        row, memory = row_of(tier, user, page, layer)
        tier.file.read(row, memory)
        memory[0, 7] ^= 64
        tier.file.write(row, memory)
    found = engine.rank(requests)
    assert error(found, expected) < 1e-6
    assert [c.from_storage > 0 for c in found.cached] == [True, False, True, False, True]
    details = found.details
    assert (details["cache_corrupt_pages"], details["cache_storage_hits"], details["cache_misses"]) == (3, 3, USERS)
    assert details["cache_faults"] == details["cache_storage_off"] == 0
    assert engine.rank(requests).details["cache_hits"] == USERS  # what was computed again is cached
    engine.close()


@pytest.mark.parametrize("fails", ["read", "write"])
def test_a_disk_that_fails_switches_the_tier_off_and_answers_are_right(fails: str, tmp_path: Path) -> None:
    engine, requests = started(storage_path=str(tmp_path)), returning()
    expected = engine.rank(requests)
    tier = tier_of(engine)
    if fails == "read":
        engine.reset_cache(keep=Tier.STORAGE)
        os.truncate(tier.folder / "pages", 0)
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK, limits[1]))  # every write behind it is an error
        try:
            engine.reset_cache(keep=Tier.STORAGE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for _ in range(2):
        found = engine.rank(requests)
        assert error(found, expected) < 1e-6 and found.details["cache_storage_off"] == 1
        assert found.details["cache_faults"] == found.details["cache_storage_hits"] == 0
        engine.reset_cache()
    engine.close()


def test_states_that_are_kept_serve_the_same_model_and_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variant = fp8.VARIANT  # a CPU has no such kernel, but the same rounding
    assert variant.yardstick is not None
    emulated = dataclasses.replace(variant, fn=variant.yardstick, supports=lambda **_: None)
    monkeypatch.setattr(fp8, "VARIANT", emulated)
    bf16 = partial(started, precision="bf16", storage_path=str(tmp_path))
    first, requests = bf16(), returning()
    first.rank(requests)
    expected = first.rank(requests)  # from the device
    with pytest.raises(ValueError, match=r"another run uses .*; give each a folder of its own"):
        bf16()
    first.reset_cache(keep=Tier.STORAGE)
    first.close()

    again = bf16()
    assert again.actual()["cache_storage_found"] == USERS and again.actual()["notes"]
    again.reset_cache()  # as before a measurement
    found = again.rank(requests)
    assert found.details["cache_storage_hits"] == USERS and error(found, expected) < 1e-6
    again.close()
    for other in (
        *({"seed": 1}, {"page": 32}, {"pages": "int8"}),
        *({"precision": "fp32"}, {"precision": "fp8"}),
        *([{"attention": "fp8"}] if find_spec("cutlass") else []),
    ):
        engine = bf16(**other)
        assert engine.actual()["cache_storage_found"] == 0
        assert engine.rank(requests).details["cache_storage_hits"] == 0
        engine.close()
    with pytest.raises(ValueError, match=r"was made for \d+ pages, and this run asks for \d+; set"):
        bf16(storage_gb=0.02)


def test_folders_and_sizes_that_cannot_be_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for cache, words in (
        ({"storage_path": str(tmp_path / "file")}, r"storage_path=.*file: it can't be written to \(Not a directory\)"),
        ({"storage_gb": 1e9}, r"storage_gb=1e\+09: .* has [\d.]+ GB free; lower it, or name a folder on another disk"),
        ({"storage_gb": 1e-6}, "storage_gb: a page takes 12288 bytes, the budget has 1000; raise it"),
    ):
        with pytest.raises(ValueError, match=words) as refused:
            started(**cache)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="lower it"):
        started(storage_path=str(tmp_path), storage_gb=1e9)
    started(storage_path=str(tmp_path)).close()  # lowered, in the same folder


@pytest.mark.parametrize("from_byte", [0, 2 * 4096])  # all of it, or what is behind the tables' names and the size
def test_a_damaged_index_is_refused_and_its_folder_is_free(from_byte: int, tmp_path: Path) -> None:
    tier = disk(tmp_path)
    put(tier, 0, 0, 3)
    tier.close()
    index = tier.folder / "index.sqlite"
    damaged = index.read_bytes()
    index.write_bytes(damaged[:from_byte] + b"?" * (len(damaged) - from_byte))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"has no readable index \(.*\); remove it"):
            disk(tmp_path)
    shutil.rmtree(tier.folder)
    disk(tmp_path).close()


def test_a_temporary_folder_is_removed() -> None:
    engine = started()
    folder = tier_of(engine).folder
    assert folder.is_dir() and not (folder / "pages").exists()  # its room is free even after a kill
    engine.close()
    assert not folder.exists()


def small_pool() -> PagePool:
    """A pool of one page, which takes 4096 bytes in each layer."""
    return PagePool(layers=2, pages=1, page=4, heads=1, qk_dim=128, v_dim=128, dtype=torch.float32, device="cpu")


def disk(path: Path) -> StorageTier:
    """A storage tier of 40 pages, whose pages are one block in each of two layers."""
    pool = small_pool()
    return StorageTier(HostTier(pool, 20 * pool.page_bytes, 20), 40 * 2 * BLOCK, str(path), "key")


def content(user: int, birth: int, page: int, layer: int) -> int:
    return (user * 7919 + birth * 104729 + page * 31 + layer) % 251


def put(tier: StorageTier, user: int, birth: int, pages: int) -> bool:
    """Send a state to the disk, as if the host evicted it. One of an earlier `birth` is replaced, else it grows."""
    old = tier.states.get(user)
    same = min(old.tokens, 4 * pages) if old is not None and old.history.items[0] == birth else 0
    while tier.lacking(user, pages):
        tier.drop(next(other for other in tier.states if other != user))
    state = on_host(tier, user, birth, pages)
    if tier.store(user, state, same):
        return True
    tier.host.extents.free(state.extents)
    return False


def on_host(tier: StorageTier, user: int, birth: int, pages: int) -> HostState:
    """A state in the host's memory."""
    places = tier.host.extents.allocate(pages)
    for page, place in enumerate(i for begin, n in places for i in range(begin, begin + n)):
        for layer, rows in enumerate(tier.rows):
            rows[place] = content(user, birth, page, layer)
    events = np.full(4 * pages, birth)
    return HostState(4 * pages, History(events, events, events, events), places, None, 0.0)


def write_for_ever(folder: Path, says: int) -> None:
    """Write states that grow, are replaced and are dropped."""
    tier = disk(folder)
    for step in count():
        if not put(tier, step % 9, step // 27, 1 + step // 9 % 3 * 3):
            tier.finish_writes()
        if step == 12:
            os.write(says, b"!")


def test_after_a_kill_a_state_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """A process that writes states is killed at any moment, again and again."""
    rng, found = random.Random(0), 0
    for _ in range(12):
        begun, says = os.pipe()
        child = Fork(partial(write_for_ever, tmp_path, says), tmp_path / "log", [says])
        os.close(says)
        assert os.read(begun, 1) == b"!", (tmp_path / "log").read_text()
        os.close(begun)
        time.sleep(rng.random() * 0.05)
        child.kill()
        child.wait()
        tier = disk(tmp_path)
        assert sum(n for state in tier.states.values() for _, n in state.extents) + tier.extents.available == 40
        for user, state in tier.states.items():
            pages = state.tokens // 4
            reading = tier.read(user, 0, pages)
            assert reading is not None
            for layer, rows in enumerate(tier.rows):
                reading.wait(layer)
                there = [rows[i] for begin, n in reading.extents for i in range(begin, begin + n)]
                birth = int(state.history.items[0])
                assert all((row == content(user, birth, page, layer)).all() for page, row in enumerate(there))
            tier.end(reading)
            found += 1
        tier.close()
    assert found > 12


def test_the_disk_takes_no_more_than_its_memory_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While the disk is slow, states are refused, what was read ahead gives way, and nothing is lost."""
    tier = disk(tmp_path)
    assert put(tier, 0, 0, 8) and put(tier, 1, 0, 8)
    tier.finish_writes()
    assert tier.read_ahead(0) and not tier.read_ahead(1)  # half of the 20 pages at most
    write, may_go_on = RowFile.write, threading.Event()
    monkeypatch.setattr(RowFile, "write", lambda *args: (may_go_on.wait(30), write(*args)))
    assert put(tier, 2, 0, 12)
    reading = tier.reads[0]
    [layer.result() for layer in reading.layers]
    assert not put(tier, 3, 0, 1) and 3 not in tier.states
    again = tier.read(1, 0, 8)  # in the memory of user 0, which nobody asked for
    assert again is not None and not tier.ahead and reading.ended
    [again.wait(layer) for layer in range(2)]
    tier.end(again)
    may_go_on.set()
    tier.finish_writes()
    assert tier.room() == tier.host.reserve and tier.host.extents.available == 40
    tier.close()


def test_a_state_that_is_refused_drops_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tier, log, index = disk(tmp_path), EventLog(), StateIndex(small_pool(), 0)
    below = StorageOffloader(tier, GuardedPolicy(LRU(), lambda tokens: (tokens, 1.0), log), index, log)
    for user in range(3):
        below.take(user, on_host(tier, user, 0, 13))  # 39 of the 40 pages
        tier.finish_writes()
    write, may_go_on = RowFile.write, threading.Event()
    monkeypatch.setattr(RowFile, "write", lambda *args: (may_go_on.wait(30), write(*args)))
    below.take(3, on_host(tier, 3, 0, 13))
    assert list(tier.states) == [1, 2, 3]
    below.take(4, on_host(tier, 4, 0, 13))  # its 13 pages and those on their way are more than 20
    assert list(tier.states) == [1, 2, 3] and tier.host.extents.available == 40 - 13
    below.take(2, on_host(tier, 2, 0, 13))  # which the disk has
    may_go_on.set()
    tier.finish_writes()
    below.take(4, on_host(tier, 4, 0, 13))
    assert list(tier.states) == [2, 3, 4]
    assert (log.counters.storage_taken, log.counters.storage_refused, log.counters.policy_errors) == (6, 1, 0)
    tier.close()


def test_a_file_that_is_kept_outlives_a_failure_and_only_a_full_disk_is_called_full(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path), "key")
    pages, too_large = folder.path / "pages", 10**12
    with pytest.raises(ValueError, match=r"GB free; lower it"):
        RowFile(folder, too_large, BLOCK)
    assert not pages.exists()
    RowFile(folder, 2, BLOCK).close()
    with pytest.raises(ValueError, match=r"GB free; lower it"):
        RowFile(folder, too_large, BLOCK)
    assert pages.stat().st_size == 2 * BLOCK
    pages.unlink()
    for make, remove, words in (
        (pages.mkdir, pages.rmdir, "Is a directory"),
        (partial(os.mkfifo, pages), pages.unlink, "Illegal seek"),
    ):
        make()
        with pytest.raises(ValueError, match=rf"pages can't be used \({words}\); remove it, or name another folder"):
            RowFile(folder, 2, BLOCK)
        assert pages.exists()
        remove()
    folder.close()


def test_a_lost_page_of_a_state_that_is_read_ahead_is_noticed(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    put(tier, 0, 0, 3)
    tier.finish_writes()
    row, memory = row_of(tier, 0, 1, 1)
    memory[:] = 1
    tier.file.write(row, memory)
    assert tier.read_ahead(0)
    reading = tier.read(0, 1, 2)
    assert reading is not None
    reading.wait(0)
    with pytest.raises(ReadError, match="1 pages of user 0 are not as they were written"):
        reading.wait(1)
    tier.close()


@pytest.mark.parametrize("there", [[0, 900], [900, 0], [300, 500], [50, 900], [900, 50], [10, 10]])
def test_loading_from_both_tiers_and_computing_end_together(there: list[int]) -> None:
    computed, rates = 100.0, [400.0, 50.0]  # tokens/s
    took = together(1000.0, computed, there, rates)
    loaded = [min(took * rate, n) for n, rate in zip(there, rates, strict=True)]
    assert took * computed + sum(loaded) == pytest.approx(1000.0)


def test_the_disk_is_named() -> None:
    assert " on " in disk_of(Path.cwd()) and disk_of(Path("/proc/self")).startswith("proc on")


def test_a_folder_is_free_once_it_is_closed(tmp_path: Path) -> None:
    for _ in range(2):
        folder = Folder(str(tmp_path), "key")
        with pytest.raises(ValueError, match="another run uses"):
            Folder(str(tmp_path), "key")
        Folder(str(tmp_path), "another").close()
        folder.close()
