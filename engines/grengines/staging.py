"""Host buffers in which a batch is put together before it goes to the device in one copy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def zeros(n: int, pin: bool) -> Tensor:
    """int64 [n]. pin: page-locked, for copies to a GPU. Else from the allocator that gives zeros for nothing:
    PyTorch would fill them with all its threads, which other work holds up."""
    if pin:
        return torch.zeros(n, dtype=torch.int64, pin_memory=True)
    return torch.from_numpy(np.zeros(n, np.int64))
