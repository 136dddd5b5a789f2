"""HSTU attention as torch.compile makes it of plain PyTorch."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.hstu_attention.torch import hstu_attention as plain
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error, rather than silently run the plain version.
hstu_attention = torch.compile(plain, fullgraph=True)

VARIANT = KernelVariant("hstu_attention", "compile", hstu_attention, reference, capabilities.compiled)
