"""Concatenation of sequences as torch.compile makes it of plain PyTorch."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.jagged_concat.reference import jagged_concat as reference
from grkernels.jagged_concat.torch import jagged_concat as plain
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error, rather than silently run the plain version.
jagged_concat = torch.compile(plain, fullgraph=True)

VARIANT = KernelVariant("jagged_concat", "compile", jagged_concat, reference, capabilities.compiled)
