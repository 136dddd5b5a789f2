"""The configuration of a cache simulation. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from grbench.config import SCHEMAS, ConfigError
from grbench.config import register_schemas as register_groups
from grengines.cache import policies
from grengines.options import option, violations

GROUPS = ("model", "workload", "tracking")


@dataclass
class CacheSimConfig:
    """The root of the configuration: `python -m grbench.cachesim --cfg job` shows it whole."""

    model: Any = field(default_factory=dict)
    workload: Any = field(default_factory=dict)
    policies: list[str] = field(default_factory=list)  # empty: all
    shares: list[float] = option([0.01, 0.03, 0.1, 0.3, 0.6], gt=0, le=1)  # sizes, of all users' last states together
    sizes_gb: list[float] = option([], gt=0)  # sizes in 10^9 bytes, in place of shares
    admit_visit: int = option(1, ge=1)  # the visit from which a user's state is stored
    page: int = option(64, ge=16, le=256)  # tokens of a page
    precision: str = option("bf16", choices=["bf16", "fp16", "fp32"])  # of keys and values
    seed: int = option(0, ge=0, le=2**31 - 1)
    tracking: Any = field(default_factory=dict)
    output_root: str = "outputs"  # results, plot and the MLflow database go here

    @property
    def chosen(self) -> list[str]:
        """The policies to simulate, in the registry's order: lru comes before those that are compared with it."""
        return [name for name in policies.names() if not self.policies or name in self.policies]


def register_schemas() -> None:
    """Make the dataclasses known to Hydra. Safe to call twice."""
    register_groups()
    ConfigStore.instance().store(name="cachesim_schema", node=CacheSimConfig)


def to_config(cfg: DictConfig) -> CacheSimConfig:
    """Check a composed configuration. Raises ConfigError, or OmegaConfBaseException for a value that is missing."""
    _check_keys(map(str, cfg), CacheSimConfig, "")
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, CacheSimConfig)
    for group in GROUPS:
        node, schemas = getattr(config, group), SCHEMAS[group]
        if type(node) not in schemas.values():
            raise ConfigError(f"{group}: build it on one of the schemas {', '.join(schemas)} (see conf/{group}/)")
        _check_keys(vars(node), type(node), f"{group}.")
    if problems := list(violations(config)):
        raise ConfigError("; ".join(problems))
    for name in config.policies:
        if name not in policies.names():
            raise ConfigError(f"policies: unknown {name!r}; known: {', '.join(policies.names())}")
    if not config.shares and not config.sizes_gb:
        raise ConfigError("shares=[]: allowed is at least one size, here or in sizes_gb")
    return config


def _check_keys(keys: Any, schema: type, path: str) -> None:
    known = [f.name for f in dataclasses.fields(schema)]
    for key in keys:
        if key not in known:
            raise ConfigError(f"{path}{key}: no such key; known keys: {', '.join(sorted(known))}")
