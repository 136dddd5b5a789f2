"""Options of the caches: the users' KV cache, and item vectors. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.cache.policies import names
from grengines.options import option

EIGHT_BITS = ("int8", "fp8")  # fp8: e4m3
ITEM_MEMORY = (
    "device memory of token vectors, 10^9 bytes: the hot rows of an item table on the host; 0: the whole table"
)


@dataclass
class CacheConfig:
    """No user-state cache: every request is encoded from its whole history."""

    name: str = option("none", "name of the cache in records", choices=["none"])
    item_memory_gb: float = option(0.0, ITEM_MEMORY, ge=0)


@dataclass
class PagedCacheConfig:
    """KV cache of users' histories, in pages on the device. For a returning user only new events are encoded."""

    name: str = option("lru", "name of the cache in records")
    policy: str = option(
        "lru", "rule that picks the state to evict when the pages run out", choices=[n for n in names() if n != "none"]
    )
    admit_visit: int = option(
        0, "visit from which a user's state is stored; 0: the first while enough users return, else the second", ge=0
    )
    page: int = option(64, "tokens of a page", ge=16, le=256)
    precision: str = option(
        "engine", "keys and values in pages and on the host: as the engine computes them, or 8 bits with a scale for "
        "each token and head; int8 is the more exact of the two", choices=["engine", *EIGHT_BITS],
    )  # fmt: skip
    memory_gb: float = option(1.0, "device memory of all pages, 10^9 bytes", gt=0)
    host_gb: float = option(
        0.0, "page-locked host memory for evicted states, 10^9 bytes; copies take up to 2.5 GiB of the device "
        "and, for prefetched states, an eighth of memory_gb; 0: none",
        ge=0,
    )  # fmt: skip
    host_admit_visit: int = option(
        2, "visit from which the host takes a user's evicted state; most one-time visitors never return", ge=1,
        only_with={"host_gb": ()},
    )  # fmt: skip
    storage_gb: float = option(
        0.0, "file on a disk for the states that the host evicts, 10^9 bytes; 0: none", ge=0, only_with={"host_gb": ()}
    )
    storage_path: str = option(
        "", "folder of that file, whose states stay for later runs of the same model; empty: a temporary one",
        only_with={"storage_gb": ()},
    )  # fmt: skip
    onload_share: float = option(
        0.0, "share of a state below the device to load, the rest is computed meanwhile; 0: as much as computing hides",
        ge=0, le=1, only_with={"host_gb": ()},
    )  # fmt: skip
    prefetch_s: float = option(
        0.0, "load the states of users expected within this many seconds of the trace; 0: none", ge=0,
        only_with={"host_gb": ()},
    )  # fmt: skip
    item_memory_gb: float = option(0.0, ITEM_MEMORY, ge=0)


def stored(cache: CacheConfig | PagedCacheConfig) -> str:
    """Return int8 or fp8 for pages in 8 bits, and "" for pages in the engine's precision or none."""
    return cache.precision if isinstance(cache, PagedCacheConfig) and cache.precision in EIGHT_BITS else ""


def contradiction(cache: CacheConfig | PagedCacheConfig) -> str | None:
    """Return None, or which options of a cache exclude each other."""
    if isinstance(cache, PagedCacheConfig) and cache.storage_gb and not cache.host_gb:
        return f"cache.storage_gb={cache.storage_gb:g}: storage takes what the host evicts; set cache.host_gb too"
    return None
