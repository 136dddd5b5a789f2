"""The index from users to pages: the pages of each user, the events in them, and the requests that use them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from grengines.api import Request
from grengines.cache.history import History
from grengines.cache.host import HostState, Load
from grengines.cache.pool import PagePool

no_pages = partial(array, "i")  # NumPy copies an array five times as fast as a list


@dataclass(slots=True)
class State:
    """Tokens of one user in the pool, while no request of the user is in flight."""

    tokens: int
    history: History
    pages: array[int]  # exactly as many as the tokens need
    now: float  # time of the last visit
    host_admits: bool  # an eviction sends the state to the host


@dataclass(slots=True, eq=False)
class Plan:
    """One request in flight, and the part of its history that is in pages.

    The user's pages belong to the plan until it is committed or aborted.
    """

    request_id: int
    user: int
    history: History
    tokens: int  # of the history, contextual ones included
    now: float
    bypassed: bool = False  # another request of the user came first: this one never has pages
    on_device: int = 0  # the history's first tokens whose keys and values were in pages at the lookup
    on_host: int = 0  # its first tokens that the host has, if they are more
    on_storage: int = 0  # its first tokens that the disk has, if they are more and the host has none of them
    cached: int = 0  # its first tokens that need not be computed: `on_device`, and those loaded from below
    stored: int = 0  # its first tokens that are in pages once the batch is computed; at least `cached`
    load: Load | None = None  # the part to load from below before the batch is computed
    pages: array[int] = field(default_factory=no_pages)  # page i holds tokens i * page to (i + 1) * page - 1
    known: bool = False  # the policy has a record of the user
    host_admits: bool = False  # the host has some of the history already, or its policy admits the user at this visit
    evicted: bool = False  # while in flight: no state is kept after the plan
    cleared: bool = False  # while in flight: the host keeps no state after the plan either

    @property
    def below(self) -> int:
        """Return the number of first tokens that a tier below the device has, if they are more than the device has."""
        return self.on_host or self.on_storage


class StateIndex:
    """States of users, and plans of requests in flight. Every page that is taken belongs to one of them.

    **Validity.** Keys and values depend on the events before them only, and positions count from the start of the kept
    history. So a cached history is valid up to the first event in which the request's history differs, to the token.
    The rest of a state that was truncated, changed or reordered is dropped at the lookup and computed again. Nothing is
    valid if the start of the history moved. Contextual tokens see the whole history: with any of them a state serves
    the same history only.

    Not thread-safe: `UserStates` holds its lock around it.
    """

    def __init__(self, pool: PagePool, contextual_seq_len: int) -> None:
        self.pool, self.contextual = pool, contextual_seq_len
        self.states: dict[int, State] = {}  # by user, least recently used first; none of them in flight
        self.in_flight: dict[int, Plan] = {}  # by user

    def plans(self, requests: Sequence[Request], now: float) -> list[Plan]:
        """Return plans that are not in flight yet. Needs no lock."""
        context, of = self.contextual, History.of
        return [Plan(r.request_id, r.user_id, of(r), context + len(r.history_items), now) for r in requests]

    def pin(self, plan: Plan) -> State | None:
        """Hand the valid part of the user's state to the plan, and free the rest. Return the state that there was.

        An error of the comparison changes nothing.
        """
        state = self.states.get(plan.user)
        if state is not None:
            valid = self.valid(state.tokens, state.history, plan.history)
            del self.states[plan.user]
            plan.known = True
            plan.on_device = plan.cached = plan.stored = valid
            plan.pages = state.pages if valid == state.tokens else self._cut(state.pages, valid)
        self.in_flight[plan.user] = plan
        return state

    def unpin(self, plan: Plan, tokens: int) -> bool:
        """End a plan: its first `tokens` tokens become the user's state. Return whether there is one."""
        del self.in_flight[plan.user]
        pages = self._cut(plan.pages, tokens)
        if not tokens:
            return False
        history = plan.history.first(tokens - self.contextual)
        self.states[plan.user] = State(tokens, history, pages, plan.now, plan.host_admits)
        return True

    def remove(self, user: int) -> None:
        """Free the pages of a user who has a state."""
        self.pool.free(self.states.pop(user).pages)

    def valid(self, tokens: int, had: History, history: History) -> int:
        """Return the number of first tokens that are valid for `history`, of a state of `tokens` of a history `had`."""
        same = had.common(history)
        if self.contextual:
            return tokens if same == len(had) == len(history) else 0
        return same

    def same(self, had: History, state: State | HostState) -> int:
        """Return the number of first tokens that a state shares with one of a history `had` of the same user."""
        same = had.common(state.history)
        if same == len(state.history):
            return state.tokens
        return 0 if self.contextual else same

    def check_in_flight(self, plan: Plan) -> None:
        """Raise RuntimeError for a plan that is committed or aborted."""
        if self.in_flight.get(plan.user) is not plan:
            raise RuntimeError(f"request {plan.request_id}: the plan is committed or aborted already")

    def pinned_pages(self) -> int:
        """Return the number of pages of requests in flight."""
        return sum(len(plan.pages) for plan in self.in_flight.values())

    def _cut(self, pages: array[int], tokens: int) -> array[int]:
        """Return a user's pages that `tokens` tokens take, and free the others."""
        kept = self.pool.pages_for(tokens)
        if kept == len(pages):
            return pages
        self.pool.free(pages[kept:])
        return pages[:kept]
