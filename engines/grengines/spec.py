"""The row that describes an engine, and the row that describes a kind of model, to everything outside their folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.last_layer import LastLayer
from grengines.models.decoder.config import DecoderConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.refusals import Asked

ModelOptions = HSTUConfig | DecoderConfig
CacheOptions = CacheConfig | PagedCacheConfig
TASKS = ("rank", "generate", "recommend")


class EngineOptions(Protocol):
    """The options of an engine, a dataclass. Their name is the engine's."""

    name: str


@runtime_checkable
class PrecisionOptions(EngineOptions, Protocol):
    """Options of an engine that has a precision."""

    precision: str


@dataclass(frozen=True)
class Package:
    """An optional package that an engine needs."""

    module: str  # its import name
    distributions: tuple[str, ...]  # the names that pip may know it by
    install: str  # the command that installs it

    def missing(self) -> str | None:
        """Return None if it can be imported here, else "reason; command"."""
        return None if find_spec(self.module) else f"package {self.module} is not installed; {self.install}"


@dataclass(frozen=True)
class EngineSpec:
    """One engine. Nothing here imports it: its modules are named as "module:attribute"."""

    name: str
    options: type  # the dataclass of its options; its field `name` is the engine's name
    tasks: Mapping[str, str]  # of TASKS, each with what builds it from (options, Setup); the first is the default
    models: tuple[str, ...] = ("hstu",)  # the kinds that it runs
    packages: tuple[Package, ...] = ()
    # Returns None if the engine can run here, else "reason; command". By default it needs all of `packages`.
    requires: Callable[[], str | None] | None = None
    # None: it takes a batch while the device computes another. Else why it does not.
    one_at_a_time: str | None = "ends a batch before it takes the next"
    # Returns None, or why the engine can't have these options (Asked) beside its own (the first), whatever the machine.
    contradiction: Callable[[Any, Asked], str | None] = lambda options, asked: None
    # Returns the rows that its last layer computes for a task with these options (the first); None: not known here.
    last_layer: Callable[[Any, str], LastLayer | None] = lambda options, task: None
    variants: bool = False  # it runs the HSTU of any owner (`model.variant`), or leaves that to others
    # Time of its first start, as a multiple of that of `hstu`; about 4 if it exports or compiles the whole model. A
    # search assumes it until it has started the engine.
    start_cost: float = 1.0
    # What engine.precision=auto is: on a GPU, on a CPU. `registry.precision_of` reads it.
    auto_precision: tuple[str, str] = ("bf16", "fp32")
    can_stand_in: bool = False  # other engines may name it in engine.fallback
    stages: Mapping[str, str] = field(default_factory=dict)  # its options that are another engine's: the task of each


@dataclass(frozen=True)
class ModelSpec:
    """One kind of model."""

    kind: str
    options: type  # the dataclass of its options
    reference: str  # "module:attribute" of its grengines.models.reference.GenerationReference
    # Returns None, or which of its options do not fit together.
    contradiction: Callable[[Any], str | None] = lambda options: None
