"""Configuration of a cache simulation. This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from grbench.cachesim.fleet import FleetConfig
from grbench.cachesim.routing import ROUTINGS
from grbench.config.schema import ConfigError, checked
from grbench.config.schema import register_schemas as register_groups
from grengines.cache import policies
from grengines.cache.config import EIGHT_BITS
from grengines.models.hstu.config import HSTUConfig, stale_states
from grengines.options import option
from grkernels.nearest import nearest


@dataclass
class CacheSimConfig:
    """Root of the configuration. `python -m grbench cachesim --cfg job` prints it."""

    model: Any = field(default_factory=dict)
    workload: Any = field(default_factory=dict)
    policies: list[str] = option([], "cache policies to simulate (lru, lfu, gdsf, predictive, none); empty: all")
    shares: list[float] = option(
        [0.01, 0.03, 0.1, 0.3, 0.6], "cache sizes, as shares of the last states of all users together", gt=0, le=1
    )
    sizes_gb: list[float] = option([], "cache sizes in 10^9 bytes; they replace `shares`", gt=0)
    admit_visit: int = option(
        1, "visit from which a user's state is stored; 0: the first while enough users return, else the second", ge=0
    )
    host_times: float = option(0.0, "size of the host tier, in sizes of the cache on the device; 0: none", ge=0, le=1e6)
    host_admit_visit: int = option(2, "visit from which the host takes a user's evicted state", ge=1)
    storage_times: float = option(0.0, "size of a storage tier below the host, likewise; 0: none", ge=0, le=1e6)
    replicas: int = option(1, "replicas, each with an equal part of every size", ge=1, le=1024)
    routing: str = option(
        "affinity", "a request goes to its user's replica by a consistent hash, to a random one, or to its user's "
        "unless that has over 1.25 of the mean load", choices=ROUTINGS,
    )  # fmt: skip
    window_s: float = option(0.03, "time that a request is load, for routing=bounded: its latency", gt=0)
    page: int = option(64, "tokens of a page", ge=16, le=256)
    precision: str = option("bf16", "precision of keys and values", choices=["bf16", "fp16", "fp32", *EIGHT_BITS])
    seed: int = option(0, "seed of the trace", ge=0, le=2**31 - 1)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    tracking: Any = field(default_factory=dict)
    output_root: str = option("outputs", "folder for results, plots and the MLflow database")

    @property
    def chosen(self) -> list[str]:
        """Policies to simulate, in the registry's order: lru precedes those that are compared with it."""
        return [name for name in policies.names() if not self.policies or name in self.policies]


def register_schemas() -> None:
    """Register the dataclasses with Hydra. Safe to call twice."""
    register_groups()
    ConfigStore.instance().store(name="cachesim_schema", node=CacheSimConfig)


def to_config(cfg: DictConfig) -> CacheSimConfig:
    """Check a composed configuration.

    Raises as `checked`, and ConfigError for another model than HSTU, an unknown policy or no size.
    """
    config = checked(cfg, CacheSimConfig)
    if not isinstance(config.model, HSTUConfig):
        allowed = "the simulator has states of HSTU only; allowed are its models, such as model=hstu_tiny"
        raise ConfigError(f"model={config.model.name}: {allowed}")
    if problem := stale_states(config.model):
        raise ConfigError(problem)
    known = policies.names()
    for name in config.policies:
        if name not in known:
            raise ConfigError(f"policies: unknown {name!r}; {nearest(name, known)}known: {', '.join(known)}")
    if not config.shares and not config.sizes_gb:
        raise ConfigError("shares=[]: allowed is at least one size, here or in sizes_gb")
    if config.storage_times and not config.host_times:
        raise ConfigError(f"storage_times={config.storage_times:g}: storage lies below the host; set host_times too")
    return config
