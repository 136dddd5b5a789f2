"""Collectives of the ranks of one model: processes with a device each. NCCL between GPUs, gloo between CPUs.

The process groups are objects of their own, not PyTorch's default group, which vLLM may have in the same process.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions, BroadcastOptions

TIMEOUT = timedelta(minutes=5)  # of a collective: a rank may compile kernels meanwhile, and a dead one is seen at once


class Group:
    """This process as one of `size` ranks. store: a file that all ranks share; "": a library has its own collectives.

    Every rank calls the same collectives in the same order, with tensors of equal shapes on its device. On a GPU they
    are queued on the current stream. Raises RuntimeError if another rank has gone, on a CPU.
    """

    def __init__(self, rank: int, size: int, device: torch.device, store: str) -> None:
        self.rank, self.size = rank, size
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self._made: Any = None
        if not store:
            return
        shared = dist.FileStore(store, size)
        if self.backend == "nccl":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = TIMEOUT
            self._made = dist.ProcessGroupNCCL(shared, rank, size, nccl)
        else:
            gloo = dist.ProcessGroupGloo._Options()
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            gloo._timeout = TIMEOUT
            self._made = dist.ProcessGroupGloo(shared, rank, size, gloo)

    def sum_(self, x: Tensor) -> Tensor:
        """Replace x by the sum over all ranks, in place. Return x."""
        _wait(self._made.allreduce([x], _now(AllreduceOptions())))
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return the x of every rank, [ranks, *shape]."""
        found = x.new_empty(self.size, *x.shape)
        _wait(self._made._allgather_base(found.flatten(0, 1), x, _now(AllgatherOptions())))
        return found

    def first_(self, x: Tensor) -> Tensor:
        """Replace x by that of rank 0, in place. Return x."""
        options = _now(BroadcastOptions())
        options.rootRank = options.rootTensor = 0
        _wait(self._made.broadcast([x], options))
        return x

    def abort(self) -> None:
        """Give NCCL's memory back, and end collectives that wait for a rank that has gone: their results are worthless.

        gloo needs none of it: it sees the end of another rank.
        """
        if self._made is not None and self.backend == "nccl":
            self._made.abort()


def _wait(work: Any) -> None:
    """Wait for a collective. NCCL returns None for one that it has queued on the current stream."""
    if work is not None:
        work.wait()


def _now(options: Any) -> Any:
    """Return options that queue a collective on the current stream, not on one of NCCL's own."""
    options.asyncOp = False
    return options
