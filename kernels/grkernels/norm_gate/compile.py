"""Norm and gate by torch.compile, from the eager variant."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.norm_gate.reference import norm_gate as reference
from grkernels.norm_gate.torch import norm_gate as eager
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error. Without it they would run the eager variant silently.
norm_gate = torch.compile(eager, fullgraph=True)

VARIANT = KernelVariant("norm_gate", "compile", norm_gate, reference, capabilities.compiled)
