"""The user-state cache: lookups, evictions and commits of users' keys and values, under one lock."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from grengines.api import Request, Tier
from grengines.cache import policies
from grengines.cache.events import Counters, EventLog
from grengines.cache.eviction import Eviction
from grengines.cache.guarded_policy import GuardedPolicy
from grengines.cache.host import HostTier, Onload
from grengines.cache.index import Plan, State, StateIndex, no_pages
from grengines.cache.offload import Offloader
from grengines.cache.policies import Policy
from grengines.cache.pool import PagePool, PoolFullError
from grengines.cache.storage import ReadError, StorageTier
from grengines.cache.storage_offload import StorageOffloader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The index at one moment."""

    states: dict[int, State]  # by user, those in flight left out
    in_flight: frozenset[int]  # users


class UserStates:
    """The cached states of users: an index of pages, a policy that evicts, and tiers below: the host, then a disk.

    For each batch: `lookup`, `extend` every plan, lay out `HostPlaces`, compute and `paged_write`, then `commit` each
    plan, or `abort` those that are not committed. A plan stays true until then, whatever else happens.
    `grengines.cache.index` says which cached tokens are valid, `grengines.cache.offload` how the host tier works.

    **Concurrent requests.** The first request of a user in flight has the user's pages to itself. Further ones are
    bypassed: they are answered without the cache. States in flight are never evicted.

    **Faults.** A policy that raises costs nothing but its advice: everything is admitted and the least recently used
    state is evicted. Where growth finds no room beside the requests in flight, the new tokens are not stored. Such
    events are counted. The first of a kind is logged as a warning, further ones for debugging.

    Pages change owners when work is queued, not when it is done: on a GPU all of it goes to one stream.

    Thread-safe: one lock, held while the index changes and while copies are queued, never while anything is computed.
    cost: returns the cost of computing a state of this many tokens, for the policies.
    """

    def __init__(
        self,
        pool: PagePool,
        policy: Policy,
        *,
        contextual_seq_len: int = 0,
        cost: Callable[[int], float] = float,
        tier: HostTier | None = None,
        tier_policy: Policy | None = None,
        storage: StorageTier | None = None,
        storage_policy: Policy | None = None,
    ) -> None:
        def measure(tokens: int) -> tuple[int, float]:
            return pool.pages_for(tokens) * pool.page_bytes, cost(tokens)

        self.pool, self.tier, self.storage = pool, tier, storage
        self._lock = tier.lock if tier is not None else threading.RLock()
        self._log = EventLog()
        self._index = StateIndex(pool, contextual_seq_len)
        self._policy = GuardedPolicy(policy, measure, self._log)
        self._tier_policy = GuardedPolicy(tier_policy or policies.LRU(), measure, self._log)
        guarded = GuardedPolicy(storage_policy or policies.LRU(), measure, self._log)
        self._below = StorageOffloader(storage, guarded, self._index, self._log) if storage is not None else None
        self._offloader = (
            Offloader(tier, self._tier_policy, self._index, self._log, self._below) if tier is not None else None
        )
        self._eviction = Eviction(self._index, self._policy, self._offloader, self._log)

    def __len__(self) -> int:
        """Return the number of users who have a state, those in flight left out."""
        return len(self._index.states)

    def __contains__(self, user: int) -> bool:
        return user in self._index.states

    def tier_of(self, user: int) -> Tier:
        """Return where the user's state is at this moment: that of a user in flight counts as on the device.

        Takes no lock: it only reads dictionaries. The state may move right after.
        """
        if user in self._index.states or user in self._index.in_flight:
            return Tier.DEVICE
        if self.tier is not None and user in self.tier.states:
            return Tier.HOST
        return Tier.STORAGE if self.storage is not None and user in self.storage.states else Tier.NONE

    def state_bytes(self) -> dict[Tier, int]:
        """Return the bytes of the pages that states take in each tier that there is, those in flight included.

        Takes no lock: it only reads numbers.
        """
        pages = {Tier.DEVICE: self.pool.used}
        if self.tier is not None:
            pages[Tier.HOST] = self.tier.used
        if self.storage is not None:
            pages[Tier.STORAGE] = self.storage.pages - self.storage.extents.available
        return {tier: taken * self.pool.page_bytes for tier, taken in pages.items()}

    def counters(self) -> Counters:
        """Return a copy of the counters."""
        return Counters(**self.counts())

    def counts(self) -> dict[str, int]:
        """Return the counters by name: every batch asks for them, and a dictionary is made faster than Counters."""
        with self._lock:
            return dict(vars(self._log.counters))

    def snapshot(self) -> Snapshot:
        """Return a copy of the index."""
        with self._lock:
            return Snapshot(dict(self._index.states), frozenset(self._index.in_flight))

    def lookup(self, requests: Sequence[Request], now: float) -> list[Plan]:
        """Find and pin the cached part of each request's history. now: the policy's clock, seconds.

        Each plan must be committed or aborted. After an error no request is in flight.
        """
        plans = self._index.plans(requests, now)
        with self._lock:
            try:
                for plan in plans:
                    self._find(plan)
            except BaseException:
                for plan in plans:
                    self.abort(plan)
                raise
        return plans

    def extend(self, plan: Plan, share: float = 1.0) -> bool:
        """Make room for the rest of the plan's history, evicting if necessary.

        share: the part of the tokens that only a lower tier has which is loaded, in whole pages; the rest is computed
        meanwhile. With contextual tokens, which cannot be split, all of it.

        Returns whether the history will be stored. It is not for a bypassed plan, for a user that the policy does
        not admit, and if requests in flight hold too much of the pool. Raises PoolFullError, changing nothing, for a
        history that would not fit in the empty pool; RuntimeError for a plan that is committed or aborted.
        """
        if plan.bypassed:
            return False
        needed = self.pool.pages_for(plan.tokens)
        if needed > self.pool.pages:
            raise PoolFullError(
                f"request {plan.request_id} of user {plan.user} doesn't fit the cache: its {plan.tokens} tokens need "
                f"{needed} pages of {self.pool.page} tokens, and the whole pool has {self.pool.pages}; give the pool "
                "more memory or keep shorter histories"
            )
        with self._lock:
            self._index.check_in_flight(plan)
            new_user = not plan.pages and needed and not plan.below
            if new_user and not self._policy.admit(plan.user, plan.tokens, plan.now):
                self._log.counters.refused += 1
                return False
            try:
                if growth := needed - len(plan.pages):
                    self._eviction.make_room(growth, plan.now)
                    plan.pages = plan.pages + no_pages(self.pool.allocate(growth))
            except PoolFullError as error:
                self._log.counters.unstored += 1
                self._log.report("unstored", f"request {plan.request_id}: its new tokens are not cached: {error}")
                return False
            plan.stored = plan.tokens
            if self._offloader is not None:
                self._offloader.plan_load(plan, share)
            return True

    def start_loading(self, plans: Sequence[Plan]) -> Onload | None:
        """Start to load what these plans need from lower tiers. Return None if that is nothing."""
        loads = [plan.load for plan in plans if plan.load is not None]
        if self.tier is None or not loads:
            return None
        with self._lock:
            return self.tier.load(loads)

    def read_ahead(self, plan: Plan) -> bool:
        """Return whether the part of the plan's history that only the disk has was read ahead: it is on the host."""
        with self._lock:
            return plan.on_storage > 0 and self.storage is not None and plan.user in self.storage.ahead

    def prefetched(self, plan: Plan) -> bool:
        """Return whether the part of the plan's history that only the host has was prefetched: it loads fast."""
        with self._lock:
            more = plan.on_host > plan.on_device
            return more and self.tier is not None and self.tier.prefetched(plan.user)

    def prefetch(self, now: float, horizon: float) -> None:
        """Start to load from lower tiers the states of users that the policy expects within `horizon` seconds."""
        if self._offloader is None or horizon <= 0:
            return
        with self._lock:
            for user in self._policy.prefetch(now, horizon):
                self._offloader.prefetch(user)

    def prefetch_users(self, users: Iterable[int]) -> None:
        """Start to load the states of these users, as far as only a lower tier has them and there is room."""
        if self._offloader is None:
            return
        with self._lock:
            for user in users:
                self._offloader.prefetch(user)

    def fault(self, what: str, error: Exception) -> None:
        """Count and log a failure after which work was done without the cache."""
        with self._lock:
            self._log.fault(what, error)

    def lost(self, error: ReadError) -> None:
        """Count pages that the disk does not have as they were written, and drop the state that they are part of."""
        if self._below is not None:
            with self._lock:
                self._below.lost(error)

    @contextlib.contextmanager
    def without_storage(self) -> Iterator[None]:
        """Find nothing in the storage tier and send nothing there."""
        below = self._below
        if below is not None:
            below.paused = True
        try:
            yield
        finally:
            if below is not None:
                below.paused = False

    def commit(self, plan: Plan) -> None:
        """Make the plan's `stored` tokens, which are in their pages, the user's state.

        Raises RuntimeError for a plan that is committed or aborted.
        """
        if plan.bypassed:
            return
        with self._lock:
            self._index.check_in_flight(plan)
            self._settle(plan, plan.stored)

    def abort(self, plan: Plan) -> None:
        """Drop the plan's new tokens, which were not computed. Does nothing for a plan that has ended."""
        with self._lock:
            if self._index.in_flight.get(plan.user) is plan:
                self._settle(plan, plan.on_device)

    def evict(self, user: int) -> bool:
        """Evict a user's state, one in flight when its plan ends. Return whether there was one."""
        with self._lock:
            plan = self._index.in_flight.get(user)
            if plan is not None and not plan.evicted:
                plan.evicted = True
                self._log.counters.evictions += 1
                return True
            if user in self._index.states:
                self._eviction.evict(user)
                return True
            return False

    def clear(self, keep: Tier = Tier.NONE) -> None:
        """Drop every state, those in flight when their plans end. Counters stay; nothing counts as evicted.

        keep: HOST: states on the device are sent to the host tier, and those that are there stay; STORAGE: all of these
        are sent to the disk, if there is one. States in a folder that is kept stay in any case. Raises ValueError for
        DEVICE.
        """
        if keep is Tier.DEVICE:
            raise ValueError("keep=DEVICE would drop no state; allowed are HOST, STORAGE and NONE")
        down = keep is not Tier.NONE
        with self._lock:
            for plan in self._index.in_flight.values():
                plan.evicted, plan.cleared = True, plan.cleared or not down
            for user in list(self._index.states):
                if down and self._offloader is not None:
                    self._offloader.store(user)
                self._eviction.drop(user)
            if self._offloader is not None and not down:
                self._offloader.clear()
            if self._offloader is not None and keep is Tier.STORAGE:
                self._offloader.sink()

    def restart(self, policy: Policy, tier_policy: Policy, storage_policy: Policy) -> None:
        """Drop every state, and continue with policies that have seen nobody."""
        self.clear()
        with self._lock:
            if self._below is not None:
                self._below.restart(storage_policy)
            self.pool.high_water = self.pool.used
            for plan in self._index.in_flight.values():
                plan.known = False  # to the new policy
            self._policy.policy, self._tier_policy.policy = policy, tier_policy

    # Below, the lock is held.

    def _find(self, plan: Plan) -> None:
        """Pin the user's state for the plan, unless another request of the user is in flight."""
        if plan.user in self._index.in_flight:
            plan.bypassed = True
            self._log.counters.bypassed += 1
            self._log.report("bypassed", f"request {plan.request_id}: another request of user {plan.user} is in flight")
            return
        self._count_lookup(plan, self._index.pin(plan))
        if self._offloader is not None:
            self._offloader.find(plan)

    def _count_lookup(self, plan: Plan, state: State | None) -> None:
        count = self._log.counters
        if state is None:
            count.misses += 1
            return
        count.cached_tokens += plan.cached
        if plan.cached == state.tokens:
            count.hits += 1
            return
        count.stale += 1
        if plan.cached:
            count.partial_hits += 1
        else:
            count.misses += 1
        logger.debug(
            "request %d: %d of %d cached tokens of user %d are valid",
            plan.request_id,
            plan.cached,
            state.tokens,
            plan.user,
        )

    def _settle(self, plan: Plan, tokens: int) -> None:
        """End a plan: its first `tokens` tokens are the user's state, unless that was evicted meanwhile."""
        if plan.load is not None and self._below is not None:
            self._below.end(plan.load)
        tokens = 0 if plan.evicted else tokens
        if self._index.unpin(plan, tokens):
            self._policy.touch(plan.user, tokens, plan.now)
        elif plan.known:
            self._policy.remove(plan.user)
        if plan.cleared and self._offloader is not None:
            self._offloader.forget(plan.user)
