"""CUDA graphs of the model, one for each (batch, length) bucket: a replay costs one launch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from grengines.api import Request
from grengines.hstu.batch import Bucket, Encoding, HostBatch, JaggedBatch, pack

Forward = Callable[[JaggedBatch], Tensor]


def batch_buckets(max_batch: int) -> list[int]:
    """1, 2, 4, 8, ... and max_batch."""
    return [*(1 << i for i in range((max_batch - 1).bit_length())), max_batch]


def length_buckets(lengths: Iterable[int]) -> list[int]:
    """16, 24, 32, 48, 64, ...: those that the given lengths (tokens) need, shortest first."""
    wanted = sorted(set(lengths))
    steps = [16]
    while steps[-1] < wanted[-1]:
        power = 1 << (steps[-1].bit_length() - 1)
        steps.append(power * 3 // 2 if steps[-1] == power else power * 2)
    return sorted({steps[bisect_left(steps, n)] for n in wanted})


def token_count(request: Request, encoding: Encoding) -> int:
    """Tokens of a request: contextual, history and candidates."""
    return encoding.contextual_seq_len + len(request.history_items) + len(request.candidates)


def plan_buckets(sample: Sequence[Request], encoding: Encoding, max_batch: int, lengths: Sequence[int]) -> list[Bucket]:
    """Every bucket for requests like `sample`, least work first; `lengths` empty: as the sample needs."""
    chosen = set(lengths) or length_buckets(token_count(r, encoding) for r in sample)
    most = max(len(r.candidates) for r in sample)
    buckets = [Bucket(b, n, min(most, n)) for n in chosen for b in batch_buckets(max_batch)]
    return sorted(buckets, key=lambda b: (b.batch * b.length, b.batch))


def choose_bucket(buckets: Sequence[Bucket], requests: Sequence[Request], encoding: Encoding) -> Bucket | None:
    """The first bucket that holds the requests; None where none does."""
    count = len(requests)
    longest = max(token_count(r, encoding) for r in requests)
    most = max(len(r.candidates) for r in requests)
    return next((b for b in buckets if b.batch >= count and b.length >= longest and b.candidates >= most), None)


class GraphRunner:
    """The captured graphs. All share one memory pool: only one runs at a time, and its logits are copied
    away before the next replay."""

    def __init__(self, forward: Forward, buckets: Sequence[Bucket], encoding: Encoding, device: torch.device) -> None:
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        for bucket in reversed(buckets):  # the largest first: it lays out the pool
            # The empty batch gives the buffer its layout; what is in it when a graph is captured does not matter.
            host = pack([], encoding, bucket=bucket, pin=True)
            buffer = torch.zeros_like(host.buffer, device=device)
            batch = host.to(device, out=buffer)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set themselves up here, outside the capture
                forward(batch)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = forward(batch)
            self._graphs[bucket] = graph, buffer, logits

    def upload(self, host: HostBatch, bucket: Bucket) -> None:
        """Copy a batch that was packed for `bucket` to where its graph reads it, without waiting."""
        self._graphs[bucket][1].copy_(host.buffer, non_blocking=True)

    def replay(self, bucket: Bucket) -> Tensor:
        """Run the bucket's graph: logits fp32 [bucket.batch * bucket.candidates, tasks], good until the next."""
        graph, _, logits = self._graphs[bucket]
        graph.replay()
        return logits
