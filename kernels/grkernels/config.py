"""Which variant of each operator family runs. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from grkernels import registry


@dataclass
class KernelConfig:
    """One field a family (but `name`): the variant to use, one of `grkernels.registry`."""

    name: str = "torch"
    # The metadata is what a harness shows and checks: the values this key allows.
    hstu_attention: str = field(default="torch", metadata={"allowed": {"choices": registry.variants("hstu_attention")}})
