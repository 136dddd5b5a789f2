"""LayerNorm as torch.compile makes it of plain PyTorch."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.layer_norm.reference import layer_norm as reference
from grkernels.layer_norm.torch import layer_norm as plain
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error, rather than silently run the plain version.
layer_norm = torch.compile(plain, fullgraph=True)

VARIANT = KernelVariant("layer_norm", "compile", layer_norm, reference, capabilities.compiled)
