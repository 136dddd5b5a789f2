"""HSTU attention of torch.py, compiled by torch.compile."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.hstu_attention.torch import hstu_attention as eager
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error instead of running the eager version silently.
hstu_attention = torch.compile(eager, fullgraph=True)

VARIANT = KernelVariant("hstu_attention", "compile", hstu_attention, reference, capabilities.compiled)
