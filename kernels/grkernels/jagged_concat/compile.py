"""Concatenation of sequences by torch.compile, from the eager variant."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.jagged_concat.reference import jagged_concat as reference
from grkernels.jagged_concat.torch import jagged_concat as eager
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error. Without it they would run the eager variant silently.
jagged_concat = torch.compile(eager, fullgraph=True)

VARIANT = KernelVariant("jagged_concat", "compile", jagged_concat, reference, capabilities.compiled)
