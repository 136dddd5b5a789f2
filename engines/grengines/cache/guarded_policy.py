"""A policy as the cache asks it: an error in it costs its advice, never an answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Set

from grengines.cache.events import EventLog
from grengines.cache.policies import Policy


class GuardedPolicy:
    """Another policy. Where that raises, the error is counted and logged, and a default is taken.

    measure: returns the size and the cost of a state of this many tokens. `policy` may be exchanged.
    """

    def __init__(self, policy: Policy, measure: Callable[[int], tuple[int, float]], log: EventLog) -> None:
        self.policy = policy
        self._measure, self._log = measure, log

    def admit(self, user: int, tokens: int, now: float) -> bool:
        """Return whether to store a user's state. By default every user's."""
        size, cost = self._measure(tokens)
        try:
            return bool(self.policy.admit(user, size, cost, now))
        except Exception as error:
            self._failed("admit", error)
            return True

    def touch(self, user: int, tokens: int, now: float) -> None:
        """Report that a user's state was stored, or used and stored again."""
        size, cost = self._measure(tokens)
        try:
            self.policy.touch(user, size, cost, now)
        except Exception as error:
            self._failed("touch", error)

    def victim(self, now: float, exclude: Set[int], candidates: Collection[int]) -> int:
        """Return the user to evict, one of `candidates` that is not in `exclude`. By default their first."""
        try:
            user = self.policy.victim(now, exclude)
            if user in candidates and user not in exclude:
                return user
            raise LookupError(f"user {user!r} has no state that can be evicted")
        except Exception as error:
            self._failed("victim", error)
            return next(user for user in candidates if user not in exclude)

    def make_room(
        self, now: float, stay: Set[int], states: Set[int], lacks: Callable[[], bool], evict: Callable[[int], object]
    ) -> bool:
        """Evict victims among `states`, none of those that `stay`, while room lacks. Return whether it is there.

        states: a view, which users leave as they are evicted. A list of them would take a millisecond for 10,000 users.
        """
        while lacks():
            if states <= stay:
                return False
            evict(self.victim(now, stay, states))
        return True

    def remove(self, user: int) -> None:
        """Report that a user's state is gone."""
        try:
            self.policy.remove(user)
        except Exception as error:
            self._failed("remove", error)

    def prefetch(self, now: float, horizon: float) -> list[int]:
        """Return users without a state who are expected within `horizon` seconds. By default nobody."""
        try:
            return self.policy.prefetch(now, horizon)
        except Exception as error:
            self._failed("prefetch", error)
            return []

    def _failed(self, question: str, error: Exception) -> None:
        self._log.counters.policy_errors += 1
        name = f"{type(self.policy).__name__}.{question}"
        self._log.report("policy", f"cache policy {name} failed, going on without its advice", error)
