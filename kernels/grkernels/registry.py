"""Operator families and their variants by name, imported only when one is used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from grkernels import capabilities, families
from grkernels.families import AUTO, FamilySpec, Sizes
from grkernels.variant import KernelVariant

FAMILIES = families.load()
_DEVICES = {"cpu": "a CPU", "cuda": "an NVIDIA GPU", "sm90": "an NVIDIA GPU of compute capability 9.0"}


class RefusedError(ValueError):
    """A variant that was named can't run: why, and the variants that can."""


@dataclass(frozen=True)
class KernelChoice:
    """The variant of each family that runs, and a line for each faster one that doesn't."""

    variants: dict[str, str]
    passed_over: list[str]

    def actual(self) -> dict[str, Any]:
        """Entries of a record."""
        return {"kernels": self.variants, "kernel_choice": self.passed_over}


def family(name: str) -> FamilySpec:
    """The row of a family. Raises ValueError, listing the known ones, for an unknown name."""
    if name not in FAMILIES:
        raise ValueError(f"unknown operator family {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def get(family: str, name: str) -> KernelVariant:
    """Import and return a variant. Raises ValueError, listing the known ones, for an unknown name."""
    variant: KernelVariant = import_module(_checked(family, name).module(name)).VARIANT
    return variant


def bench(name: str) -> ModuleType:
    """The shapes that a family is measured at, their inputs and their cost."""
    return import_module(f"{family(name).folder()}.bench")


def names() -> list[tuple[str, str]]:
    """Every (family, variant)."""
    return [(family, name) for family in FAMILIES for name in variants(family)]


def variants(name: str) -> tuple[str, ...]:
    """The variants of a family. Raises ValueError, listing the known ones, for an unknown family."""
    return tuple(family(name).variants)


def variant_names() -> tuple[str, ...]:
    """The names that some family has a variant of."""
    return tuple(dict.fromkeys(name for _, name in names()))


def availability(family: str, name: str) -> str | None:
    """None if the variant can be imported here, else "why not; command that installs it"."""
    needs = _checked(family, name).variants[name]
    return None if find_spec(needs.package) else f"package {needs.package} is not installed; {needs.install}"


def device_kind(device: str) -> str:
    """cpu or cuda -> cpu, cuda or sm90, as `families.Needs` has them."""
    if device != "cuda":
        return "cpu"
    import torch

    return "sm90" if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) else "cuda"


def misplaced(family: str, name: str, kind: str) -> str | None:
    """None if the variant runs on a device of this kind, else what it needs."""
    devices = _checked(family, name).variants[name].devices
    if kind not in devices:
        return f"needs {_DEVICES[devices[0]]}"
    return capabilities.compiler() if (kind, name) == ("cpu", "compile") else None


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


def requested(name: str, named: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The variant asked for of each family: its own of `named`, else `name` if it is the model's and has it, else auto.

    Raises ValueError for a name that no family has.
    """
    if name != AUTO and name not in variant_names():
        raise ValueError(f"unknown variant {name!r}; known: {', '.join((AUTO, *variant_names()))}")
    named = named or {}
    return {
        family: named.get(family) or (name if spec.of_model and name in spec.variants else AUTO)
        for family, spec in FAMILIES.items()
    }


def choose(
    requested: Mapping[str, str],
    *,
    device: str,
    dtype: str,
    sizes: Sizes,
    allowed: Collection[str] | None = None,
) -> KernelChoice:
    """The variant of each family for a model of these sizes on cpu or cuda. Nothing is timed.

    A family that asks for auto gets the first of its order for this device (`FamilySpec.fastest`) that can run.
    allowed: the only variants that auto may take. Raises RefusedError where a variant that is named can't run.
    """
    kind = device_kind(device)
    chosen: dict[str, str] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, asked in requested.items():
        spec = family(name)
        dims = spec.dims(sizes)
        if asked != AUTO:
            if why := refusal(name, asked, device=device, dtype=dtype, **dims):
                raise RefusedError(why)
            chosen[name] = asked
            continue
        order = spec.fastest[kind]
        for variant in dict.fromkeys((*spec.fastest["sm90"], *order)):
            if variant not in spec.variants:
                continue
            why = misplaced(name, variant, kind)
            if why is None and allowed is not None and variant not in allowed:
                why = f"this engine takes {', '.join(allowed)} only"
            why = why or _reason(name, variant, device=device, dtype=dtype, **dims)
            if why is None and variant in order:
                chosen[name] = variant
                break
            reasons.setdefault((variant, why or f"not in the order for {kind}"), []).append(name)
        else:
            refused = [f"{variant} {why}" for (variant, why), families in reasons.items() if name in families]
            raise RefusedError(f"kernel.{name}=auto: no variant can run here: {'; '.join(refused)}")
    lines = [f"{variant} passed over for {', '.join(names)}: {why}" for (variant, why), names in reasons.items()]
    return KernelChoice(chosen, lines)


def _reason(family: str, name: str, *, device: str, dtype: str, **dims: int) -> str | None:
    return availability(family, name) or get(family, name).supports(device=device, dtype=dtype, **dims)


def _checked(name: str, variant: str) -> FamilySpec:
    if variant not in variants(name):
        raise ValueError(f"unknown variant {variant!r} of {name}; known: {', '.join(variants(name))}")
    return FAMILIES[name]
