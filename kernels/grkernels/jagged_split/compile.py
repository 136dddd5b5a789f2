"""Split of sequences by torch.compile, from the eager variant."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.jagged_split.reference import jagged_split as reference
from grkernels.jagged_split.torch import jagged_split as eager
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error. Without it they would run the eager variant silently.
jagged_split = torch.compile(eager, fullgraph=True)

VARIANT = KernelVariant("jagged_split", "compile", jagged_split, reference, capabilities.compiled)
