"""CUDA graphs of the model, one for each (batch, length) bucket: a replay costs one launch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import ge
from typing import Any, Protocol

import torch
from torch import Tensor

from grengines.api import Request
from grengines.runtime.batch import Bucket, Encoding


class Input(Protocol):
    """An input of a graph: a buffer on the host, and its parts as tensors on the device."""

    @property
    def buffer(self) -> Tensor: ...

    def to(self, device: torch.device, out: Tensor | None = None) -> Any: ...


def batch_buckets(max_batch: int) -> list[int]:
    """Return 1, 2, 4, 8, ... and max_batch."""
    return [*(1 << i for i in range((max_batch - 1).bit_length())), max_batch]


def first_batches(max_batch: int, device: torch.device) -> list[int]:
    """Return the sizes of warm-up batches: all buckets' on a GPU, which compiles for a size, else the largest."""
    return batch_buckets(max_batch) if device.type == "cuda" else [max_batch]


def length_buckets(lengths: Iterable[int]) -> list[int]:
    """Return those of 16, 24, 32, 48, 64, ... that the given lengths (tokens) need, shortest first."""
    wanted = sorted(set(lengths))
    steps = [16]
    while steps[-1] < wanted[-1]:
        power = 1 << (steps[-1].bit_length() - 1)
        steps.append(power * 3 // 2 if steps[-1] == power else power * 2)
    return sorted({steps[bisect_left(steps, n)] for n in wanted})


def token_count(request: Request, encoding: Encoding) -> int:
    """Return the tokens of a request: contextual, history and candidates."""
    return encoding.contextual_seq_len + len(request.history_items) + len(request.candidates)


def plan_buckets(
    sample: Sequence[Request], encoding: Encoding, max_batch: int, lengths: Sequence[int], cached: int = 0
) -> list[Bucket]:
    """Return all buckets for requests like `sample`, least work first. lengths: empty for those that the sample needs.

    cached: with a cache, the most tokens of a user in it. Then the lengths of a few new events are added.
    """
    most = max(len(r.candidates) for r in sample)
    needed = [token_count(r, encoding) for r in sample]
    if cached:
        needed += [n for n in (most + (1 << i) for i in range(cached.bit_length())) if n < max(needed)]
    chosen = set(lengths) or length_buckets(needed)
    return bucket_grid(chosen, max_batch, most, cached)


def bucket_grid(lengths: Iterable[int], max_batch: int, candidates: int = 0, cached: int = 0) -> list[Bucket]:
    """Return a bucket for each of the lengths and each size of a batch, least work first."""
    buckets = [Bucket(b, n, min(candidates, n), cached) for n in lengths for b in batch_buckets(max_batch)]
    return sorted(buckets, key=lambda b: (b.batch * b.length, b.batch))


def choose_bucket(buckets: Sequence[Bucket], *sizes: Sequence[int]) -> Bucket | None:
    """Return the first bucket that holds a batch, or None.

    sizes: the tokens to encode of each sequence, its candidates and, with a cache, its cached tokens.
    """
    needed = (len(sizes[0]), *map(max, sizes))
    return next((b for b in buckets if all(map(ge, b, needed))), None)


def capture(work: Callable[[], Any], pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture what `work` launches, in this memory pool. Return it and the result, which replays rewrite."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up here, outside the capture
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        made = work()
    return graph, made


class GraphRunner:
    """The captured graphs of a model, one for each bucket.

    All share one memory pool: only one runs at a time, and its logits are copied before the next replay. forward: the
    model, given a bucket's inputs on the device. inputs: returns those of an empty batch, on the host.
    """

    def __init__(
        self,
        forward: Callable[..., Tensor],
        buckets: Sequence[Bucket],
        inputs: Callable[[Bucket], Sequence[Input]],
        device: torch.device,
    ) -> None:
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        for bucket in reversed(buckets):  # the largest first: it lays out the pool
            # The empty batch gives the buffers their layout. Their contents do not matter to the capture.
            hosts = inputs(bucket)
            buffers = [torch.zeros_like(host.buffer, device=device) for host in hosts]
            arguments = [host.to(device, out=buffer) for host, buffer in zip(hosts, buffers, strict=True)]
            graph, logits = capture(partial(forward, *arguments), pool)
            self._graphs[bucket] = graph, buffers, logits

    def upload(self, bucket: Bucket, *hosts: Input) -> None:
        """Copy inputs that were packed for `bucket` to the buffers that its graph reads, without waiting."""
        for buffer, host in zip(self._graphs[bucket][1], hosts, strict=True):
            buffer.copy_(host.buffer, non_blocking=True)

    def replay(self, bucket: Bucket) -> Tensor:
        """Run the bucket's graph. Return fp32 [bucket.batch * bucket.candidates, tasks], valid until the next run."""
        graph, _, logits = self._graphs[bucket]
        graph.replay()
        return logits
