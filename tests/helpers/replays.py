"""GraphRunner for CPUs, which have no graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from grengines.runtime.batch import Bucket


class Replays:
    """A replay computes the inputs that were uploaded. They have the layout that a graph was captured with."""

    def __init__(
        self,
        forward: Callable[..., Any],
        buckets: Sequence[Bucket],
        inputs: Callable[[Bucket], Sequence[Any]],
        device: torch.device,
    ) -> None:
        self._forward, self._device, self.count = forward, device, 0
        self._layouts = {b: [(len(host.buffer), host.sizes) for host in inputs(b)] for b in buckets}

    def keep(self, buckets: Sequence[Bucket]) -> None:
        self._layouts = {b: self._layouts[b] for b in buckets}

    def upload(self, bucket: Bucket, *hosts: Any) -> None:
        assert [(len(host.buffer), host.sizes) for host in hosts] == self._layouts[bucket]
        self._hosts = hosts

    def replay(self, bucket: Bucket) -> Any:
        self.count += 1
        return self._forward(*(host.to(self._device) for host in self._hosts))
