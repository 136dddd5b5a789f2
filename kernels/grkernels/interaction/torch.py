"""Feature interaction in eager PyTorch: a batched product and a gather of its upper triangle."""

from __future__ import annotations

import torch
from torch import Tensor

from grkernels import capabilities
from grkernels.interaction.reference import interaction as reference
from grkernels.variant import KernelVariant


def interaction(x: Tensor) -> Tensor:
    """Compute what reference.py defines. As torch.bmm, sum half-precision products in fp32 and round once."""
    F = x.shape[1]
    # Flat indices of the triangle, made on x's device: a list would be copied there at every call.
    row, column = torch.triu_indices(F, F, offset=1, device=x.device)
    products = torch.bmm(x, x.transpose(1, 2)).flatten(1)
    return torch.cat([x[:, 0], products.index_select(1, row * F + column)], dim=1)


VARIANT = KernelVariant("interaction", "torch", interaction, reference, capabilities.eager)
