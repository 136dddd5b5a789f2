"""LayerNorm by torch.compile, from the eager variant."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.layer_norm.reference import layer_norm as reference
from grkernels.layer_norm.torch import layer_norm as eager
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error. Without it they would run the eager variant silently.
layer_norm = torch.compile(eager, fullgraph=True)

VARIANT = KernelVariant("layer_norm", "compile", layer_norm, reference, capabilities.compiled)
