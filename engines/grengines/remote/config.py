"""Options of the remote engine."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option
from grengines.refusals import Asked, own_kernels

CONNECTIONS, MOST = 64, 1024  # to a server, and to all


@dataclass
class RemoteConfig:
    """A server that `grbench serve` runs. The model, the weights and the seed must be the server's: the gate checks."""

    name: str = option("remote", "name of the engine")
    url: str = option("http://127.0.0.1:8000", "the server", url=True)
    more_urls: list[str] = option(
        [], "further servers of the same strategies; a batch goes to the server that has the fewest requests", url=True
    )
    api_key_file: str | None = option(None, "file with the server's API key", file=True)
    timeout_s: float = option(30.0, "longest wait for an answer, and for the server to be ready", gt=0, le=3600)


def usual(servers: int) -> dict[str, int]:
    """Return what `grbench load` sets where the user does not: a call for each request, and connections."""
    return {"scenario.max_batch": 1, "scenario.in_flight": min(CONNECTIONS * servers, MOST)}


def contradiction(options: RemoteConfig, asked: Asked) -> str | None:
    """Return None, or why there can't be a cache or a kernel, which are the server's."""
    if asked.cache.name != "none":
        return f"cache={asked.cache.name}: engine remote has none; give the cache to the server"
    return own_kernels(asked, "remote", ", and give the kernel to the server")
