"""Room in the pool: the policy's victims are evicted, to the host tier if there is one."""

from __future__ import annotations

from grengines.cache.events import EventLog
from grengines.cache.guarded_policy import GuardedPolicy
from grengines.cache.index import StateIndex
from grengines.cache.offload import Offloader
from grengines.cache.pool import PoolFullError


class Eviction:
    """Evicts states of `index`, never those in flight. Not thread-safe: `UserStates` holds its lock around it."""

    def __init__(self, index: StateIndex, policy: GuardedPolicy, offloader: Offloader | None, log: EventLog) -> None:
        self._index, self._policy, self._offloader, self._log = index, policy, offloader, log

    def make_room(self, pages: int, now: float) -> None:
        """Evict until `pages` pages are free. Raise PoolFullError, evicting nobody, if plans hold too many."""
        index, pool = self._index, self._index.pool
        if pages <= pool.available:
            return
        pinned = index.pinned_pages()
        if pages > pool.pages - pinned:
            raise PoolFullError(
                f"{pages} pages asked for; requests in flight hold {pinned} of {pool.pages}, none can be evicted"
            )
        while pool.available < pages:
            self.evict(self._policy.victim(now, index.in_flight.keys(), index.states))

    def evict(self, user: int) -> None:
        """Evict a user's state, to the host if that admits the user."""
        if self._offloader is not None:
            if self._index.states[user].host_admits:
                self._offloader.store(user)
            else:
                self._log.counters.host_refused += 1
        self.drop(user)
        self._log.counters.evictions += 1

    def drop(self, user: int) -> None:
        """Drop a user's state. This does not count as an eviction."""
        self._index.remove(user)
        self._policy.remove(user)
