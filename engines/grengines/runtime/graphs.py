"""CUDA graphs of the model, one for each bucket: a replay costs one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from grengines.runtime.batch import Bucket


class Input(Protocol):
    """An input of a graph: a buffer on the host, and its parts as tensors on the device."""

    @property
    def buffer(self) -> Tensor: ...

    def to(self, device: torch.device, out: Tensor | None = None) -> Any: ...


@cache
def _capturing_stream(device: int) -> torch.cuda.Stream:
    """Return the stream of all captures on a GPU: libraries and the allocator keep memory for each stream in use."""
    return torch.cuda.Stream(device)


def capture(work: Callable[[], Any], pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture what `work` launches, in this memory pool. Return it and the result, which replays rewrite.

    `torch.cuda.graph` would also give all cached memory back to the driver, each time: with dozens of graphs, taking
    it again is most of the time of a capture.
    """
    stream, graph = _capturing_stream(torch.cuda.current_device()), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # libraries set themselves up here, outside the capture
        torch.cuda.synchronize()
        graph.capture_begin(pool=pool)
        try:
            made = work()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
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
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # the pool takes memory of its own
        for bucket in sorted(buckets, key=lambda b: b.tokens, reverse=True):  # the largest first: it lays out the pool
            # The empty batch gives the buffers their layout. Their contents do not matter to the capture.
            hosts = inputs(bucket)
            buffer = torch.zeros(sum(len(host.buffer) for host in hosts), dtype=torch.int64, device=device)
            parts = buffer.split([len(host.buffer) for host in hosts])
            arguments = [host.to(device, out=part) for host, part in zip(hosts, parts, strict=True)]
            graph, logits = capture(partial(forward, *arguments), pool)
            self._graphs[bucket] = graph, buffer, logits

    def keep(self, buckets: Sequence[Bucket]) -> None:
        """Drop the graphs of all other buckets."""
        self._graphs = {bucket: self._graphs[bucket] for bucket in buckets}

    def upload(self, bucket: Bucket, inputs: Tensor) -> None:
        """Copy inputs that were packed for `bucket`, one after another, to where its graph reads, without waiting."""
        self._graphs[bucket][1].copy_(inputs, non_blocking=True)

    def replay(self, bucket: Bucket) -> Tensor:
        """Run the bucket's graph. Return fp32 [bucket.candidates, tasks], valid until the next run."""
        graph, _, logits = self._graphs[bucket]
        graph.replay()
        return logits
