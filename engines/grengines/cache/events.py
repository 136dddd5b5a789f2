"""Counters of the user-state cache, and a log that warns once for each kind of event."""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """Events since the cache was made. hits + partial_hits + misses + bypassed is the number of lookups."""

    hits: int = 0  # the whole cached state is valid; there may be new events
    partial_hits: int = 0  # only the first tokens of the cached state are valid
    misses: int = 0  # no state was cached, or nothing of it is valid
    bypassed: int = 0  # another request of the user was in flight: answered without the cache
    stale: int = 0  # partial hits and misses whose history does not continue the cached one
    cached_tokens: int = 0  # tokens that lookups found on the device
    host_hits: int = 0  # misses for which tokens came from the host
    loaded_tokens: int = 0  # tokens that came from the host
    evictions: int = 0  # states that were evicted, by the policy or by `evict`
    offloads: int = 0  # evicted states that the host took
    offloads_refused: int = 0  # evicted states that the host did not take: too many on their way, or no room
    host_refused: int = 0  # evicted states not offered to the host: its policy did not admit the user
    storage_hits: int = 0  # misses for which tokens came from the disk
    storage_tokens: int = 0  # tokens that came from the disk
    storage_taken: int = 0  # states that left the host and that the disk took
    storage_refused: int = 0  # states that left the host and that it did not: too many on their way, no room, failed
    storage_busy: int = 0  # states that the disk has and that were computed: too many on their way, or failed
    corrupt_pages: int = 0  # pages that the disk did not have as they were written, and that were computed again
    prefetches: int = 0  # states copied to the device or read from the disk before they were asked for
    refused: int = 0  # new states that the policy did not admit
    unstored: int = 0  # requests whose new tokens found no room beside those in flight, or whose allocation failed
    policy_errors: int = 0  # a policy raised, or named a victim that cannot be evicted
    faults: int = 0  # batches that failed with the cache and were answered without it; offloads that failed


class EventLog:
    """The counters, and log messages: a warning for the first event of a kind, debug messages for further ones.

    Not thread-safe: `UserStates` holds its lock around it.
    """

    def __init__(self) -> None:
        self.counters = Counters()
        self._warned: set[str] = set()

    def report(self, kind: str, message: str, error: Exception | None = None) -> None:
        """Log an event, with the traceback of `error`."""
        level = logging.DEBUG if kind in self._warned else logging.WARNING
        logger.log(level, "%s", message, exc_info=error)
        self._warned.add(kind)

    def fault(self, what: str, error: Exception) -> None:
        """Count and log a failure after which work goes on without the cache."""
        self.counters.faults += 1
        self.report("fault", f"{what}; going on without it", error)
