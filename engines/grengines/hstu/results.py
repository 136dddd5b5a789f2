"""What every way of ranking a batch shares: timing its parts, and its end, from logits to a result."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from grengines.api import Float32Array, RankResult
from grengines.hstu.batch import HostBatch
from grengines.marks import Mark


class Marks:
    """Points in time between pieces of work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [Mark(device)]

    def add(self) -> None:
        self._marks.append(Mark(self._device))

    def spans_ms(self) -> list[float]:
        """Milliseconds between marks; waits until the last one is reached."""
        return [a.ms_until(b) for a, b in pairwise(self._marks)]


def collect(logits: Tensor, hosts: list[HostBatch], marks: Marks, batch_ms: float) -> RankResult:
    """Bring the logits of these batches to the host, and wait. marks: set before the copies to the device and after."""
    marks.add()
    on_host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=logits.is_cuda)
    on_host.copy_(logits, non_blocking=True)
    marks.add()
    up_ms, compute_ms, down_ms = marks.spans_ms()
    return RankResult(
        scores=_by_request(on_host.numpy(), hosts),
        batch_ms=batch_ms,
        transfer_ms=up_ms + down_ms,
        compute_ms=compute_ms,
        tokens=sum(host.tokens for host in hosts),
        padded_tokens=sum(host.padded_tokens for host in hosts),
    )


def _by_request(logits: Float32Array, hosts: list[HostBatch]) -> list[Float32Array]:
    """Cut the batches' logits into each request's [candidates, tasks]; padding at the end is dropped."""
    parts: list[list[Float32Array]] = [[] for _ in hosts[0].candidate_counts]
    at = 0
    for host in hosts:
        for part, count in zip(parts, host.candidate_counts, strict=True):
            part.append(logits[at : at + count])
            at += count
    return [np.concatenate(part) for part in parts]  # copies: the page-locked buffer is free again
