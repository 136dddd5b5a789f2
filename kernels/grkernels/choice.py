"""Choice of a variant for each family: the one that is named, or for auto the fastest that can run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grkernels import registry
from grkernels.families import AUTO, FamilySpec, Sizes
from grkernels.nearest import nearest


class RefusedError(ValueError):
    """A named variant can't run. The message has the reason and the variants that can."""


@dataclass(frozen=True)
class KernelChoice:
    """The variant of each family, and a line for each one before it that auto did not take."""

    variants: dict[str, str]
    passed_over: list[str]

    def actual(self) -> dict[str, Any]:
        """Return the entries of a record."""
        return {"kernels": self.variants, "kernel_choice": self.passed_over}


def requested(name: str, named: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Return the variant that is asked for of each family.

    It is the family's own of `named`; else `name`, for an operator of the model that has such a variant; else auto.
    Raises ValueError for a name that no family has.
    """
    known = (AUTO, *registry.variant_names())
    if name not in known:
        raise ValueError(f"unknown variant {name!r}; {nearest(name, known)}known: {', '.join(known)}")
    named = named or {}
    return {
        family: named.get(family) or (name if spec.of_model and name in spec.variants else AUTO)
        for family, spec in registry.FAMILIES.items()
    }


def choose(
    requested: Mapping[str, str],
    *,
    device: str,
    dtype: str,
    sizes: Sizes,
    allowed: Collection[str] | None = None,
) -> KernelChoice:
    """Choose the variant of each family for a model of these sizes. Nothing is timed.

    Auto is the first variant in the family's order for the device (`FamilySpec.fastest`) that can run and is not slow
    at these sizes (`FamilySpec.slow`). device: cuda or cpu. dtype: fp32, fp16 or bf16. allowed: the only variants that
    auto may take. Raises RefusedError if a named variant can't run.
    """
    chosen: dict[str, str] = {}
    passed_over: dict[tuple[str, str], list[str]] = {}
    for name, asked in requested.items():
        spec = registry.family(name)
        if asked != AUTO:
            if why := registry.refusal(name, asked, device=device, dtype=dtype, **spec.dims(sizes)):
                raise RefusedError(why)
            chosen[name] = asked
            continue
        for variant, reason in _tried(spec, device, dtype, sizes, allowed):
            if reason is None:
                chosen[name] = variant
                break
            passed_over.setdefault((variant, reason), []).append(name)
        else:
            raise RefusedError(f"kernel.{name}=auto: no variant can run here; known: {', '.join(spec.variants)}")
    lines = [f"{variant} passed over for {', '.join(names)}: {why}" for (variant, why), names in passed_over.items()]
    return KernelChoice(chosen, lines)


def _tried(
    spec: FamilySpec, device: str, dtype: str, sizes: Sizes, allowed: Collection[str] | None
) -> Iterator[tuple[str, str | None]]:
    """Yield variants, the fastest on any device first, each with None to take it, else the reason against it."""
    kind = registry.device_kind(device)
    order = spec.fastest[kind]
    for variant in dict.fromkeys((*spec.fastest["sm90"], *order)):
        if variant not in spec.variants:
            continue
        if reason := registry.misplaced(spec.name, variant, kind):
            yield variant, reason
        elif variant not in order:
            yield variant, f"not in the order for {kind}"
        elif allowed is not None and variant not in allowed:
            yield variant, f"this engine takes {', '.join(allowed)} only"
        else:
            refused = registry.unsupported(spec.name, variant, device=device, dtype=dtype, **spec.dims(sizes))
            yield variant, refused or spec.slow(sizes).get(variant)
