"""Host buffers in which a batch is put together before it goes to the device in one copy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def zeros(n: int, pin: bool) -> Tensor:
    """int64 [n]. pin: page-locked, for copies to a GPU. Zeros come from NumPy: PyTorch would fill them with all its
    threads, which other work holds up."""
    if not pin:
        return torch.from_numpy(np.zeros(n, np.int64))  # from the allocator that gives them for nothing
    buffer = torch.empty(n, dtype=torch.int64, pin_memory=True)
    buffer.numpy().fill(0)
    return buffer
