"""Token embedding by torch.compile, from the eager variant."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.token_embedding.reference import token_embedding as reference
from grkernels.token_embedding.torch import token_embedding as eager
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error. Without it they would run the eager variant silently.
token_embedding = torch.compile(eager, fullgraph=True)

VARIANT = KernelVariant("token_embedding", "compile", token_embedding, reference, capabilities.compiled)
