"""Options of the caches: the users' KV cache, and item vectors. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option


@dataclass
class CacheConfig:
    """No user-state cache: every request is encoded from its whole history."""

    name: str = option("none", choices=["none"])
    item_memory_gb: float = option(0.0, ge=0)  # of token vectors on the device, 10^9 bytes; 0: the whole table


@dataclass
class PagedCacheConfig:
    """KV cache of users' histories, in pages on the device. For a returning user only new events are encoded."""

    name: str = "lru"
    policy: str = option("lru", choices=["lru", "lfu", "gdsf", "predictive"])  # evicts when the pages run out
    admit_visit: int = option(0, ge=0)  # visit from which a state is stored; 0: the first while that pays, else 2
    page: int = option(64, ge=16, le=256)  # tokens of a page
    memory_gb: float = option(1.0, gt=0)  # of all pages, 10^9 bytes
    host_gb: float = option(0.0, ge=0)  # page-locked host memory for evicted states; 0: none
    host_admit_visit: int = option(2, ge=1)  # visit from which it takes a user's evicted state
    onload_share: float = option(0.0, ge=0, le=1)  # share of a state on the host to load; 0: as computing hides
    prefetch_s: float = option(0.0, ge=0)  # prefetch users expected within this trace time; 0: none
    item_memory_gb: float = option(0.0, ge=0)  # of token vectors on the device, 10^9 bytes; 0: the whole table
