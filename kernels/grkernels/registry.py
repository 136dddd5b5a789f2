"""Operator families and their variants by name, imported only when one is used."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from grkernels.variant import KernelVariant


class Entry(NamedTuple):
    """Where a variant is and what it needs."""

    target: str  # "module:attribute" of its KernelVariant
    package: str  # import name of the package it needs
    install: str  # the command that installs that package


# A new variant is one module in its family's folder and one line here.
_TABLE: dict[str, dict[str, Entry]] = {
    "hstu_attention": {
        "torch": Entry("grkernels.hstu_attention.torch:VARIANT", "torch", "pip install 'torch>=2.11'"),
    },
}


def get(family: str, name: str) -> KernelVariant:
    """Import and return a variant. Raises ValueError, listing the known ones, for an unknown name."""
    module, _, attribute = _entry(family, name).target.partition(":")
    variant: KernelVariant = getattr(import_module(module), attribute)
    return variant


def names() -> list[tuple[str, str]]:
    """Every (family, variant)."""
    return [(family, name) for family, variants in _TABLE.items() for name in variants]


def variants(family: str) -> tuple[str, ...]:
    """The variants of a family. Raises ValueError, listing the known ones, for an unknown family."""
    if family not in _TABLE:
        raise ValueError(f"unknown operator family {family!r}; known: {', '.join(_TABLE)}")
    return tuple(_TABLE[family])


def availability(family: str, name: str) -> str | None:
    """None if the variant can be imported here, else "why not; command that mends it"."""
    entry = _entry(family, name)
    return None if find_spec(entry.package) else f"package {entry.package} is not installed; {entry.install}"


def _entry(family: str, name: str) -> Entry:
    if name not in variants(family):
        raise ValueError(f"unknown variant {name!r} of {family}; known: {', '.join(_TABLE[family])}")
    return _TABLE[family][name]
