"""Choice of a variant for each family: the one that is named, or for auto the fastest that can run, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from grkernels import registry
from grkernels.families import AUTO, FamilySpec, Sizes
from grkernels.nearest import nearest

_BUSY: ContextVar[str] = ContextVar("busy", default="")  # what the device does besides, as `beside` says
NEAR = 1.05  # times the least: of times so near each other the order decides, so that starts agree


class RefusedError(ValueError):
    """A named variant can't run. The message has the reason and the variants that can."""


@dataclass(frozen=True)
class KernelChoice:
    """The variant of each family, and a line for each: why it is that one, and why not those before it."""

    variants: dict[str, str]
    reasons: dict[str, str]

    def actual(self) -> dict[str, Any]:
        """Return the entries of a record."""
        return {"kernels": self.variants, "kernel_choice": self.reasons}


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


@contextmanager
def beside(work: str) -> Iterator[None]:
    """Time no variants inside the context, because `work` keeps the device busy. Times of before are used."""
    token = _BUSY.set(work)
    try:
        yield
    finally:
        _BUSY.reset(token)


def choose(
    requested: Mapping[str, str],
    *,
    device: str,
    dtype: str,
    sizes: Sizes,
    allowed: Collection[str] | None = None,
) -> KernelChoice:
    """Choose the variant of each family for a model of these sizes.

    Auto is the first variant in the family's order for the device (`FamilySpec.fastest`) that can run and is not slow
    (`FamilySpec.slow`). Where the order is not measured for this device, or its first variant refuses these sizes, the
    variants that can run are timed, if times of single calls say how fast an engine is with them (`_untimed`).
    device: cuda or cpu. dtype: fp32, fp16 or bf16. allowed: the only variants that auto may take. Raises RefusedError
    if a named variant can't run, or none of a family.
    """
    variants, reasons = {}, {}
    for name, asked in requested.items():
        spec = registry.family(name)
        if asked == AUTO:
            variants[name], why = _fastest(spec, device, dtype, sizes, allowed)
        elif refused := registry.refusal(name, asked, device=device, dtype=dtype, **spec.dims(sizes)):
            raise RefusedError(refused)
        else:
            variants[name], why = asked, "named in the configuration"
        reasons[name] = f"{variants[name]}: {why}"
    return KernelChoice(variants, reasons)


def _fastest(
    spec: FamilySpec, device: str, dtype: str, sizes: Sizes, allowed: Collection[str] | None
) -> tuple[str, str]:
    """Return the variant that auto takes, and why."""
    kind = registry.device_kind(device)
    unmeasured = "" if kind in spec.measured else f"no order is measured for {kind}"
    able: list[str] = []
    against: list[str] = []
    elsewhere = [variant for variant in spec.fastest["sm90"] if variant not in spec.fastest[kind]]
    for variant in (*elsewhere, *spec.fastest[kind]):
        if variant not in spec.variants:
            continue
        if why := _passed_over(spec, variant, kind, sizes, allowed):
            against.append(f"{variant}: {why}")
        elif why := registry.unsupported(spec.name, variant, device=device, dtype=dtype, **spec.dims(sizes)):
            against.append(f"{variant}: {why}")
            unmeasured = unmeasured or f"no order is measured for what {variant} refuses"
        else:
            able.append(variant)
            if not unmeasured:
                break
    if not able:
        raise RefusedError(f"kernel.{spec.name}=auto: no variant can run here; {'; '.join(against)}")
    taken = able[0]
    if not unmeasured:
        why = f"the first that can run in the order measured for {kind} (grkernels/families.py)"
    elif len(able) == 1:
        why = "the only one left"
    elif untimed := _untimed(spec, sizes):
        why = f"the first that can run in the order; {unmeasured}, and none is timed, because {untimed}"
    else:
        taken, why = _timed(spec, able, device, dtype, sizes, unmeasured)
    return taken, "; ".join([why, *against])


def _passed_over(
    spec: FamilySpec, variant: str, kind: str, sizes: Sizes, allowed: Collection[str] | None
) -> str | None:
    """Return None to try the variant, else the reason against it, which leaves the order of the others as it is."""
    if why := registry.misplaced(spec.name, variant, kind):
        return why
    if variant not in spec.fastest[kind]:
        return f"not in the order for {kind}"
    if allowed is not None and variant not in allowed:
        return f"this engine takes {', '.join(allowed)} only"
    return registry.availability(spec.name, variant) or spec.slow(sizes).get(variant)


def _untimed(spec: FamilySpec, sizes: Sizes) -> str | None:
    """Return None if single calls of variants can be timed and say how fast an engine is with them, else why not."""
    if sizes.captured:
        return "launches cost nothing in CUDA graphs"
    if sizes.compiled:
        return "Inductor compiles torch together with what is around it"
    if not hasattr(registry.bench(spec.name), "of_model"):
        return f"{spec.folder()}.bench has no of_model, the inputs of a model"
    return None


def _timed(
    spec: FamilySpec, able: list[str], device: str, dtype: str, sizes: Sizes, unmeasured: str
) -> tuple[str, str]:
    """Time these variants, and return the fastest and what was measured, or the first if the device is busy."""
    from grkernels import timing  # imports torch, and configurations compose without it

    busy = _BUSY.get()
    times = timing.times(spec.name, tuple(able), device, dtype, sizes, known=bool(busy))
    if not times:
        return able[0], f"the first that can run in the order; {unmeasured}, and none is timed beside {busy}"
    ms = {name: value for name, value in times.items() if isinstance(value, float)}
    words = [f"{name} {value:.3g} ms" if name in ms else f"{name} failed ({value})" for name, value in times.items()]
    shown = f"by a timing of {len(able)} variants: {', '.join(words)}"
    if not ms:
        raise RefusedError(f"kernel.{spec.name}=auto: {shown}")
    taken = next(name for name in able if name in ms and ms[name] <= NEAR * min(ms.values()))
    return taken, f"{shown}, because {unmeasured}"
