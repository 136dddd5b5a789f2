"""One function for each operator family: a model is built with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from grkernels import registry
from grkernels.rounding import rounded


class Operators:
    """Functions as attributes named after their family. A family's reference.py documents the signature."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        vars(self).update(functions)

    def __getattr__(self, family: str) -> Callable[..., Any]:  # runs for missing attributes only
        raise AttributeError(f"no function for {family}; known: {', '.join(vars(self))}")

    def replace(self, **functions: Callable[..., Any]) -> Operators:
        """Return a copy with other functions for some families."""
        return Operators(vars(self) | functions)

    @classmethod
    def of(cls, variants: Mapping[str, str]) -> Operators:
        """Return the variant that is named for each family. Raises ValueError for an unknown name."""
        return cls({family: registry.get(family, name).fn for family, name in variants.items()})

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
