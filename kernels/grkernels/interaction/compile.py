"""Feature interaction by torch.compile, from the eager variant."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.interaction.reference import interaction as reference
from grkernels.interaction.torch import interaction as eager
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error. Without it they would run the eager variant silently.
interaction = torch.compile(eager, fullgraph=True)

VARIANT = KernelVariant("interaction", "compile", interaction, reference, capabilities.compiled)
