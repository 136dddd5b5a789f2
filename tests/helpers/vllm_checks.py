"""Checks for every model inside vLLM: chunks, preemption and options of its scheduler do not change answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from grengines.vllm.engine import VLLMEngine

Found = Callable[[Any], None]  # compares a result with the reference's items and order


def chunks_of_any_size_change_nothing(engine_of: Callable[..., Any], requests: Any, expect: Found) -> None:
    """Steps of at most 19 tokens: chunks end within prompts, and searches end beside chunks of other prompts."""
    engine = engine_of(max_num_batched_tokens=19, max_num_seqs=4)
    try:
        found = engine.generate(requests)
        expect(found)
        assert found.details["vllm_steps"] > 15
    finally:
        engine.close()


def preemption_changes_nothing(
    engine_of: Callable[..., Any], requests: Any, expect: Found, monkeypatch: pytest.MonkeyPatch, blocks: int = 12
) -> None:
    """Pages are so few that vLLM preempts requests.

    It reads one prompt at a time and admits none that does not fit. Requests are preempted only without both rules.
    """
    arguments = VLLMEngine.core_arguments
    loose = {"long_prefill_token_threshold": 16, "scheduler_reserve_full_isl": False}
    monkeypatch.setattr(VLLMEngine, "core_arguments", lambda *given: arguments(*given) | loose)
    engine = engine_of(kv_blocks=blocks, max_num_batched_tokens=128)
    try:
        scheduler, step = engine.core.client.engine_core.scheduler, engine.step
        preempted: set[str] = set()

        def watched() -> Any:
            finished = step()
            preempted.update(name for name, request in scheduler.requests.items() if request.num_preemptions)
            return finished

        monkeypatch.setattr(engine, "step", watched)
        expect(engine.generate(requests))
        assert preempted
        assert engine.actual()["kv_blocks"] == blocks
    finally:
        engine.close()


def prefix_caching_and_chunks_can_be_off(engine_of: Callable[..., Any], requests: Any, expect: Found) -> None:
    off = {"prefix_caching": False, "chunked_prefill": False, "async_scheduling": False}
    engine = engine_of(**off, max_num_batched_tokens=256, max_num_seqs=0)
    try:
        found = engine.generate(requests)
        expect(found)
        assert found.details["prefix_hit_tokens"] == 0
        actual = engine.actual()
        assert not any(actual[name] for name in off)
        assert actual["max_num_seqs"] == 4  # as prepared for
    finally:
        engine.close()
