"""Norm and gate as torch.compile makes it of plain PyTorch."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.norm_gate.reference import norm_gate as reference
from grkernels.norm_gate.torch import norm_gate as plain
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error, rather than silently run the plain version.
norm_gate = torch.compile(plain, fullgraph=True)

VARIANT = KernelVariant("norm_gate", "compile", norm_gate, reference, capabilities.compiled)
