"""Engines in the real vLLM, their requests, and checks of what they find."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grengines.api import Catalogue, GenerateResult, Request, Retrieval, Setup
from grengines.cache.config import CacheConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.semantic.search import Beams
from grengines.vllm.config import VLLMEngineConfig
from grengines.vllm.engine import VLLMEngine
from grkernels.choice import requested
from helpers.items import catalogue

FREEZE, UNFREEZE = gc.freeze, gc.unfreeze
IDS = catalogue(110)
RETRIEVAL = Retrieval(IDS, k=10, beam_width=20)
MODEL = HSTUConfig(
    embedding_dim=24, layers=2, heads=2, qk_dim=8, v_dim=8, scaling_seqlen=16, max_positions=90, head_dim=4
)
CATALOGUE = Catalogue(num_items=110, num_users=1, num_actions=1)
LENGTHS = (5, 0, 9, 1, 40, 30, 13, 22)  # items: an empty prompt, one that is cut, ragged ones
CLOSE = 1e-4  # fp32 in another order of summation; a wrong key shows at 1e-2


@contextlib.contextmanager
def frozen_imports() -> Iterator[None]:
    """Let vLLM neither freeze nor unfreeze objects, and look for its kernels once.

    It unfreezes all of them, and collects garbage eight times an engine: through what it imported, that takes 5 s. On a
    CPU each engine looks through all that is imported for kernels to replace: the first has replaced them.
    """
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(ImportError):  # older ones replace nothing
            from vllm.triton_utils import dispatcher

            register, replaced = dispatcher.register_kernels, list[Any]()

            def once(kernels: Any) -> None:
                if kernels not in replaced:
                    register(kernels)
                    replaced.append(kernels)

            patch.setattr(dispatcher, "register_kernels", once)
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


def freeze_imports() -> None:
    """Leave what is imported now out of collections of garbage. No engine may be open."""
    gc.collect()
    FREEZE()


def requests_of(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [request_of(i, rng.integers(0, len(IDS.codes), n)) for i, n in enumerate(lengths)]


def request_of(number: int, items: np.ndarray) -> Request:
    none, floats = np.zeros(len(items), np.int64), np.zeros(len(items), np.float32)
    return Request(number, number, items, none, floats, none, 0, items[:0], 0, 0.0, 1000.0)


REQUESTS = requests_of()


def engine_of(
    sample: Sequence[Request] = REQUESTS,
    model: Any = MODEL,
    retrieval: Retrieval = RETRIEVAL,
    kernel: str = "torch",
    **options: Any,
) -> VLLMEngine:
    config = VLLMEngineConfig(**{"kv_cache_gb": 0.02, "block_size": 16, "max_num_seqs": 64, **options})
    engine = VLLMEngine(config, Setup(model, requested(kernel), CATALOGUE, 3, CacheConfig(), retrieval))
    engine.prepare(sample, 4)
    return engine


def expect_equal(found: GenerateResult, expected: Beams, order: Sequence[int] | None = None) -> None:
    for i, (items, scores) in enumerate(zip(found.items, found.scores, strict=True)):
        place = order[i] if order is not None else i
        assert items.tolist() == expected.items[place].tolist()
        np.testing.assert_allclose(scores, expected.scores[place], atol=CLOSE)


GPU_MODEL = HSTUConfig(
    embedding_dim=128, layers=3, heads=2, qk_dim=64, v_dim=64, scaling_seqlen=512, max_positions=1500, head_dim=4
)
GPU_REQUESTS = requests_of([400, 0, 70, 1, 250, 499, 33, 600], seed=7)


def gpu_engine(kernel: str, model: Any = GPU_MODEL, **options: Any) -> VLLMEngine:
    config = VLLMEngineConfig(**{"gpu_memory_utilization": 0.3, "max_num_batched_tokens": 2048, **options})
    retrieval = dataclasses.replace(RETRIEVAL, beam_width=64)
    engine = VLLMEngine(config, Setup(model, requested(kernel), CATALOGUE, 3, CacheConfig(), retrieval))
    engine.prepare(GPU_REQUESTS, 4)
    return engine


def in_pages(engine: VLLMEngine, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change what the pages of every layer hold. They come as arguments of paged_write."""
    from grengines.vllm.model import LayerPages

    pages = LayerPages(engine.core.model.attention)
    with torch.inference_mode():
        for i in range(len(engine.core.model.attention)):
            change(pages.layer(i))


def expect_near(found: GenerateResult, expected: Beams, reference: Any, tolerance: float) -> None:
    """The best item or a near-tie of it, every item that is above the cut by more than a tie, and scores."""
    tie = 2 * tolerance
    for i, (ours, scores) in enumerate(zip(found.items, found.scores, strict=True)):
        theirs, exact = expected.items[i], expected.scores[i]
        assert ours[0] in theirs[exact >= exact[0] - tie]
        assert set(theirs[exact > exact[-1] + tie].tolist()) <= set(ours.tolist())
        np.testing.assert_allclose(scores, reference.prefix_scores(GPU_REQUESTS[i], ours)[:, -1], atol=tolerance)


def allowed(reference: Any, precision: str, stored: str = "") -> float:
    """Return the gate's tolerance: twice the error of eager PyTorch in the same precision, over more items than k.

    stored: int8 or fp8 for pages in 8 bits.
    """
    eager = reference.search(GPU_REQUESTS, precision, stored=stored, width=64, k=32)
    exact = [reference.prefix_scores(r, items)[:, -1] for r, items in zip(GPU_REQUESTS, eager.items, strict=True)]
    tolerance = max(2 * float(np.abs(eager.scores - np.stack(exact)).max()), CLOSE)
    # Log-probabilities of other requests differ by some tens. Pages in 8 bits add the rounding of keys and values.
    assert tolerance < (2.5 if stored else 2)
    return tolerance


def expect_mixed(engine: VLLMEngine, reference: Any, tolerance: float) -> None:
    """A new prompt in every step: scores are those of the items found."""
    engine.reset_cache()
    done = {}
    for key, request in enumerate(GPU_REQUESTS):
        engine.admit(key, request)
        done |= {f.key: f for f in engine.step()}
    while engine.unfinished:
        done |= {f.key: f for f in engine.step()}
    for key, request in enumerate(GPU_REQUESTS):
        own = reference.prefix_scores(request, done[key].items)[:, -1]
        np.testing.assert_allclose(done[key].scores, own, atol=tolerance)
