"""The end of every batch: times of its parts, and the copy of its tensors into a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from grengines.api import GenerateResult, RankResult
from grengines.runtime.batch import HostBatch
from grengines.runtime.slots import Slot
from grengines.runtime.timing import Marks


def collect(
    logits: Tensor,
    hosts: Sequence[HostBatch],
    marks: Marks,
    batch_ms: float,
    details: dict[str, float],
    slot: Slot | None = None,
) -> Callable[[], RankResult]:
    """Queue the copy of these batches' logits to the host. The returned function waits for it and makes the result.

    Other batches may be queued before that. marks: set before the copies to the device and after. slot: has them and
    the memory for the copy, and is given back.
    """
    on_host = _fetch(logits, marks, slot).numpy()
    copied = np.empty_like(on_host)
    tokens, padded_tokens = sum(host.tokens for host in hosts), sum(host.padded_tokens for host in hosts)
    parts = [[copied[rows] for rows in some] for some in _rows(hosts)]

    def answer() -> RankResult:
        up_ms, compute_ms, down_ms = marks.spans_ms()
        np.copyto(copied, on_host)
        if slot is not None:
            slot.give_back()
        return RankResult(
            scores=[some[0] if len(some) == 1 else np.concatenate(some) for some in parts],
            batch_ms=batch_ms,
            transfer_ms=up_ms + down_ms,
            compute_ms=compute_ms,
            tokens=tokens,
            padded_tokens=padded_tokens,
            details=details,
        )

    return answer


def one_tensor(items: Tensor, scores: Tensor) -> Tensor:
    """Join items int64 [B, k] (exact up to 2**53) and scores to float64 [B, k, 2], for one copy to the host."""
    return torch.stack([items.double(), scores.double()], dim=-1)


def collect_items(
    found: Tensor,
    requests: int,
    marks: Marks,
    *,
    batch_ms: float,
    tokens: int,
    padded_tokens: int,
    details: dict[str, float],
) -> Callable[[], GenerateResult]:
    """Collect, as `collect` does, what `one_tensor` made of these requests and padding. An item of -1 is none."""
    on_host = _fetch(found, marks)

    def answer() -> GenerateResult:
        up_ms, compute_ms, down_ms = marks.spans_ms()
        items, scores = on_host.numpy()[:requests].transpose(2, 0, 1)
        real = items >= 0
        return GenerateResult(
            items=[row[known].astype(np.int64) for row, known in zip(items, real, strict=True)],
            scores=[row[known].astype(np.float32) for row, known in zip(scores, real, strict=True)],
            batch_ms=batch_ms,
            transfer_ms=up_ms + down_ms,
            compute_ms=compute_ms,
            tokens=tokens,
            padded_tokens=padded_tokens,
            details=details,
        )

    return answer


def _fetch(found: Tensor, marks: Marks, slot: Slot | None = None) -> Tensor:
    """Queue the copy to the host, and set the last marks."""
    marks.add()
    on_host = slot.result(found) if slot else torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
    on_host.copy_(found, non_blocking=True)
    marks.add()
    return on_host


def _rows(hosts: Sequence[HostBatch]) -> list[list[slice]]:
    """Return the rows of each request's candidates, in the logits of all batches; padding at the end has no owner."""
    parts: list[list[slice]] = [[] for _ in hosts[0].candidate_counts]
    at = 0
    for host in hosts:
        for part, count in zip(parts, host.candidate_counts, strict=True):
            part.append(slice(at, at + count))
            at += count
    return parts
