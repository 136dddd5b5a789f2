"""CUDA graphs of every rank of a team: captured, uploaded and replayed by all of them in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grengines.runtime.batch import Bucket
from grengines.runtime.graph_costs import Runner
from grengines.runtime.graphs import GraphRunner, Input
from grengines.runtime.team import Alone, Calls, Team


@dataclass
class Packed:
    """Packed inputs of a graph, which a call sends as they are."""

    buffer: Tensor  # int64

    def to(self, device: torch.device) -> Tensor:
        """Copy to the device without waiting."""
        return self.buffer.to(device, non_blocking=True)


class SharedRunner:
    """The graphs of rank 0, with which the other ranks capture and replay theirs. Satisfies graph_costs.Runner.

    runner: makes rank 0's, given the inputs of each bucket. The other ranks take the same inputs.
    """

    def __init__(self, team: Team, buckets: Sequence[Bucket], inputs: Callable[[Bucket], Sequence[Input]],
                 runner: Callable[[Callable[[Bucket], Sequence[Input]]], Runner]) -> None:  # fmt: skip
        hosts: dict[Bucket, Sequence[Any]] = {bucket: inputs(bucket) for bucket in buckets}
        packed = [Packed(host.buffer) for some in hosts.values() for host in some]
        layouts = {bucket: [replace(host, buffer=None) for host in some] for bucket, some in hosts.items()}
        self._team = team
        with team.call("capture", packed, layouts=layouts):
            self._runner = runner(hosts.__getitem__)

    def keep(self, buckets: Sequence[Bucket]) -> None:
        """Drop the graphs of all other buckets."""
        with self._team.call("keep", [], buckets=list(buckets)):
            self._runner.keep(buckets)

    def upload(self, bucket: Bucket, inputs: Tensor) -> None:
        """Copy packed inputs to where the bucket's graph reads on every rank, without waiting."""
        with self._team.call("upload", [Packed(inputs)], bucket=bucket) as [there]:
            self._runner.upload(bucket, there)

    def replay(self, bucket: Bucket) -> Tensor:
        """Run the bucket's graph on every rank. Return this rank's result, valid until the next run."""
        with self._team.call("replay", [], bucket=bucket):
            return self._runner.replay(bucket)


def graph_runner(
    team: Team | Alone,
    make: Callable[..., Runner],
    forward: Callable[..., Tensor],
    buckets: Sequence[Bucket],
    inputs: Callable[[Bucket], Sequence[Input]],
    device: torch.device,
) -> Runner:
    """Capture the graphs of an engine. make: GraphRunner. Other arguments: as of GraphRunner."""
    if isinstance(team, Alone):
        return make(forward, buckets, inputs, device)
    return SharedRunner(team, buckets, inputs, lambda same: make(forward, buckets, same, device))


def graph_calls(forward: Callable[..., Tensor], device: torch.device) -> Calls:
    """Return the calls of a rank whose graphs run with those of rank 0."""
    runners: list[Runner] = []

    def capture(inputs: Sequence[Tensor], layouts: dict[Bucket, list[Any]]) -> None:
        buffers = iter(inputs)
        hosts = {bucket: [replace(one, buffer=next(buffers)) for one in some] for bucket, some in layouts.items()}
        runners[:] = [GraphRunner(forward, list(hosts), hosts.__getitem__, device)]

    return {
        "capture": capture,
        "keep": lambda inputs, buckets: runners[0].keep(buckets),
        "upload": lambda inputs, bucket: runners[0].upload(bucket, inputs[0]),
        "replay": lambda inputs, bucket: runners[0].replay(bucket),
    }
