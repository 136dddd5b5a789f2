"""Users' keys and values in 8 bits: the native engine, its tiers and its gate, and states that are wrong."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gated import built, run_cell
from helpers.hstu_oracle import make_requests

from grbench.cachesim.config import CacheSimConfig
from grbench.cachesim.replay import Replay
from grbench.config.compose import compose_spec
from grbench.execution.records import Outcome
from grbench.tools.sizing import kv_bytes
from grbench.workloads.config import SyntheticConfig
from grengines.api import Catalogue, Request, Setup, Tier
from grengines.cache import host
from grengines.cache.config import EIGHT_BITS, PagedCacheConfig
from grengines.cache.host import HostTier
from grengines.cache.pool import PagePool, page_bytes
from grengines.hstu.config import HSTUEngineConfig
from grengines.hstu.engine import HSTUEngine
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.reference import RankingReference
from grengines.numerics import IncorrectError, relative_error
from grkernels import pages
from grkernels.choice import requested

BASE = [
    "model=hstu_tiny",
    "engine=hstu",
    "workload=synthetic",
    "workload.max_requests=96",
    "workload.max_history=200",
    "workload.history_median=100",
    "workload.revisit_rate=0.8",
    "workload.num_candidates=8",
    "scenario=closed_loop",
    "scenario.clients=1",
    "scenario.max_batch=8",
    "scenario.queries=96",
    "gate.measured=32",
    "warmup_batches=0",
    "cache=lru",
]
ON_CPU = [*BASE, "engine.device=cpu", "engine.cpu_threads=1"]
KINDS = list(EIGHT_BITS)
CATALOGUE = Catalogue(num_users=30, num_items=400, num_actions=4)
MODEL = HSTUConfig(embedding_dim=32, layers=2, heads=2, qk_dim=16, v_dim=8, scaling_seqlen=128)
USERS = make_requests(np.random.default_rng(0), CATALOGUE, [60] * 3, [6] * 3)
HISTORY = [f for f in Request.__dataclass_fields__ if f.startswith("history_")]


def visit(user: int, events: int) -> Request:
    """A request of a user who has had the first `events` events."""
    request = USERS[user]
    return dataclasses.replace(request, user_id=user, **{f: getattr(request, f)[:events] for f in HISTORY})


@pytest.fixture
def cell(tmp_path: Path) -> Callable[[list[str]], Outcome]:
    return partial(run_cell, tmp_path)


def small_tiers(overrides: list[str], kind: str) -> tuple[int, list[str]]:
    """Return the bytes of a page of 16 tokens, and options for 40 of them on the device and 2000 on the host."""
    model = compose_spec(overrides)[0].model
    sizes = {"heads": model.heads, "qk_dim": model.qk_dim, "v_dim": model.v_dim, "layers": model.layers}
    page = page_bytes(page=16, dtype=pages.EIGHT_BITS[kind], **sizes)
    tiers = ["cache.page=16", f"cache.memory_gb={40 * page / 1e9}", f"cache.host_gb={2000 * page / 1e9}"]
    return page, [*tiers, "cache.onload_share=1", "cache.host_admit_visit=1"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cell_passes_its_gate_from_either_tier(
    cell: Callable[[list[str]], Outcome], kind: str, precision: str
) -> None:
    """The host serves most visits, and the record says what ran."""
    overrides = [*ON_CPU, f"engine.precision={precision}", f"cache.precision={kind}"]
    page, tiers = small_tiers(overrides, kind)
    outcome = cell([*overrides, *tiers])
    gate, actual = outcome.gate, outcome.actual
    assert (
        0 < max(gate["error"], gate["error_again"], gate["error_from_host"], gate["error_after"]) <= gate["tolerance"]
    )
    assert gate["tolerance"] <= 2 * gate["rounding_error"] and gate["measured"]["passed"]
    assert gate["zero_attention_error"] > 2 * gate["tolerance"]
    assert (actual["cache_precision"], actual["precision"]) == (kind, precision)
    assert (actual["cache_pages"], actual["cache_page_bytes"], actual["cache_host_pages"]) == (40, page, 2000)
    assert outcome.metrics["cache/host_hit_rate"] > 0 and outcome.metrics["engine/cache_faults"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_the_error_is_at_most_twice_that_of_the_emulation(kind: str, kernel: str) -> None:
    """Answers from states that grew by many visits, some of them on the host in between."""
    rounds = [[visit(user, events)] for events in (20, 31, 32, 60) for user in range(3)]
    rounds += [[visit(user, 60)] for user in range(3)]
    reference = RankingReference(MODEL, CATALOGUE, 5, "cpu")
    a_page = page_bytes(layers=MODEL.layers, page=16, heads=2, qk_dim=16, v_dim=8, dtype=pages.EIGHT_BITS[kind])
    memory = {"memory_gb": 9 * a_page / 1e9, "host_gb": 16 * a_page / 1e9}
    cache = PagedCacheConfig("lru", "lru", page=16, precision=kind, onload_share=1.0, **memory)
    names = requested("torch", {"hstu_attention": kernel, "paged_write": kernel})
    engine = HSTUEngine(HSTUEngineConfig(device="cpu", precision="fp32"), Setup(MODEL, names, CATALOGUE, 5, cache))
    engine.prepare([r for requests in rounds for r in requests], 1)
    total: Counter[str] = Counter()
    for requests in rounds:
        result = engine.rank(requests)
        expected = np.concatenate(reference.scores(requests))
        emulated = np.concatenate(reference.scores(requests, stored=kind))
        allowed = 2 * relative_error(emulated, expected)
        assert relative_error(np.concatenate(result.scores), expected) <= allowed
        total.update(result.details)
    assert total["cache_faults"] == 0 and total["cache_hits"] > 0 and total["cache_host_hits"] > 0
    engine.close()


def scaled(pool: PagePool, factor: float) -> None:
    for scales in pool.all_scales:
        scales.mul_(factor)


def shifted(pool: PagePool) -> None:
    """Each page has what another one had."""
    for x in (pool.all_k, pool.all_v, *pool.all_scales):
        words = x.view(torch.uint8) if x.itemsize == 1 else x
        words.copy_(words.roll(1, 1))


WRONG: dict[str, Callable[[PagePool], Any]] = {
    "zeros": lambda pool: [x.view(torch.uint8).zero_() for x in (pool.all_k, pool.all_v)],
    "of other users": shifted,
    "twice the scale": lambda pool: scaled(pool, 2.0),
    "a scale of another token": lambda pool: [x.copy_(x.roll(1, 2)) for x in pool.all_scales],
    "no scale": lambda pool: [x.fill_(1.0) for x in pool.all_scales],
    "no scale of values": lambda pool: pool.all_scales[1].fill_(1.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_states_fail_the_gate(kind: str) -> None:
    _, engine, gate = built([*ON_CPU, "engine.precision=bf16", f"cache.precision={kind}", "cache.memory_gb=0.02"])
    gate.check(engine, 8)
    for name, change in WRONG.items():
        engine.reset_cache()
        gate.check(engine, 8)
        with torch.inference_mode():
            change(engine.user_cache.states.pool)
        with pytest.raises(IncorrectError, match="differ from the fp32 reference"):
            gate.check(engine, 8)
            pytest.fail(name)
    engine.close()


def test_a_host_that_loses_scales_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host tier's copies have the scales behind keys and values: without them the gate fails."""
    _, engine, gate = built(
        [
            *(*ON_CPU, "engine.precision=bf16", "cache.precision=int8", "cache.memory_gb=0.02"),
            *("cache.host_gb=0.02", "cache.onload_share=1", "cache.host_admit_visit=1"),
        ]
    )
    gate.check(engine, 8)
    engine.reset_cache(keep=Tier.HOST)
    gate.check(engine, 8)
    assert engine.user_cache.states.counters().host_hits > 0
    layer = host.Onload.layer

    def without_scales(self: host.Onload, i: int) -> None:
        layer(self, i)
        with torch.inference_mode():
            for scales in self._tier.pool.all_scales:
                scales[i] = 1.0

    monkeypatch.setattr(host.Onload, "layer", without_scales)
    engine.reset_cache(keep=Tier.HOST)
    with pytest.raises(IncorrectError, match="differ from the fp32 reference"):
        gate.check(engine, 8)
    engine.close()


def test_bytes_of_pages_states_and_simulations_agree() -> None:
    sizes = {"layers": 3, "page": 64, "heads": 4, "qk_dim": 128, "v_dim": 64}
    model = HSTUConfig(layers=3, heads=4, qk_dim=128, v_dim=64)
    for kind, dtype in pages.EIGHT_BITS.items():
        one = page_bytes(dtype=dtype, **sizes)
        assert one == 3 * 64 * 4 * (128 + 64 + 8) == kv_bytes(model, 64, kind)
        pool = PagePool.within(5 * one + 1, device="cpu", dtype=dtype, **sizes)
        assert pool.pages == 5
        assert 5 * one == sum(x.nbytes for x in (pool.all_k, pool.all_v, *pool.all_scales))
        tier = HostTier(pool, 7 * one)
        assert tier.pages == 7 and sum(x.nbytes for x in tier.layers) == 7 * one
    assert 1.9 < kv_bytes(model, 64, "bf16") / kv_bytes(model, 64, "int8") < 2


@pytest.mark.parametrize(("kind", "users"), [("bf16", 89), ("fp8", 176)])
def test_12_gb_hold_as_many_users_of_wide_heads_as_the_documentation_says(kind: str, users: int) -> None:
    model = compose_spec(["model=wide_heads"])[0].model
    sizes = {"layers": model.layers, "page": 64, "heads": model.heads, "qk_dim": model.qk_dim, "v_dim": model.v_dim}
    dtype = pages.EIGHT_BITS.get(kind, torch.bfloat16)
    pool = PagePool.within(12 * 10**9, device="meta", dtype=dtype, **sizes)
    assert pool.pages // pool.pages_for(4096) == users


def test_the_simulator_counts_pages_in_8_bits() -> None:
    bytes_of = {}
    for kind in ("bf16", "int8"):
        config = CacheSimConfig(HSTUConfig(), SyntheticConfig(max_requests=50), precision=kind)
        bytes_of[kind] = Replay(config).page_bytes
        assert bytes_of[kind] == kv_bytes(config.model, config.page, kind)
    assert bytes_of["int8"] < 0.7 * bytes_of["bf16"]


def test_sizing_counts_users_by_their_states(grbench_here: Any) -> None:
    """Four layers of 4 x 256: a user of 4096 events has 68 MB in 8 bits and 134 MB in bf16."""
    words = ["sizing", "model=wide_heads", "workload=synthetic", "workload.max_history=4096", "engine=hstu"]
    users = {}
    for kind in ("engine", "fp8"):
        done = grbench_here(*words, "cache=lru", f"cache.precision={kind}")
        assert done.returncode == 0, done.stderr
        users[kind] = int(done.stdout.split("4096 ")[1].splitlines()[0].split()[-1].replace(",", ""))
    assert users["fp8"] / users["engine"] == pytest.approx(1024 / 520, rel=0.01)


def test_a_precision_that_there_is_not_is_one_line(grbench_here: Any) -> None:
    done = grbench_here(*ON_CPU, "cache.precision=int4")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cache.precision=int4: " in done.stderr and "allowed is one of engine, int8, fp8" in done.stderr


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["auto", "torch", "triton", "fp8"])
@pytest.mark.parametrize("graphs", ["true", "false"])
def test_on_a_gpu(cell: Callable[[list[str]], Outcome], kind: str, kernel: str, graphs: str) -> None:
    """bf16 with both tiers, in CUDA graphs and without."""
    if kernel == "torch" and graphs == "true":
        pytest.skip("eager writes of pages wait for the device")
    words = [*BASE, f"kernel={kernel}", f"cache.precision={kind}", f"engine.cuda_graphs={graphs}"]
    words += ["model.qk_dim=64", "model.v_dim=64"]
    outcome = cell([*words, *small_tiers(words, kind)[1]])
    gate, actual = outcome.gate, outcome.actual
    assert max(gate["error"], gate["error_again"], gate["error_from_host"], gate["error_after"]) <= gate["tolerance"]
    assert gate["measured"]["passed"] and actual["cache_precision"] == kind
    assert outcome.metrics["cache/host_hit_rate"] > 0 and outcome.metrics["engine/cache_faults"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_states_fail_on_a_gpu(kind: str) -> None:
    _, engine, gate = built([*BASE, f"cache.precision={kind}", "cache.memory_gb=0.05"])
    for change in WRONG.values():
        engine.reset_cache()
        gate.check(engine, 8)
        with torch.inference_mode():
            change(engine.user_cache.states.pool)
        with pytest.raises(IncorrectError, match="differ from the fp32 reference"):
            gate.check(engine, 8)
    engine.close()
