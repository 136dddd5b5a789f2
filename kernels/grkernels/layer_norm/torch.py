"""LayerNorm by PyTorch's own operator."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from grkernels import capabilities
from grkernels.layer_norm.reference import layer_norm as reference
from grkernels.variant import KernelVariant


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Compute what reference.py defines."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


VARIANT = KernelVariant("layer_norm", "torch", layer_norm, reference, capabilities.eager)
