"""Launch configurations by GPU and shape, from checked-in tables. A run never tunes by itself.

A family's table for one GPU is `<family>/tuned/<GPU>.json`: {variant: {key: configuration}}. A key (`key`) names the
sizes that the best configuration depends on. `python -m grbench kernels tune=true` measures every candidate
configuration and writes the table. `provenance` lists the configuration of each kernel and its source; engines put the
list into their records.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from grkernels import registry

Config = Mapping[str, int]  # tile sizes, warps, stages of a launch

_used: dict[tuple[str, str, str], dict[str, Any]] = {}
_forced: dict[tuple[str, str], Config] = {}
_changed: dict[tuple[str, str], Config] = {}
_compiled: list[str] = []


def key(**parts: int | str) -> str:
    """Return a table key, such as "batch=8 length=4096". The caller rounds continuous sizes (`bucket`)."""
    return " ".join(f"{name}={value}" for name, value in parts.items())


def bucket(n: int) -> int:
    """Return the power of two at or above n; 1 for n <= 1."""
    return 1 << max(example(n) - 1, 0).bit_length()


def example(n: Any) -> int:
    """Return n, or the traced example's value of a symbolic size. Launch configurations are chosen by it."""
    value: int = n.node.hint if hasattr(n, "node") else n
    return value


def choose(family: str, variant: str, key: str, default: Config) -> Config:
    """Return the tuned configuration for this GPU and key, else `default`.

    It is cheap enough for every call: tables are read once, and nothing is measured.
    """
    forced = _forced.get((family, variant))
    if forced is not None:
        return forced
    change = _changed.get((family, variant))
    used = (family, variant, f"{key}, changed: {words(change)}" if change else key)
    entry = _used.get(used)
    if entry is None:
        tuned = _table(family, gpu()).get(variant, {}).get(key)
        entry = {"config": {**(tuned or default), **(change or {})}, "source": "table" if tuned else "default"}
        _used[used] = entry
    config: Config = entry["config"]
    return config


def provenance() -> list[dict[str, Any]]:
    """Return this process's launch configurations: family, variant, key, config, source (table or default), gpu."""
    return [
        {"family": family, "variant": variant, "key": key, **entry, "gpu": gpu()}
        for (family, variant, key), entry in _used.items()
    ]


def note_compiled(module: str) -> None:
    """Record that a kernel of this module was compiled, or came from its compiler's cache."""
    _compiled.append(module.removeprefix("grkernels."))


def compiled() -> list[str]:
    """Return the modules of all kernels that this process compiled so far, in order: ["hstu_attention.triton", ...].

    If the list grows during a measurement, the latencies include compiling.
    """
    return list(_compiled)


def tune(
    family: str, variant: str, key: str, candidates: Sequence[Config], measure: Callable[[], float]
) -> tuple[Config, float]:
    """Measure each candidate, write the fastest into this GPU's table, and return it with its time.

    measure: runs the kernel and returns a time, or infinity if the configuration can't run. Raises RuntimeError if no
    candidate can run.
    """
    timed: list[tuple[float, int]] = []
    for i, candidate in enumerate(candidates):
        with forced(family, variant, candidate):
            timed.append((measure(), i))
    best, index = min(timed)
    if best == float("inf"):
        raise RuntimeError(f"{family} {variant}: none of {len(candidates)} configurations could run at {key}")
    path = _path(family, gpu())
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault(variant, {})[key] = dict(candidates[index])
    path.parent.mkdir(exist_ok=True)
    whole = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    whole.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    whole.replace(path)  # other processes read it
    _table.cache_clear()
    _used.pop((family, variant, key), None)
    return candidates[index], best


def reset() -> None:
    """Empty `provenance`."""
    _used.clear()


@contextmanager
def unlisted() -> Iterator[None]:
    """Leave what runs inside the context out of `provenance`."""
    before = dict(_used)
    try:
        yield
    finally:
        _used.clear()
        _used.update(before)


@contextmanager
def forced(family: str, variant: str, config: Config) -> Iterator[None]:
    """Run the kernel with `config` inside the context, whatever the tables say."""
    _forced[family, variant] = config
    try:
        yield
    finally:
        del _forced[family, variant]


@contextmanager
def changed(family: str, variant: str, change: Config) -> Iterator[None]:
    """Run the kernel inside the context with `change` to the configuration that it would have."""
    _changed[family, variant] = change
    try:
        yield
    finally:
        del _changed[family, variant]


def words(config: Config) -> str:
    """Return a configuration as text, such as "m=128 n=64"."""
    return " ".join(f"{name}={value}" for name, value in config.items())


@cache
def gpu() -> str:
    """Return this GPU's name as tables spell it, such as NVIDIA_H100_80GB_HBM3; "cpu" without a GPU."""
    import torch

    return torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "cpu"


@cache
def _table(family: str, gpu: str) -> dict[str, dict[str, Config]]:
    path = _path(family, gpu)
    tables: dict[str, dict[str, Config]] = json.loads(path.read_text()) if path.exists() else {}
    return tables


def _path(family: str, gpu: str) -> Path:
    folder = import_module(registry.family(family).folder())
    return Path(*folder.__path__) / "tuned" / f"{gpu}.json"
