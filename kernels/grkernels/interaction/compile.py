"""Feature interaction by torch.compile, from the eager variant."""

from __future__ import annotations

from grkernels.compiled import compiled
from grkernels.interaction.torch import VARIANT as EAGER

VARIANT = compiled(EAGER)
