"""Options of the user-state cache. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option


@dataclass
class CacheConfig:
    """No user-state cache: every request is encoded from its whole history."""

    name: str = option("none", choices=["none"])


@dataclass
class PagedCacheConfig:
    """Keys and values of users' histories in pages on the device; a returning user's new events alone are encoded."""

    name: str = "lru"
    policy: str = option("lru", choices=["lru", "lfu", "gdsf"])  # who goes when the pages run out
    page: int = option(64, ge=16, le=256)  # tokens of a page
    memory_gb: float = option(1.0, gt=0)  # of all pages, 10^9 bytes
