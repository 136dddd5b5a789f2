"""LayerNorm by PyTorch's own operator."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from grkernels import capabilities
from grkernels.fp8 import Scaled
from grkernels.layer_norm.reference import layer_norm as reference
from grkernels.variant import KernelVariant


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, to: str = "") -> Tensor | Scaled:
    """Compute what reference.py defines."""
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return Scaled.of(y) if to else y


VARIANT = KernelVariant("layer_norm", "torch", layer_norm, reference, capabilities.eager)
