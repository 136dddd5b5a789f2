"""Variants by torch.compile."""

from __future__ import annotations

import dataclasses

import torch

from grkernels import capabilities
from grkernels.variant import KernelVariant


def compiled(eager: KernelVariant) -> KernelVariant:
    """Return the variant `compile` of a family: the function of its eager variant, compiled at its first call.

    fullgraph: too many shapes raise an error. Without it they would run the eager variant silently.
    """
    fn = torch.compile(eager.fn, fullgraph=True)
    return dataclasses.replace(eager, name="compile", fn=fn, supports=capabilities.compiled)
