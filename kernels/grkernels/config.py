"""The options of `kernel`: which variant of each operator family runs. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any

from grkernels import registry
from grkernels.families import AUTO


def _option(default: Any, help: str, *choices: str) -> Any:
    # The metadata is for the harness: it shows the meaning, and checks the allowed values.
    return field(default=default, metadata={"help": help, "allowed": {"choices": (AUTO, *choices)}})


@dataclass
class KernelGroup:
    """`name`: the variant of every family that has it and whose own field is None; the others choose by auto."""

    name: str = _option(
        AUTO, "variant of every family that has it; auto: the fastest that runs", *registry.variant_names()
    )

    def requested(self) -> dict[str, str]:
        """The variant asked for of each family; auto: the fastest that runs."""
        return registry.requested(self.name, {f: getattr(self, f) for f in registry.FAMILIES})


KernelConfig: type[KernelGroup] = make_dataclass(
    "KernelConfig",
    [
        (name, str | None, _option(None, f"variant of: {spec.summary}; null: as `name`", *spec.variants))
        for name, spec in registry.FAMILIES.items()
    ],
    bases=(KernelGroup,),
    namespace={
        "__module__": __name__,
        "__doc__": "Variants of the operators: one for all families, or one for each.",
    },
)
