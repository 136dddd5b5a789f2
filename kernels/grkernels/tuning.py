"""Launch configurations by GPU and shape: read from checked-in tables, so that no process tunes by surprise.

A family's table for one GPU is `<family>/tuned/<GPU>.json`: {variant: {key: configuration}}. A key names
what the best configuration depends on (`key()` makes one). `python -m grbench kernels tune=true` measures
every candidate configuration and writes the table. What each kernel ran with, and where that came from, is in
`provenance()`, which engines put into their records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

Config = Mapping[str, int]  # what a kernel is launched with: tile sizes, warps, stages

_used: dict[tuple[str, str, str], dict[str, Any]] = {}
_forced: dict[tuple[str, str], Config] = {}
_compiled: list[str] = []


def key(**parts: int | str) -> str:
    """A table key: "batch=8 length=4096 ..."; the caller buckets what is continuous (`bucket`)."""
    return " ".join(f"{name}={value}" for name, value in parts.items())


def bucket(n: int) -> int:
    """The power of two at or above n (1 for n <= 1)."""
    return 1 << max(example(n) - 1, 0).bit_length()


def example(n: Any) -> int:
    """n, or the value of a symbolic size in the example that is traced: launch configurations are chosen by it."""
    value: int = n.node.hint if hasattr(n, "node") else n
    return value


def choose(family: str, variant: str, key: str, default: Config) -> Config:
    """The configuration to launch with: the tuned one for this GPU and key, else `default`.

    Cheap enough for every call: tables are read once, nothing is measured.
    """
    forced = _forced.get((family, variant))
    if forced is not None:
        return forced
    entry = _used.get((family, variant, key))
    if entry is None:
        tuned = _table(family, gpu()).get(variant, {}).get(key)
        entry = {"config": dict(tuned or default), "source": "table" if tuned else "default"}
        _used[family, variant, key] = entry
    config: Config = entry["config"]
    return config


def provenance() -> list[dict[str, Any]]:
    """What every kernel of this process ran with: family, variant, key, config, source ("table" or "default"), gpu."""
    return [
        {"family": family, "variant": variant, "key": key, **entry, "gpu": gpu()}
        for (family, variant, key), entry in _used.items()
    ]


def note_compiled(module: str) -> None:
    """Say that a kernel of this module was compiled, or came from its compiler's cache."""
    _compiled.append(module.removeprefix("grkernels."))


def compiled() -> list[str]:
    """Modules of all kernels that this process compiled so far, in order: ["hstu_attention.triton", ...]. What grows
    while latencies are taken is part of them."""
    return list(_compiled)


def tune(
    family: str, variant: str, key: str, candidates: Sequence[Config], measure: Callable[[], float]
) -> tuple[Config, float]:
    """Run `measure` (a time; inf for a configuration that can't run) under each candidate, write the fastest into
    this GPU's table, and return it with its time. Raises RuntimeError where none could run."""
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
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()
    _used.pop((family, variant, key), None)
    return candidates[index], best


def reset() -> None:
    """Begin `provenance()` anew."""
    _used.clear()


@contextmanager
def forced(family: str, variant: str, config: Config) -> Iterator[None]:
    """Within it, the kernel runs with `config`, whatever the tables say."""
    _forced[family, variant] = config
    try:
        yield
    finally:
        del _forced[family, variant]


@cache
def gpu() -> str:
    """This GPU's name as tables use it, for instance NVIDIA_H100_80GB_HBM3; "cpu" where there is none."""
    import torch

    return torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "cpu"


@cache
def _table(family: str, gpu: str) -> dict[str, dict[str, Config]]:
    path = _path(family, gpu)
    tables: dict[str, dict[str, Config]] = json.loads(path.read_text()) if path.exists() else {}
    return tables


def _path(family: str, gpu: str) -> Path:
    return Path(__file__).parent / family / "tuned" / f"{gpu}.json"
