"""Operator families and their variants by name, imported only when one is used."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from grkernels.variant import KernelVariant


class Needs(NamedTuple):
    """What a kind of variant needs."""

    package: str  # import name
    install: str  # the command that installs it


_NEEDS = {
    "torch": Needs("torch", "pip install 'torch>=2.11'"),
    "compile": Needs("torch", "pip install 'torch>=2.11'"),
    "triton": Needs("triton", "pip install 'triton>=3.6'"),
    "cutlass": Needs("cutlass", "pip install 'nvidia-cutlass-dsl[cu13]>=4.8'"),
}

# A new variant is one module, grkernels/<family>/<variant>.py with its KernelVariant as VARIANT, and its name here.
_VARIANTS = {
    "hstu_attention": ("torch", "compile", "triton", "cutlass"),
    "norm_gate": ("torch", "compile", "triton", "cutlass"),
    "layer_norm": ("torch", "compile", "triton", "cutlass"),
    "interaction": ("torch", "compile", "triton", "cutlass"),
    "jagged_concat": ("torch", "compile", "triton", "cutlass"),
    "jagged_split": ("torch", "compile", "triton", "cutlass"),
    "token_embedding": ("torch", "compile", "triton", "cutlass"),
}
FAMILIES = tuple(_VARIANTS)


def get(family: str, name: str) -> KernelVariant:
    """Import and return a variant. Raises ValueError, listing the known ones, for an unknown name."""
    _check(family, name)
    variant: KernelVariant = import_module(f"grkernels.{family}.{name}").VARIANT
    return variant


def names() -> list[tuple[str, str]]:
    """Every (family, variant)."""
    return [(family, name) for family in FAMILIES for name in variants(family)]


def variants(family: str) -> tuple[str, ...]:
    """The variants of a family. Raises ValueError, listing the known ones, for an unknown family."""
    if family not in _VARIANTS:
        raise ValueError(f"unknown operator family {family!r}; known: {', '.join(FAMILIES)}")
    return _VARIANTS[family]


def availability(family: str, name: str) -> str | None:
    """None if the variant can be imported here, else "why not; command that mends it"."""
    _check(family, name)
    package, install = _NEEDS[name]
    return None if find_spec(package) else f"package {package} is not installed; {install}"


def refusal(family: str, name: str, *, device: str, dtype: str, **dims: int) -> str | None:
    """None if the variant can run these sizes here, else why not and which variants can.

    dims: what the family's `supports` takes beside device ("cuda" or "cpu") and dtype (fp32, fp16 or bf16).
    """
    reason = _reason(family, name, device=device, dtype=dtype, **dims)
    if reason is None:
        return None
    others = [
        o for o in variants(family) if o != name and _reason(family, o, device=device, dtype=dtype, **dims) is None
    ]
    return f"kernel.{family}={name}: {reason}; supported here: {', '.join(others) or 'none'}"


def _reason(family: str, name: str, *, device: str, dtype: str, **dims: int) -> str | None:
    return availability(family, name) or get(family, name).supports(device=device, dtype=dtype, **dims)


def _check(family: str, name: str) -> None:
    if name not in variants(family):
        raise ValueError(f"unknown variant {name!r} of {family}; known: {', '.join(variants(family))}")
