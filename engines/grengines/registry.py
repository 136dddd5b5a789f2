"""Engines by name, imported only when one is built."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

from grengines.api import Catalogue, Engine
from grengines.cache.config import CacheConfig

# An engine is one line here: where its class is.
_TABLE: dict[str, str] = {"hstu": "grengines.hstu.engine:HSTUEngine"}


def names() -> list[str]:
    """Every engine."""
    return list(_TABLE)


def availability(name: str) -> str | None:
    """None if the engine can run here, else "why not; command that mends it". Raises ValueError for an unknown name."""
    _target(name)
    return None  # hstu needs nothing but torch, which grbench itself depends on


def build(config: Any, model: Any, kernel: Any, catalogue: Catalogue, seed: int, cache: Any = None) -> Engine:
    """Make the engine `config.name` from its options, the model's, the kernel group's (a dataclass whose fields but
    `name` are operator families) and the cache group's. Raises ValueError for an unknown name, or what the engine
    raises."""
    module, _, attribute = _target(config.name).partition(":")
    families = {f.name: getattr(kernel, f.name) for f in dataclasses.fields(kernel) if f.name != "name"}
    engine: Engine = getattr(import_module(module), attribute)(
        config, model, families, catalogue, seed, cache or CacheConfig()
    )
    return engine


def _target(name: str) -> str:
    if name not in _TABLE:
        raise ValueError(f"unknown engine {name!r}; known: {', '.join(_TABLE)}")
    return _TABLE[name]
