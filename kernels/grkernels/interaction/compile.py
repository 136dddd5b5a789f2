"""Feature interaction as torch.compile makes it of plain PyTorch."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.interaction.reference import interaction as reference
from grkernels.interaction.torch import interaction as plain
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error, rather than silently run the plain version.
interaction = torch.compile(plain, fullgraph=True)

VARIANT = KernelVariant("interaction", "compile", interaction, reference, capabilities.compiled)
