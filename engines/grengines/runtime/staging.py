"""Host buffers in which a batch is assembled before one copy to the device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from grengines.api import Int64Array


class Buffer(NamedTuple):
    """Memory on the host, int64 [n], as PyTorch and NumPy see it."""

    tensor: Tensor
    array: Int64Array

    @classmethod
    def of(cls, tensor: Tensor) -> Buffer:
        return cls(tensor, tensor.numpy())


def empty(n: int, pin: bool) -> Tensor:
    """Return int64 [n] of any values. pin: page-locked, for copies to a GPU."""
    return torch.empty(n, dtype=torch.int64, pin_memory=pin)


def zeros(n: int, pin: bool) -> Tensor:
    """Return zeros, int64 [n]. pin: page-locked, for copies to a GPU.

    NumPy fills them: PyTorch would use all its threads, which other work holds up.
    """
    if not pin:
        return torch.from_numpy(np.zeros(n, np.int64))  # calloc: the system zeroes the pages
    buffer = empty(n, pin)
    buffer.numpy().fill(0)
    return buffer
