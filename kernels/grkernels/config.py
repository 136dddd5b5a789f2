"""The options of `kernel`: which variant of each operator family runs. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any

from grkernels import registry
from grkernels.families import AUTO


def _option(default: Any, *choices: str) -> Any:
    # The metadata is what a harness shows and checks: the values this key allows.
    return field(default=default, metadata={"allowed": {"choices": (AUTO, *choices)}})


@dataclass
class KernelGroup:
    """`name`: the variant of every family that has it and whose own field is None; the others choose by auto."""

    name: str = _option(AUTO, *registry.variant_names())

    def requested(self) -> dict[str, str]:
        """The variant asked for of each family; auto: the fastest that runs."""
        return registry.requested(self.name, {f: getattr(self, f) for f in registry.FAMILIES})


KernelConfig: type[KernelGroup] = make_dataclass(
    "KernelConfig",
    [(name, str | None, _option(None, *registry.variants(name))) for name in registry.FAMILIES],
    bases=(KernelGroup,),
    namespace={"__module__": __name__, "__doc__": "KernelGroup with a field a family: its own variant."},
)
