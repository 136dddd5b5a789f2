"""The way to the host tier and back: which states it takes, what is loaded of them, and which of them it drops."""

from __future__ import annotations

from grengines.cache.events import EventLog
from grengines.cache.guarded_policy import GuardedPolicy
from grengines.cache.host import HostTier, Load
from grengines.cache.index import Plan, StateIndex
from grengines.cache.storage_offload import StorageOffloader


class Offloader:
    """The host tier with a policy of its own.

    A state that is evicted from the device is copied to the host. A lookup that finds more on the host than on the
    device has it loaded. The copy on the host stays, so only new pages are sent at the next eviction.

    The policy chooses the states that leave the host. At each visit of a user without a valid state on the host,
    it also decides whether the host takes the user's state at its next eviction. So visits count, not evictions.

    below: the storage tier, which is offered what the host evicts, and asked for what the host does not have.

    Not thread-safe: `UserStates` holds its lock around it.
    """

    def __init__(
        self,
        tier: HostTier,
        policy: GuardedPolicy,
        index: StateIndex,
        log: EventLog,
        below: StorageOffloader | None = None,
    ) -> None:
        self.tier, self.policy, self.below = tier, policy, below
        self._index, self._log = index, log

    def find(self, plan: Plan) -> None:
        """Note in the plan what the tiers have of its history, and whether the host takes the user's state."""
        there = self.tier.states.get(plan.user)
        valid = self._index.valid(there.tokens, there.history, plan.history) if there is not None else 0
        plan.on_host = valid if valid > plan.on_device else 0
        if not valid and self.below is not None:
            valid = self.below.find(plan)
            plan.on_storage = valid if valid > plan.on_device else 0
        plan.host_admits = valid > 0 or self.policy.admit(plan.user, plan.tokens, plan.now)

    def plan_load(self, plan: Plan, share: float) -> None:
        """Have this share of the tokens that only a lower tier has loaded, in whole pages.

        With contextual tokens all of them: such a state cannot be split.
        """
        if not plan.below:
            return
        pool, wanted, count = self._index.pool, plan.below, self._log.counters
        if share < 1 and not self._index.contextual:
            wanted = int(plan.on_device + share * (plan.below - plan.on_device)) // pool.page * pool.page
        if wanted <= plan.on_device:
            return
        first, stop = plan.on_device // pool.page, pool.pages_for(wanted)
        if plan.on_host:
            plan.load = Load(plan.user, first, plan.pages[first:stop])
            count.loaded_tokens += wanted - plan.on_device
            count.host_hits += not plan.on_device
        elif self.below is not None and (load := self.below.load(plan, first, stop - first)) is not None:
            plan.load = load
            count.storage_tokens += wanted - plan.on_device
            count.storage_hits += not plan.on_device
        else:
            return
        plan.cached = wanted

    def store(self, user: int) -> None:
        """Have the host take the state of a user, if it has room or can make it."""
        state, there = self._index.states[user], self.tier.states.get(user)
        if not state.tokens:  # of a user without a history
            return
        same = self._index.same(there.history, state) if there is not None else 0
        try:
            taken = self._make_room(user, len(state.pages), state.now)
            taken = taken and self.tier.store(user, state.tokens, state.history, state.pages, same, state.now)
        except Exception as error:
            self._log.fault(f"the state of user {user} did not reach the host", error)
            taken = False
            if there is not None and user not in self.tier.states:
                self.policy.remove(user)
        if taken:
            self._log.counters.offloads += 1
            self.policy.touch(user, state.tokens, state.now)
        else:
            self._log.counters.offloads_refused += 1

    def prefetch(self, user: int) -> None:
        """Start to copy the state of a user to the device, or to read it, if only a lower tier has it and has room."""
        if user in self._index.states or user in self._index.in_flight:
            return
        if user in self.tier.states:
            self._log.counters.prefetches += self.tier.prefetch(user)
        elif self.below is not None:
            self.below.prefetch(user)

    def drop(self, user: int) -> None:
        """Drop the copy of a user who has one on the host."""
        self.tier.drop(user)
        self.policy.remove(user)

    def forget(self, user: int) -> None:
        """Drop what there is of a user, in storage too unless its folder is kept."""
        if user in self.tier.states:
            self.drop(user)
        if self.below is not None:
            self.below.forget(user)

    def clear(self) -> None:
        """Forget all users but those in flight."""
        users = self.tier.states.keys() | (self.below.tier.states.keys() if self.below is not None else set())
        for user in users - self._index.in_flight.keys():
            self.forget(user)

    def sink(self) -> None:
        """If there is a storage tier, evict all states but those of users in flight, and wait until it has them."""
        if self.below is None:
            return
        for user in self.tier.states.keys() - self._index.in_flight.keys():
            self._evict(user)
            self.below.tier.finish_writes()

    def _evict(self, user: int) -> None:
        """Drop the copy of a user who has one on the host, after offering it to the storage tier."""
        state = self.tier.take_out(user)
        self.policy.remove(user)
        if self.below is not None:
            self.below.take(user, state)
        else:
            self.tier.extents.free(state.extents)

    def _make_room(self, user: int, pages: int, now: float) -> bool:
        """Drop states, none of them in flight, until a user's state of `pages` pages fits. Return whether it does."""
        if pages > self.tier.pages:
            return False
        stay = self._index.in_flight.keys() | {user}
        return self.policy.make_room(
            now, stay, self.tier.states.keys(), lambda: bool(self.tier.lacking(user, pages)), self._evict
        )
