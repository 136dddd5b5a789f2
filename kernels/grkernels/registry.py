"""Operator families and their variants by name, imported on use."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from grkernels import capabilities, families
from grkernels.families import FamilySpec
from grkernels.nearest import nearest
from grkernels.variant import KernelVariant

FAMILIES = families.load()
_DEVICES = {"cpu": "a CPU", "cuda": "an NVIDIA GPU", "sm90": "an NVIDIA GPU of compute capability 9.0"}


def family(name: str) -> FamilySpec:
    """Return the row of a family. Raises ValueError for an unknown name."""
    if name not in FAMILIES:
        raise ValueError(f"unknown operator family {name!r}; {nearest(name, FAMILIES)}known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def variants(name: str) -> tuple[str, ...]:
    """Return the variants of a family. Raises ValueError for an unknown family."""
    return tuple(family(name).variants)


def names() -> list[tuple[str, str]]:
    """Return every (family, variant)."""
    return [(family, name) for family in FAMILIES for name in variants(family)]


def variant_names() -> tuple[str, ...]:
    """Return every name that is a variant of at least one family."""
    return tuple(dict.fromkeys(name for _, name in names()))


def get(family: str, name: str) -> KernelVariant:
    """Import and return a variant. Raises ValueError for an unknown name."""
    variant: KernelVariant = import_module(_checked(family, name).module(name)).VARIANT
    return variant


def bench(name: str) -> ModuleType:
    """Import and return a family's bench module: shapes, inputs and cost."""
    return import_module(f"{family(name).folder()}.bench")


def availability(family: str, name: str) -> str | None:
    """Return None if the variant's package is installed, else "reason; command that installs it"."""
    needs = _checked(family, name).variants[name]
    return None if find_spec(needs.package) else f"package {needs.package} is not installed; {needs.install}"


def device_kind(device: str) -> str:
    """Return the kind of device, cpu, cuda or sm90 as in `families.Needs`, for cpu or cuda."""
    if device != "cuda":
        return "cpu"
    import torch

    return "sm90" if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) else "cuda"


def misplaced(family: str, name: str, kind: str) -> str | None:
    """Return None if the variant runs on devices of this kind, else the reason."""
    devices = _checked(family, name).variants[name].devices
    if kind not in devices:
        return f"needs {_DEVICES[devices[0]]}"
    return capabilities.compiler() if (kind, name) == ("cpu", "compile") else None


def unsupported(family: str, name: str, *, device: str, dtype: str, **dims: Any) -> str | None:
    """Return None if the variant can run these sizes here, else the reason.

    device: cuda or cpu. dtype: fp32, fp16 or bf16. dims: the family's `FamilySpec.dims`.
    """
    return availability(family, name) or get(family, name).supports(device=device, dtype=dtype, **dims)


def refusal(family: str, name: str, *, device: str, dtype: str, **dims: Any) -> str | None:
    """Return None if the variant can run these sizes here, else the reason and the variants that can."""
    reason = unsupported(family, name, device=device, dtype=dtype, **dims)
    if reason is None:
        return None
    able = [o for o in variants(family) if o != name and not unsupported(family, o, device=device, dtype=dtype, **dims)]
    return f"kernel.{family}={name}: {reason}; supported here: {', '.join(able) or 'none'}"


def _checked(name: str, variant: str) -> FamilySpec:
    if variant not in (known := variants(name)):
        raise ValueError(f"unknown variant {variant!r} of {name}; {nearest(variant, known)}known: {', '.join(known)}")
    return FAMILIES[name]
