"""Token embedding as torch.compile makes it of plain PyTorch."""

from __future__ import annotations

import torch

from grkernels import capabilities
from grkernels.token_embedding.reference import token_embedding as reference
from grkernels.token_embedding.torch import token_embedding as plain
from grkernels.variant import KernelVariant

# fullgraph: too many shapes raise an error, rather than silently run the plain version.
token_embedding = torch.compile(plain, fullgraph=True)

VARIANT = KernelVariant("token_embedding", "compile", token_embedding, reference, capabilities.compiled)
