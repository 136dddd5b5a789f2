"""Options of the group `kernel`. Nothing here imports torch: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any

from grkernels import choice, registry
from grkernels.families import AUTO


def _option(default: Any, meaning: str, *choices: str) -> Any:
    # The harness reads a key's meaning and the values that it allows from the metadata.
    return field(default=default, metadata={"help": meaning, "allowed": {"choices": (AUTO, *choices)}})


@dataclass
class KernelGroup:
    """Variant of every operator of the model that has it, unless the family's own field names one."""

    name: str = _option(
        AUTO, "variant of every operator that has it; auto: each one's fastest", *registry.variant_names()
    )

    def requested(self) -> dict[str, str]:
        """Return the variant that is asked for of each family, or auto."""
        return choice.requested(self.name, {family: getattr(self, family) for family in registry.FAMILIES})


# A field for each family: its own variant, auto, or None for the group's.
KernelConfig: type[KernelGroup] = make_dataclass(
    "KernelConfig",
    [
        (name, str | None, _option(None, f"variant of {name}; null: as name says", *registry.variants(name)))
        for name in registry.FAMILIES
    ],
    bases=(KernelGroup,),
    namespace={"__module__": __name__, "__doc__": KernelGroup.__doc__},
)
