"""The way to the storage tier and back: which states it takes, what is read of them, and which of them it drops."""

from __future__ import annotations

from grengines.cache.events import EventLog
from grengines.cache.guarded_policy import GuardedPolicy
from grengines.cache.host import HostState, Load
from grengines.cache.index import Plan, StateIndex
from grengines.cache.policies import Policy
from grengines.cache.storage import ReadError, StorageTier, StoredReading


class StorageOffloader:
    """The storage tier with a policy of its own, which chooses the states that leave it.

    It is offered every state that the host evicts, and the policy admits all of them. A lookup that finds a state
    neither on the device nor on the host has it read. The copy on the disk stays, so only new pages are written when
    the host evicts the state again.

    A disk that fails switches the tier off: no state is found in it or sent to it from then on.

    Not thread-safe: `UserStates` holds its lock around it. `paused`: the tier is neither asked nor offered anything.
    """

    def __init__(self, tier: StorageTier, policy: GuardedPolicy, index: StateIndex, log: EventLog) -> None:
        self.tier, self._policy = tier, policy
        self._index, self._log = index, log
        self.paused = False
        self._greet()

    def find(self, plan: Plan) -> int:
        """Return the number of first tokens of the plan's history that the disk has."""
        there = None if self._off() else self.tier.states.get(plan.user)
        return self._index.valid(there.tokens, there.history, plan.history) if there is not None else 0

    def load(self, plan: Plan, first: int, pages: int) -> Load | None:
        """Start to read pages of the plan's user. Return None if the disk failed or too much is on its way."""
        reading = None if self._off() else self.tier.read(plan.user, first, pages)
        if reading is None:
            self._log.counters.storage_busy += 1
            return None
        return Load(plan.user, first, plan.pages[first : first + pages], reading)

    def end(self, load: Load) -> None:
        """Note that all copies of a load are queued, or that there will be none."""
        if isinstance(load.reading, StoredReading):
            self.tier.end(load.reading)

    def take(self, user: int, state: HostState) -> None:
        """Have the disk take a state that left the host, whose memory is freed in any case."""
        there, pages = self.tier.states.get(user), sum(n for _, n in state.extents)
        same = self._index.same(there.history, state) if there is not None else 0
        taken = not self._off() and self.tier.ready(state, same)  # asked first: a refusal drops no other state
        taken = taken and self._make_room(user, pages, state.now) and self.tier.store(user, state, same)
        if taken:
            self._log.counters.storage_taken += 1
            self._policy.touch(user, state.tokens, state.now)
        else:
            self._log.counters.storage_refused += 1
            self.tier.host.extents.free(state.extents)

    def prefetch(self, user: int) -> None:
        """Start to read the state of a user, if the disk has it and there is memory."""
        if not self._off() and user in self.tier.states and self.tier.read_ahead(user):
            self._log.counters.prefetches += 1

    def lost(self, error: ReadError) -> None:
        """Count pages that are not as they were written, and drop the state. A broken disk switches the tier off."""
        self._log.counters.corrupt_pages += error.pages
        self._log.report("corrupt", f"{error}; computed again")
        if error.broken:
            self.tier.error = self.tier.error or str(error)
        elif error.user in self.tier.states:
            self._drop(error.user)

    def restart(self, policy: Policy) -> None:
        """Continue with a policy that has seen nobody but those whose states are there."""
        self._policy.policy = policy
        self._greet()

    def forget(self, user: int) -> None:
        """Drop the state of a user, unless the folder is kept."""
        if user in self.tier.states and not self.tier.kept:
            self._drop(user)

    def _greet(self) -> None:
        """Tell the policy of the states that are there, the oldest first."""
        for user, state in self.tier.states.items():
            self._policy.touch(user, state.tokens, state.now)

    def _off(self) -> bool:
        """Return whether the tier is paused, or was switched off. Logs the latter."""
        self.tier.settle()
        if self.tier.error:
            self._log.report("storage", f"the storage tier is switched off: {self.tier.error}")
        return self.paused or bool(self.tier.error)

    def _drop(self, user: int) -> None:
        self.tier.drop(user)
        self._policy.remove(user)

    def _make_room(self, user: int, pages: int, now: float) -> bool:
        """Drop states, none of them in flight or on its way, until a user's state of `pages` pages fits."""
        if pages > self.tier.pages:
            return False
        stay = self._index.in_flight.keys() | self.tier.ahead.keys() | {user}
        return self._policy.make_room(
            now, stay, self.tier.states.keys(), lambda: bool(self.tier.lacking(user, pages)), self._drop
        )
