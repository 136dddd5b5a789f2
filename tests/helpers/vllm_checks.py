"""What holds for every model inside vLLM: how its scheduler cuts a search up changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Found = Callable[[Any], None]  # holds a result to the reference's items and order


def chunks_of_any_size_change_nothing(engine_of: Callable[..., Any], requests: Any, expect: Found) -> None:
    """Steps of at most 19 tokens: chunks end within prompts, within beams, and between a beam's codes."""
    engine = engine_of(max_num_batched_tokens=19, max_num_seqs=4)
    try:
        found = engine.generate(requests)
        expect(found)
        assert found.details["vllm_steps"] > 25
    finally:
        engine.close()


def preemption_changes_nothing(
    engine_of: Callable[..., Any], requests: Any, expect: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So few pages that vLLM takes requests back and begins them again. It reads one prompt at a time and admits none
    that doesn't fit; only with both put aside does it come to that."""
    from grengines.vllm import compat

    start = compat.start
    loose = {"long_prefill_token_threshold": 16, "scheduler_reserve_full_isl": False}
    monkeypatch.setattr(compat, "start", lambda arguments: start(arguments | loose))
    engine = engine_of(kv_blocks=12, max_num_batched_tokens=128)
    try:
        scheduler = engine._core.engine_core.scheduler
        preempted = []
        preempt = scheduler._preempt_request
        scheduler._preempt_request = lambda request, *a, **k: (preempted.append(request), preempt(request, *a, **k))[1]
        expect(engine.generate(requests))
        assert preempted
        assert engine.actual()["kv_blocks"] == 12
    finally:
        engine.close()


def prefix_caching_and_chunks_can_be_off(engine_of: Callable[..., Any], requests: Any, expect: Found) -> None:
    engine = engine_of(prefix_caching=False, chunked_prefill=False, max_num_batched_tokens=256, max_num_seqs=0)
    try:
        found = engine.generate(requests)
        expect(found)
        assert found.details["prefix_hit_tokens"] == 0
        assert found.details["reread_tokens"] == 2 * found.tokens
        actual = engine.actual()
        assert not actual["prefix_caching"] and not actual["chunked_prefill"]
        assert actual["max_num_seqs"] == 4  # as prepared for
    finally:
        engine.close()
