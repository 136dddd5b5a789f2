"""The base classes of engines: what every engine does alike, seen on one that computes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.hstu_oracle import make_requests

from grengines.api import Catalogue, RankResult, Request, Setup, UnavailableError
from grengines.base import RankingEngine, placement_of
from grengines.cache.config import CacheConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.options import DeviceOptions
from grengines.runtime.device import CPU, Placement

CATALOGUE = Catalogue(num_users=3, num_items=20, num_actions=2)
SETUP = Setup(HSTUConfig(), {}, CATALOGUE, 7, CacheConfig())
REQUESTS = make_requests(np.random.default_rng(0), CATALOGUE, [3, 0, 9], [2, 2, 2])


class Idle(RankingEngine):
    """Returns zeros, and notes the calls that the base class makes."""

    name = "idle"

    def __init__(self, cpu_threads: int = 0, cuda_graphs: bool = False) -> None:
        super().__init__(SETUP, Placement(CPU, "fp32", cpu_threads), cuda_graphs=cuda_graphs)
        self.calls: list[str] = []
        self.model: object | None = None

    def _load(self, sample: Sequence[Request], max_batch: int) -> None:
        self.calls.append(f"load on {torch.get_num_threads()} threads")
        self.model = object()

    def _warm_up(self, sample: Sequence[Request], max_batch: int) -> None:
        self.rank(self._largest(sample, max_batch))

    def rank(self, requests: Sequence[Request]) -> RankResult:
        self._ready(self.model)
        self._check_size(requests)
        self.calls.append(f"rank {[len(r.history_items) for r in requests]}")
        scores = [np.zeros((len(r.candidates), 3), np.float32) for r in requests]
        return RankResult(scores=scores, batch_ms=0, transfer_ms=0, compute_ms=0, tokens=0, padded_tokens=0)

    def _describe(self) -> dict[str, Any]:
        return {"timer": "none", "calls": len(self.calls)}

    def _unload(self) -> None:
        self.calls.append("unload")
        self.model = None


class Queueing(Idle):
    """Queues batches as on a GPU, and spends 14 ms of each in no part."""

    def __init__(self) -> None:
        super().__init__()
        self._cuda = True

    def queue(self, error: Exception | None = None) -> Callable[[], RankResult]:
        """Queue a batch, or fail to. Returns the function that waits for its end."""

        def queued() -> RankResult:
            time.sleep(0.02)
            return RankResult(scores=[], batch_ms=1, transfer_ms=2, compute_ms=3, tokens=0, padded_tokens=0)

        begun = time.perf_counter()
        with self._turns as turn:
            if error:
                raise error
        return lambda: self._ended(queued, begun, turn)


@pytest.mark.parametrize("behind", [False, True])
def test_time_in_no_part_is_a_wait_only_behind_another_batch(behind: bool) -> None:
    engine = Queueing()
    first = engine.queue() if behind else None  # not ended
    assert (engine.queue()().wait_ms >= 14) == behind
    with pytest.raises(RuntimeError):
        engine.queue(RuntimeError("it cannot be queued"))
    if first:
        first()
    assert engine.queue()().wait_ms < 14  # no batch is left before it


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """The number of threads that the process had before, which is its number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_an_engine_is_loaded_then_warmed_up_with_the_largest_requests() -> None:
    engine = Idle()
    engine.prepare(REQUESTS, 2)
    assert engine.calls == ["load on 3 threads", "rank [3, 9]"]


def test_threads_are_set_and_restored_once() -> None:
    engine = Idle(cpu_threads=2)
    assert torch.get_num_threads() == 3
    engine.prepare(REQUESTS, 2)
    assert torch.get_num_threads() == 2
    engine.close()
    assert torch.get_num_threads() == 3
    torch.set_num_threads(4)  # somebody else's from here on
    engine.close()
    assert torch.get_num_threads() == 4
    engine.prepare(REQUESTS, 2)  # again
    assert engine.calls[-2:] == ["load on 2 threads", "rank [3, 9]"]
    engine.close()
    assert torch.get_num_threads() == 4


def test_wrong_use_is_refused() -> None:
    engine = Idle()
    with pytest.raises(RuntimeError, match=r"not prepared, or closed; call prepare\(\) first"):
        engine.rank(REQUESTS)
    for sample, most in (([], 2), (REQUESTS, 0)):
        with pytest.raises(
            ValueError, match=rf"{len(sample)} sample requests, max_batch={most}: both must be at least 1"
        ):
            engine.prepare(sample, most)
    assert engine.calls == []
    engine.prepare(REQUESTS, 2)
    for batch in ([], REQUESTS):
        with pytest.raises(ValueError, match=rf"{len(batch)} requests in one batch; allowed is 1 to max_batch=2"):
            engine.rank(batch)
    engine.close()
    with pytest.raises(RuntimeError, match="not prepared, or closed"):
        engine.rank(REQUESTS[:1])
    with pytest.raises(UnavailableError, match=r"engine\.cuda_graphs=true: a CPU has no CUDA graphs; set"):
        Idle(cuda_graphs=True)


def test_common_facts_are_there_and_an_engines_own_win() -> None:
    facts = Idle().actual()
    assert (facts["engine"], facts["task"], facts["device"], facts["precision"]) == ("idle", "rank", "cpu", "fp32")
    assert facts["weights"] == "random, seed 7" and facts["torch"] == torch.__version__ and facts["cuda"] is None
    assert (facts["timer"], facts["cpu_threads"]) == ("none", 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_placement_resolves_auto_and_refuses_a_missing_gpu() -> None:
    assert placement_of(DeviceOptions("hstu", cpu_threads=2)) == Placement(CPU, "fp32", 2)
    assert placement_of(DeviceOptions("hstu", device="cpu", precision="bf16")).precision == "bf16"
    with pytest.raises(UnavailableError, match=r"engine\.device=cuda: .*; use engine\.device=cpu"):
        placement_of(DeviceOptions(device="cuda"))
