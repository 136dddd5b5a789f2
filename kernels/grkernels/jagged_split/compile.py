"""Splitting of sequences as torch.compile makes it of plain PyTorch."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.jagged_split.reference import jagged_split as reference
from grkernels.jagged_split.torch import jagged_split as plain
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error, rather than silently run the plain version.
jagged_split = torch.compile(plain, fullgraph=True)

VARIANT = KernelVariant("jagged_split", "compile", jagged_split, reference, capabilities.compiled)
