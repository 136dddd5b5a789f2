"""One implementation of every operator family: what a model is built with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from grkernels import registry


class Operators(NamedTuple):
    """A function for each family of `grkernels.registry`, with the signature that its reference.py documents."""

    hstu_attention: Callable[..., Any]
    norm_gate: Callable[..., Any]
    layer_norm: Callable[..., Any]
    interaction: Callable[..., Any]
    jagged_concat: Callable[..., Any]
    jagged_split: Callable[..., Any]
    token_embedding: Callable[..., Any]

    @classmethod
    def of(cls, variants: Mapping[str, str]) -> Operators:
        """The variant that is named for each family. Raises ValueError for an unknown name."""
        return cls(**{family: registry.get(family, variants[family]).fn for family in cls._fields})

    @classmethod
    def plain(cls) -> Operators:
        """Plain PyTorch in the inputs' dtype: what tolerances are measured by."""
        return cls.of(dict.fromkeys(cls._fields, "torch"))

    @classmethod
    def reference(cls) -> Operators:
        """The fp32 references."""
        return cls(**{family: registry.get(family, "torch").reference for family in cls._fields})
