"""One implementation of every operator family: the functions that a model is built with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grkernels import registry


class Operators:
    """Functions by the name of their family, as attributes; reference.py of a family documents the signature."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        vars(self).update(functions)

    def __getattr__(self, family: str) -> Callable[..., Any]:  # only of what __init__ didn't set
        raise AttributeError(f"no implementation of {family} was chosen; there are {', '.join(vars(self))}")

    def replace(self, **functions: Callable[..., Any]) -> Operators:
        """The same with these functions instead."""
        return Operators(vars(self) | functions)

    @classmethod
    def of(cls, variants: Mapping[str, str]) -> Operators:
        """The variant named for each family. Raises ValueError for an unknown name."""
        return cls({family: registry.get(family, name).fn for family, name in variants.items()})

    @classmethod
    def eager(cls) -> Operators:
        """Eager PyTorch in the inputs' dtype: the measure of tolerances."""
        return cls.of(dict.fromkeys(registry.FAMILIES, "torch"))

    @classmethod
    def reference(cls) -> Operators:
        """The fp32 references."""
        return cls({family: registry.get(family, "torch").reference for family in registry.FAMILIES})
