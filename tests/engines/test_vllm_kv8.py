"""HSTU in the real vLLM with pages in 8 bits: as near the fp32 reference as rounding allows, for twice the users."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Grbench
from helpers.vllm_engines import (
    CATALOGUE,
    MODEL,
    REQUESTS,
    RETRIEVAL,
    engine_of,
    frozen_imports,
    in_pages,
    requests_of,
)
from torch import Tensor

from grbench.config.compose import compose_spec
from grbench.gate.generate import GenerateGate
from grbench.gate.rank import stored_precision
from grengines.api import Request
from grengines.cache.config import EIGHT_BITS
from grengines.cache.pool import page_bytes
from grengines.models.hstu.config import HSTUConfig
from grengines.numerics import IncorrectError
from grkernels import pages

Pages = dict[str, Tensor]
WIDE = HSTUConfig(embedding_dim=32, layers=2, heads=1, qk_dim=128, v_dim=128, scaling_seqlen=64, max_positions=90)


@pytest.fixture(scope="module", autouse=True)
def imports() -> Iterator[None]:
    with frozen_imports():
        yield


def gate_of(actual: dict[str, Any], requests: Sequence[Request] = REQUESTS) -> GenerateGate:
    """Return the gate of a cell whose engine reports this."""
    spec = dataclasses.replace(compose_spec(["engine=vllm", "gate.requests=8"])[0], model=MODEL, seed=3)
    stored = stored_precision(actual)
    return GenerateGate(spec, CATALOGUE, requests, RETRIEVAL, actual["device"], actual["precision"], stored)


@pytest.mark.parametrize(
    ("kernel", "precision", "stored"),
    [("torch", "fp32", "int8"), ("torch", "fp32", "fp8"), ("torch", "bf16", "fp8"), ("triton", "fp32", "fp8")],
)
def test_the_error_is_at_most_twice_that_of_the_emulation(
    kernel: str, precision: str, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold, in chunks, from the prefix cache and in any batch; pages that are zeros, stale or wrongly scaled fail."""
    engine = engine_of(kernel=kernel, precision=precision, kv_cache_precision=stored, max_num_batched_tokens=40)
    # An interpreter is slow: a few of them, of which one is cut and comes in chunks.
    requests, hits = (REQUESTS[2:5], 96) if kernel == "triton" else (REQUESTS, 272)
    try:
        gate = gate_of(engine.actual(), requests)
        result = gate.check(engine, 4)
        assert 0 < result.error <= result.tolerance == 2 * result.rounding_error
        assert min(result.zero_attention_error, result.stale_error) > 5 * result.tolerance
        warm = engine.generate(requests)
        assert warm.details["prefix_hit_tokens"] == hits
        if kernel == "triton":  # the same checks as with torch, in an interpreter
            return
        write = engine.core.model.operators.paged_write

        def zeros(k: Tensor, v: Tensor, slots: Tensor, **its: Tensor) -> None:
            write(k * 0, v * 0, slots, **its)

        def wrongly_scaled(k: Tensor, v: Tensor, slots: Tensor, **its: Tensor) -> None:
            write(k, v, slots, **its)
            its["v_scales"].flatten(0, 1)[slots] *= 1.5

        def stale(*_: Any, **__: Any) -> None:
            pass

        engine.generate(requests_of(seed=9))  # what stale pages hold
        for wrong in (zeros, wrongly_scaled, stale):
            engine.reset_cache()
            monkeypatch.setattr(engine.core.model.operators, "paged_write", wrong)
            with pytest.raises(IncorrectError, match="scores differ from the fp32 reference by"):
                gate.check(engine, 4)
        monkeypatch.undo()
        engine.reset_cache()
        assert gate.check(engine, 4).passed
    finally:
        engine.close()


def test_a_gate_of_exact_pages_refuses_8_bits() -> None:
    """The tolerance follows what the engine reports: fp32 pages allow no rounding."""
    engine = engine_of(kv_cache_precision="fp8")
    try:
        with pytest.raises(IncorrectError, match="scores differ"):
            gate_of(engine.actual() | {"cache_precision": "fp32"}).check(engine, 4)
    finally:
        engine.close()


@pytest.mark.parametrize("stored", EIGHT_BITS)
def test_pages_hold_what_the_native_engines_hold(stored: str) -> None:
    """Their bytes, by vLLM's count, are those of the pool's pages, and each key is its 8-bit number times its scale."""
    engine = engine_of(REQUESTS[:1], kv_cache_precision=stored)
    try:
        sizes = {"page": 16, "heads": MODEL.heads, "qk_dim": MODEL.qk_dim, "v_dim": MODEL.v_dim}
        page = page_bytes(layers=MODEL.layers, dtype=pages.EIGHT_BITS[stored], **sizes)
        assert engine.core.blocks == int(0.02e9) // page
        (config,) = engine.core.client.engine_core.scheduler.kv_cache_config.kv_cache_groups
        assert config.kv_cache_spec.page_size_bytes * MODEL.layers == page
        written: list[tuple[Tensor, ...]] = []
        operators = engine.core.model.operators
        write = operators.paged_write

        def watched(k: Tensor, v: Tensor, slots: Tensor, **its: Tensor) -> None:
            written.append((k.clone(), v.clone(), slots.clone()))
            write(k, v, slots, **its)

        operators.paged_write = watched
        engine.generate(REQUESTS[:1])
        found: list[Pages] = []
        in_pages(engine, found.append)
        assert len(found) == len(written) == MODEL.layers
        for its, (k, v, slots) in zip(found, written, strict=True):
            for name, x in (("k", k), ("v", v)):
                numbers, scales = its[f"{name}_pages"], its[f"{name}_scales"]
                assert numbers.is_contiguous() and scales.is_contiguous() and numbers.dtype == pages.EIGHT_BITS[stored]
                expected, scale = pages.quantised(x, numbers.dtype)
                assert torch.equal(numbers.flatten(0, 1)[slots].float(), expected.float())
                assert torch.equal(scales.flatten(0, 1)[slots], scale)
    finally:
        engine.close()


def test_nearly_twice_the_users_fit() -> None:
    """In 80 pages of bf16, 26 users return to their prefixes; in 8 bits there are 155 pages of the same bytes, for 51.

    A key of 128 numbers takes 256 bytes in bf16, and 132 with its scale.
    """
    page = page_bytes(layers=2, page=16, heads=1, qk_dim=128, v_dim=128, dtype=torch.bfloat16)
    for stored, count, users in (("engine", 80, 26), ("int8", 155, 51), ("fp8", 155, 51)):
        visitors = requests_of([16] * (users + 1), seed=4)  # 48 tokens, three pages
        engine = engine_of(
            visitors, WIDE, precision="bf16", kv_cache_precision=stored, kv_cache_gb=80 * page / 1e9, max_num_seqs=1
        )
        returned = []
        try:
            assert engine.core.blocks == count
            for visits in (users, users + 1):
                engine.reset_cache()
                for visitor in visitors[:visits]:
                    engine.generate([visitor])
                hits = [engine.generate([visitor]).details["prefix_hit_tokens"] for visitor in visitors[:visits]]
                returned.append(hits)
        finally:
            engine.close()
        assert returned[0] == [32] * users  # all but the page of the last token
        assert sum(returned[1]) < 32 * users


@pytest.mark.usefixtures("forked_workers")
def test_a_whole_run(grbench_here: Grbench, tmp_path: Path) -> None:
    """The gate allows what the emulation of 8-bit pages loses, and the record says what the pages are."""
    small = ["workload=synthetic", "workload.max_requests=64", "workload.max_history=48"]
    small += ["scenario=closed_loop", "scenario.queries=64"]
    options = ["engine.kv_cache_precision=fp8", "engine.kv_cache_gb=0.1", "gate.measured=32"]
    done = grbench_here("engine=vllm", *options, *small, "tracking=none")
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (json.loads(p.read_text()) for p in tmp_path.glob("outputs/runs/*/record.json"))
    gate = record["gate"]
    assert record["status"] == "OK" and record["actual"]["cache_precision"] == "fp8"
    assert gate["error"] <= gate["tolerance"] <= 2 * gate["rounding_error"] and gate["measured"]["passed"]
    assert gate["zero_attention_error"] > 2 * gate["tolerance"]
    assert record["metrics"]["engine/prefix_hit_tokens"] > 0
