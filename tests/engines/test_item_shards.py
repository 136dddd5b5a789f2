"""The item table over devices: what is gathered is the table, whatever was evicted, and the gate passes with it.

A CPU stands for all devices. Tests marked gpu run the same on two GPUs.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError
from grbench.execution import engines
from grbench.execution.ranks import notes_of
from grbench.gate import gate_for
from grengines.api import UnavailableError
from grengines.cache import item_shards, items
from grengines.cache.item_shards import ItemShards
from grengines.numerics import IncorrectError
from grengines.runtime.team import device_of
from grkernels import parts_triton, triton_launch
from grkernels.parts import Parts

CPU = torch.device("cpu")
SMALL = [
    *("model=hstu_tiny", "kernel=torch", "workload=synthetic", "workload.max_requests=40", "workload.max_history=48"),
    *("workload.items=500", "workload.num_candidates=6", "gate.measured=8", "engine=hstu", "engine.precision=fp32"),
]
CELLS = {
    "uncached": [],
    "cache": ["cache=lru", "cache.memory_gb=0.02"],
    "micro": ["engine.candidate_microbatch=2"],
    "stu": ["model.variant=stu"],  # its head reads item vectors too
}
HOT = "cache.item_memory_gb=1e-4"  # fewer rows than the trace has


def on_two_gpus(*more: Any) -> Any:
    """Return the parameters of a test on two GPUs."""
    needed = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    return pytest.param("cuda", *more, marks=[pytest.mark.gpu, needed])


def table(rows: int, width: int = 8) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


def gathered(shards: ItemShards, rows: np.ndarray[Any, Any]) -> Tensor:
    """Return what a batch of two parts with these rows gathers."""
    halves = [rows[: len(rows) // 2].copy(), rows[len(rows) // 2 :].copy()]
    shards.place(halves)
    placed = torch.from_numpy(np.concatenate(halves))
    return shards.table.gather(placed.to(shards.table.device))


# The gather


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 24, 600])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_row_is_gathered_from_its_part(parts: int, width: int, dtype: torch.dtype) -> None:
    whole, length = table(101, width).to(dtype), -(-101 // parts)
    split = Parts(whole.split(length), length, CPU)
    rows = torch.randint(0, 101, (77,), generator=torch.Generator().manual_seed(1))
    for one in (rows, rows[:1], rows[:0], torch.tensor([0, length - 1, length % 101, 100])):
        assert torch.equal(split.gather(one), whole[one])
        if triton_launch.INTERPRETED:
            out = torch.full((len(one), width), 7, dtype=dtype)
            parts_triton.gather(split.addresses, one, length, out=out)
            assert torch.equal(out, whole[one])


def test_rows_that_are_not_aligned_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of 12 bytes at .*: allowed are multiples of 16"):
        Parts([torch.zeros(3, 6, dtype=torch.float16)], 3, CPU)
    with pytest.raises(ValueError, match="rows of 16 bytes at"):
        Parts([torch.zeros(33)[1:].view(8, 4)], 8, CPU)


@pytest.mark.parametrize("device", [on_two_gpus()])
def test_gpus_and_locked_memory_are_read(device: str) -> None:
    """One table over two GPUs and the host, read by either GPU, in a CUDA graph too."""
    gpus, whole = [torch.device(device, i) for i in range(2)], table(3000, 512).half()
    assert item_shards.let_read(gpus[0], gpus[1]) is item_shards.let_read(gpus[1], gpus[0]) is None
    held = [whole[:1000].to(gpus[0]), whole[1000:2000].to(gpus[1]), whole[2000:].pin_memory()]
    rows = torch.randint(0, 3000, (5000,), generator=torch.Generator().manual_seed(1))
    for gpu in gpus:
        with torch.cuda.device(gpu):
            split, there = Parts(held, 1000, gpu), rows.to(gpu)
            assert torch.equal(split.gather(there).cpu(), whole[rows])
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, stream=torch.cuda.Stream(gpu)
            ):  # its own stream is of the first GPU that captured
                found = split.gather(there)
            there.copy_(rows.flip(0))
            graph.replay()
            assert torch.equal(found.cpu(), whole[rows.flip(0)])


# Lookups


@pytest.mark.parametrize("device", ["cpu", on_two_gpus()])
@pytest.mark.parametrize("parts", [1, 2])
def test_hot_rows_of_each_device_are_those_of_the_table(
    parts: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items, "STAGING_BYTES", 256)  # several copies a lookup
    whole, rng = table(501), np.random.default_rng(0)
    devices = [device_of(torch.device(device), i) for i in range(parts)]
    with torch.inference_mode():  # as engines build it; lookups are on threads of their own
        shards = ItemShards(whole, devices, torch.float32, 60 * 32)
    assert shards.slots == 60 * parts and shards.actual()["item_shard_bytes"] == [60 * 32] * parts
    batches = [(501 * rng.random(50) ** 4).astype(np.int64) for _ in range(100)]
    with torch.inference_mode():
        found = [gathered(shards, rows) for rows in batches]  # on a GPU no lookup waits for the gather before it
    assert all(torch.equal(x.cpu(), whole[torch.from_numpy(rows)]) for x, rows in zip(found, batches, strict=True))
    counted = shards.counters
    assert counted.tokens == 5000 and counted.distinct == sum(len(set(rows)) for rows in batches)
    assert counted.evictions > 100 and counted.hits + counted.misses == counted.distinct


@pytest.mark.parametrize("device", [on_two_gpus()])
def test_rows_are_not_replaced_while_a_batch_reads_them(device: str) -> None:
    whole = table(4000, 512).half()
    shards = ItemShards(whole, [torch.device(device, i) for i in range(2)], torch.float16, 1000 * 1024)
    batches = [np.arange(begin, 4000, 4) for begin in range(4)] * 3  # each replaces all rows of the one before
    gathered(shards, batches[-1])
    busy, found = torch.ones(8192, 8192, dtype=torch.float16, device=device), list[Tensor]()
    for rows in batches:
        for _ in range(5):  # some 10 ms, in which the copies of the next lookup come to the other GPU
            torch.mm(busy, busy)
        found.append(gathered(shards, rows))
    assert all(torch.equal(x.cpu(), whole[torch.from_numpy(rows)]) for x, rows in zip(found, batches, strict=True))


def test_a_part_without_rows_of_its_own_and_an_error_change_no_batch() -> None:
    whole = table(40)
    shards = ItemShards(whole, [CPU] * 2, torch.float32, 8 * 32)
    for rows in (np.arange(3), np.arange(37, 40), np.arange(0)):
        assert torch.equal(gathered(shards, rows), whole[torch.from_numpy(rows)])
    for rows, error in (
        (np.array([3, 40]), IndexError),
        (np.array([-1, 3]), IndexError),
        (np.arange(20), RuntimeError),
    ):
        batch = rows.copy()
        with pytest.raises(error):
            shards.place([batch])
        assert np.array_equal(batch, rows)
    assert torch.equal(gathered(shards, np.arange(5)), whole[:5])


def test_threads_are_there_for_hot_rows_and_end_with_the_table() -> None:
    def threads() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name.startswith("item-shard")}

    before, rows = threads(), np.arange(5)
    whole, hot = (ItemShards(table(40), [CPU] * 2, torch.float32, memory) for memory in (0, 8 * 32))
    assert torch.equal(gathered(whole, rows), table(40)[:5]) and not threads() - before
    assert torch.equal(gathered(hot, rows), table(40)[:5]) and threads() - before
    for shards in (whole, hot):
        shards.close()
    assert not threads() - before


def test_few_rows_have_fewer_parts() -> None:
    shards = ItemShards(table(5), [CPU] * 4, torch.float32, 0)
    assert shards.actual() == {"item_shards": 3, "item_shard_bytes": [64, 64, 32]} and shards.slots == 0
    assert torch.equal(gathered(shards, np.arange(5)), table(5))


def test_a_gpu_that_can_not_read_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_shards, "let_read", lambda reader, owner: "cuda:0 can't read the memory of cuda:1")
    with pytest.raises(UnavailableError, match=r"engine\.item_shards=2: cuda:0 can't read"):
        ItemShards(table(5), [CPU] * 2, torch.float32, 0)


# In the engine


def gated(overrides: list[str], device: str) -> tuple[Any, Any]:
    """Return a prepared engine and its gate."""
    spec = compose_spec([*SMALL, f"engine.device={device}", *overrides])[0]
    trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
    engine = engines.build(spec, trace.catalogue, None)
    engine.prepare(trace.requests, 4)
    return engine, gate_for(spec, trace, None, engine.actual())


@pytest.mark.parametrize(("device", "graphs"), [("cpu", "auto"), on_two_gpus("false"), on_two_gpus("true")])
@pytest.mark.parametrize("more", [[], [HOT]], ids=["whole", "hot"])
@pytest.mark.parametrize("cell", CELLS)
def test_answers_are_those_of_the_whole_table(cell: str, more: list[str], device: str, graphs: str) -> None:
    if graphs == "true" and cell == "micro":
        pytest.skip("graphs have one pass")
    words = [*CELLS[cell], f"engine.cuda_graphs={graphs}"]
    one, gate = gated(words, device)
    two, _ = gated([*words, *more, "engine.item_shards=2"], device)
    requests = gate.sample
    for _ in range(2):  # with a cache, the second time from pages
        # Both, because what is cached is computed in another order than what is not.
        assert all(gate.check(engine, 4).to_dict()["passed"] for engine in (one, two))
        answers = [np.concatenate(engine.rank(requests[:4]).scores) for engine in (one, two)]
        assert np.array_equal(*answers)
    facts = two.actual()
    assert facts["item_shards"] == len(facts["item_shard_bytes"]) == 2
    assert facts["parameters"] == one.actual()["parameters"] and "item_shards" not in one.actual()
    if device == "cpu":
        assert "engine.item_shards=2 on a CPU only checks answers" in notes_of(facts)[0]
    if more:
        assert facts["item_slots"] and two.rank(requests[:4]).details["items_tokens"] > 0
    one.close()
    two.close()


def test_an_engine_closes_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = list[ItemShards]()
    monkeypatch.setattr(ItemShards, "close", lambda self: closed.append(self))
    engine, _ = gated([HOT, "engine.item_shards=2"], "cpu")
    engine.close()
    assert len(closed) == 1


@pytest.mark.parametrize("more", [[], [HOT]], ids=["whole", "hot"])
def test_a_row_of_another_part_fails_the_gate(more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    gather = Parts.gather
    monkeypatch.setattr(Parts, "gather", lambda self, rows: gather(self, rows % self.length))
    engine, gate = gated([*more, "engine.item_shards=2"], "cpu")
    with pytest.raises(IncorrectError):
        gate.check(engine, 4)
    engine.close()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.tensor_parallel=2"], "each rank has all item vectors; set one of them to 1"),
        (["task=generate"], "a search reads its token table as a matrix; set it to 1"),
        (["model.item_tower=table"], "only the token table is shared; set engine.item_shards=1"),
        (["model.embedding_dim=30"], "allowed are multiples of 8; set engine.item_shards=1"),
    ],
)
def test_what_needs_the_whole_table_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.item_shards=2.*{words}"):
        compose_spec([*SMALL, "engine.item_shards=2", *overrides])
