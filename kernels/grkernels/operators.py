"""One function for each operator family: a model is built with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from grkernels import registry
from grkernels.rounding import rounded
from grkernels.variant import Projected


class Operators:
    """Functions as attributes named after their family. A family's reference.py documents the signature.

    projected_attention: of the variant of hstu_attention whose operands the projection can write, else None.
    """

    projected_attention: Projected | None = None

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        vars(self).update(functions)

    def __getattr__(self, family: str) -> Callable[..., Any]:  # runs for missing attributes only
        raise AttributeError(f"no function for {family}; known: {', '.join(vars(self))}")

    def replace(self, **functions: Callable[..., Any]) -> Operators:
        """Return a copy with other functions for some families.

        With another attention it has no `projected_attention`, which would be that of the variant replaced.
        """
        none = {"projected_attention": None} if "hstu_attention" in functions else {}
        return Operators(vars(self) | none | functions)

    @classmethod
    def of(cls, variants: Mapping[str, str]) -> Operators:
        """Return the variant that is named for each family. Raises ValueError for an unknown name."""
        named = {family: registry.get(family, name) for family, name in variants.items()}
        made = cls({family: variant.fn for family, variant in named.items()})
        made.projected_attention = named["hstu_attention"].projected if "hstu_attention" in named else None
        return made

    @classmethod
    def eager(cls) -> Operators:
        """Return eager PyTorch in the inputs' dtype."""
        return cls.of(dict.fromkeys(registry.FAMILIES, "torch"))

    @classmethod
    def reference(cls) -> Operators:
        """Return the fp32 references."""
        return cls({family: registry.get(family, "torch").reference for family in registry.FAMILIES})

    @classmethod
    def rounded(cls, dtype: torch.dtype) -> Operators:
        """Return the references with every result rounded to `dtype`: their error sets the tolerances."""
        return cls({family: rounded(fn, dtype) for family, fn in vars(cls.reference()).items()})
