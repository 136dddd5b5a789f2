"""GraphRunner for CPUs, which have no graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from grengines.runtime.batch import Bucket


class Replays:
    """A replay computes the inputs that were uploaded, read where those of the capture were."""

    def __init__(
        self,
        forward: Callable[..., Any],
        buckets: Sequence[Bucket],
        inputs: Callable[[Bucket], Sequence[Any]],
        device: torch.device,
    ) -> None:
        self._forward, self.count = forward, 0
        self._inputs: dict[Bucket, tuple[torch.Tensor, list[Any]]] = {}
        for bucket in buckets:
            hosts = inputs(bucket)
            buffer = torch.zeros(sum(len(host.buffer) for host in hosts), dtype=torch.int64)
            parts = buffer.split([len(host.buffer) for host in hosts])
            self._inputs[bucket] = buffer, [h.to(device, out=p) for h, p in zip(hosts, parts, strict=True)]

    def keep(self, buckets: Sequence[Bucket]) -> None:
        self._inputs = {b: self._inputs[b] for b in buckets}

    def upload(self, bucket: Bucket, inputs: torch.Tensor) -> None:
        assert len(inputs) == len(self._inputs[bucket][0])
        self._inputs[bucket][0].copy_(inputs)

    def replay(self, bucket: Bucket) -> Any:
        self.count += 1
        return self._forward(*self._inputs[bucket][1])
