"""Which user's keys and values are cached, up to which event, and in which pages."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grengines.api import Request
from grengines.cache.pool import PagePool, PoolFullError

logger = logging.getLogger(__name__)

UInt64Array = npt.NDArray[np.uint64]


class Policy(Protocol):
    """Decides what is kept; holds nothing itself. Called under the index's lock: it must not call back.

    size: bytes of the user's pages. cost: of computing the state again, in the unit that UserStates is given.
    now: seconds on the clock of whoever calls `lookup`.
    """

    def touch(self, user: int, size: int, cost: float, now: float) -> None:
        """The user's state was stored, or used and stored again."""

    def victim(self, now: float, exclude: Set[int]) -> int:
        """Whose state goes: a user that was touched and not forgotten, and isn't in `exclude`. There is one."""

    def forget(self, user: int) -> None:
        """The user's state is gone."""

    def admit(self, user: int, size: int, cost: float, now: float) -> bool:
        """Whether to store the state of a user who has none."""


@dataclass
class Counters:
    """What happened since the beginning. hits + partial_hits + misses + bypassed is the number of lookups."""

    hits: int = 0  # everything that was cached is valid; perhaps there are new events
    partial_hits: int = 0  # the first tokens of what was cached are valid
    misses: int = 0  # nothing was cached, or nothing of it is valid
    bypassed: int = 0  # another request of the user was in flight: answered without the cache
    stale: int = 0  # of the partial hits and misses: the history is not a continuation of the cached one
    cached_tokens: int = 0  # tokens that the lookups found
    evictions: int = 0  # states that went to make room, or by `evict`
    refused: int = 0  # new states that the policy did not admit
    unstored: int = 0  # requests whose new tokens found no room beside those in flight, or whose allocation failed
    policy_errors: int = 0  # the policy raised, or named a victim that can't be one


def history_versions(request: Request) -> UInt64Array:
    """uint64 [events]: entry i is the version of the history's first i + 1 events.

    A version is a sum, modulo 2^64, over the events before: of a hash of the event's position, item, actions, weight
    and timestamp, all of which decide what its token is. So two histories agree exactly as far as their versions
    do: a change in one field of one event is certain to show, any other but for about one in 2^64. That is
    against accidents, not against someone who looks for a collision.
    """
    x = _mixed(np.arange(1, len(request.history_items) + 1, dtype=np.uint64))  # positions
    for column in (request.history_items, request.history_actions, request.history_timestamps):
        x = _mixed(x + column.astype(np.int64, copy=False).view(np.uint64))
    # Weights by their bits as float64, exact for whatever float type they come in.
    x = _mixed(x + request.history_weights.astype(np.float64).view(np.uint64))
    return np.cumsum(_mixed(x), dtype=np.uint64)


def _mixed(x: UInt64Array) -> UInt64Array:
    """Each bit spread over the others; different x stay different."""
    x = x * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
    return x ^ (x >> np.uint64(29))


@dataclass(slots=True)
class _State:
    """What one user has in the pool while no request of theirs is in flight."""

    tokens: int
    versions: UInt64Array  # [events]; the last one is the state's version
    pages: list[int]  # exactly as many as the tokens need


@dataclass(slots=True, eq=False)
class Plan:
    """One request in flight: what of its history is in pages. The user's pages are its own until commit or abort."""

    request_id: int
    user: int
    versions: UInt64Array  # [events] of the request's history
    tokens: int  # of the history, contextual ones included
    now: float
    bypassed: bool = False  # another request of the user came first: no pages, ever
    cached: int = 0  # the history's first tokens whose keys and values were in pages at the lookup
    stored: int = 0  # its first tokens that are in pages once the batch is computed; at least `cached`
    pages: list[int] = field(default_factory=list)  # page i holds tokens i * page to (i + 1) * page - 1
    known: bool = False  # the policy has heard of the user
    evicted: bool = False  # while in flight: nothing is kept after it


@dataclass
class PagedBatch:
    """Where the keys and values of a batch lie, on its device: B requests, n new tokens to store."""

    page_table: Tensor  # int32 [B, most pages], at least one column; 0 past a request's last page
    paged_lengths: Tensor  # int64 [B]: tokens in pages before the batch
    stored_lengths: Tensor  # int64 [B]: the same once its new tokens are written
    rows: Tensor  # int64 [n]: rows of the batch's keys and values that are to be stored
    slots: Tensor  # int64 [n]: where, for PagePool.write


class UserStates:
    """The index from users to pages. Every page of `pool` that is taken belongs to one state or one plan.

    For each batch: `lookup`, `extend` for every plan, `batch`, compute and `pool.write`, then `commit` each plan, or
    `abort` those that are not committed. What a plan says stays true until then, whatever else happens.

    **Validity.** Keys and values depend on the events before them only, and positions count from the start of the
    kept history. So of a cached history exactly the events that the request's begins with are valid, to the
    token. The rest of a state that was truncated, changed or reordered is dropped at the lookup and computed
    again; where the start moved nothing is valid. Contextual tokens see the whole history: with any of them
    a state serves the same history only.

    **At once.** The first request of a user in flight has the user's pages to itself; further ones are bypassed,
    that is answered without the cache. States in flight are never evicted.

    **Faults.** A policy that raises costs nothing but its advice: everything is admitted and the least recently
    used state goes. Where growth finds no room beside the requests in flight, the new tokens are not stored.
    Such events are counted; the first of a kind is logged as a warning, further ones for debugging.

    Pages change owners when work is queued, not when it is done: on a GPU all of it goes to one stream.

    Thread-safe: one lock, held while the index changes, never while anything is hashed, copied or computed.
    cost: of computing so many tokens' state, for the policy.
    """

    def __init__(
        self,
        pool: PagePool,
        policy: Policy,
        *,
        contextual_seq_len: int = 0,
        cost: Callable[[int], float] = float,
    ) -> None:
        self.pool = pool
        self._policy, self._contextual, self._cost = policy, contextual_seq_len, cost
        self._lock = threading.Lock()
        self._states: dict[int, _State] = {}  # least recently used first; none of them in flight
        self._in_flight: dict[int, Plan] = {}
        self._counters = Counters()
        self._warned: set[str] = set()

    def __len__(self) -> int:
        """Users who have a state, those in flight left out."""
        return len(self._states)

    def __contains__(self, user: int) -> bool:
        return user in self._states

    def counters(self) -> Counters:
        """A copy."""
        with self._lock:
            return Counters(**asdict(self._counters))

    def lookup(self, requests: Sequence[Request], now: float) -> list[Plan]:
        """What is cached of each request's history. now: the policy's clock, seconds.

        Pins it: each plan must be committed or aborted.
        """
        plans = [self._plan(r, now) for r in requests]
        with self._lock:
            for plan in plans:
                self._find(plan)
        return plans

    def extend(self, plan: Plan) -> bool:
        """Make room for the rest of the plan's history, evicting where it must.

        Returns whether it will be stored: not for a bypassed plan, a user whom the policy doesn't admit, or where
        requests in flight hold too much of the pool. Raises PoolFullError, changing nothing, for a history that
        would not fit in the pool were it empty; RuntimeError for a plan that is committed or aborted.
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
            self._check_in_flight(plan)
            if not plan.pages and needed and not self._admits(plan):
                self._counters.refused += 1
                return False
            try:
                growth = needed - len(plan.pages)
                self._make_room(growth, plan.now)
                plan.pages.extend(self.pool.allocate(growth))
            except PoolFullError as error:
                self._counters.unstored += 1
                self._report("unstored", f"request {plan.request_id}: its new tokens are not cached: {error}")
                return False
            plan.stored = plan.tokens
            return True

    def commit(self, plan: Plan) -> None:
        """The plan's `stored` tokens are in their pages: they are the user's state from now on.

        Raises RuntimeError for a plan that is committed or aborted.
        """
        if plan.bypassed:
            return
        with self._lock:
            self._check_in_flight(plan)
            self._settle(plan, plan.stored)

    def abort(self, plan: Plan) -> None:
        """The plan's new tokens were not computed: the state is what was cached. Nothing for a settled plan."""
        with self._lock:
            if self._in_flight.get(plan.user) is plan:
                self._settle(plan, plan.cached)

    def evict(self, user: int) -> bool:
        """Drop a user's state, one in flight once it is settled. Returns whether there was any."""
        with self._lock:
            plan = self._in_flight.get(user)
            if plan is not None and not plan.evicted:
                plan.evicted = True
                self._counters.evictions += 1
                return True
            if user in self._states:
                self._drop(user)
                return True
            return False

    def clear(self) -> None:
        """Drop every state, those in flight once they are settled. Counters stay; nothing counts as evicted."""
        with self._lock:
            for plan in self._in_flight.values():
                plan.evicted = True
            for user in list(self._states):
                self._release(user)

    def batch(self, plans: Sequence[Plan], first_rows: Sequence[int], *, pin: bool = False) -> PagedBatch:
        """Page table, lengths and slots of a batch, built on the host and copied to the pool's device in one go.

        first_rows: for each plan, which row of the batch's keys holds its first token that is not cached; its
        further ones follow. pin: page-locked memory, for GPUs.
        """
        page, B = self.pool.page, len(plans)
        new = [plan.stored - plan.cached for plan in plans]
        width = max([1, *(len(plan.pages) for plan in plans)])
        sizes = [B, B, sum(new), sum(new), -(-B * width // 2)]
        buffer = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=pin)
        cached, stored, rows, slots, packed = np.split(buffer.numpy(), np.cumsum(sizes)[:-1])
        table = packed.view(np.int32)[: B * width].reshape(B, width)
        at = 0
        for b, plan in enumerate(plans):
            table[b, : len(plan.pages)] = plan.pages
            cached[b], stored[b] = plan.cached, plan.stored
            tokens = np.arange(plan.cached, plan.stored)
            rows[at : at + new[b]] = first_rows[b] + tokens - plan.cached
            slots[at : at + new[b]] = table[b, tokens // page].astype(np.int64) * page + tokens % page
            at += new[b]
        parts = buffer.to(self.pool.k[0].device, non_blocking=True).split(sizes)
        return PagedBatch(
            page_table=parts[4].view(torch.int32)[: B * width].view(B, width),
            paged_lengths=parts[0],
            stored_lengths=parts[1],
            rows=parts[2],
            slots=parts[3],
        )

    # Below, the lock is held (but in `_plan`).

    def _plan(self, request: Request, now: float) -> Plan:
        versions = history_versions(request)
        return Plan(request.request_id, request.user_id, versions, self._contextual + len(versions), now)

    def _find(self, plan: Plan) -> None:
        """Hand the user's state to the plan, as much of it as is valid."""
        count = self._counters
        if plan.user in self._in_flight:
            plan.bypassed = True
            count.bypassed += 1
            self._report("bypassed", f"request {plan.request_id}: another request of user {plan.user} is in flight")
            return
        self._in_flight[plan.user] = plan
        state = self._states.pop(plan.user, None)
        if state is None:
            count.misses += 1
            return
        plan.known = True
        plan.cached = plan.stored = self._valid_tokens(state, plan.versions)
        kept = self.pool.pages_for(plan.cached)
        plan.pages = state.pages[:kept]
        self.pool.free(state.pages[kept:])
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
            "request %d: of %d cached tokens of user %d %d are valid",
            plan.request_id,
            state.tokens,
            plan.user,
            plan.cached,
        )

    def _valid_tokens(self, state: _State, versions: UInt64Array) -> int:
        """How many of the state's first tokens a history of these versions begins with."""
        events = min(len(state.versions), len(versions))
        same = state.versions[:events] == versions[:events]
        valid = events if same.all() else int(same.argmin())
        if self._contextual:
            return state.tokens if valid == len(state.versions) == len(versions) else 0
        return valid

    def _settle(self, plan: Plan, tokens: int) -> None:
        """End a plan: its first `tokens` tokens are the user's state."""
        del self._in_flight[plan.user]
        tokens = 0 if plan.evicted else tokens
        kept = self.pool.pages_for(tokens)
        self.pool.free(plan.pages[kept:])
        if tokens:
            versions = plan.versions[: tokens - self._contextual]
            self._states[plan.user] = _State(tokens, versions, plan.pages[:kept])
            self._ask("touch", plan.user, *self._size_and_cost(tokens), plan.now)
        elif plan.known:
            self._ask("forget", plan.user)

    def _check_in_flight(self, plan: Plan) -> None:
        if self._in_flight.get(plan.user) is not plan:
            raise RuntimeError(f"request {plan.request_id}: the plan is committed or aborted already")

    def _admits(self, plan: Plan) -> bool:
        return bool(self._ask("admit", plan.user, *self._size_and_cost(plan.tokens), plan.now, otherwise=True))

    def _size_and_cost(self, tokens: int) -> tuple[int, float]:
        return self.pool.pages_for(tokens) * self.pool.page_bytes, self._cost(tokens)

    def _make_room(self, pages: int, now: float) -> None:
        """Evict until so many pages are free. Raises PoolFullError, evicting nobody, where that can't be had."""
        pinned = sum(len(plan.pages) for plan in self._in_flight.values())
        if pages > self.pool.pages - pinned:
            raise PoolFullError(
                f"{pages} pages asked for; requests in flight hold {pinned} of {self.pool.pages}, none can be evicted"
            )
        while self.pool.available < pages:
            user = self._ask("victim", now, self._in_flight.keys())
            if user not in self._states:  # a policy error, or the policy raised
                user = next(iter(self._states))
            self._drop(user)

    def _drop(self, user: int) -> None:
        self._release(user)
        self._counters.evictions += 1

    def _release(self, user: int) -> None:
        self.pool.free(self._states.pop(user).pages)
        self._ask("forget", user)

    def _ask(self, question: str, *args: Any, otherwise: Any = None) -> Any:
        """The policy's answer; `otherwise` where it raises."""
        try:
            answer = getattr(self._policy, question)(*args)
            if question == "victim" and answer not in self._states:
                raise LookupError(f"user {answer!r} has no state that can be evicted")
            return answer
        except Exception as error:
            self._counters.policy_errors += 1
            message = f"cache policy {type(self._policy).__name__}.{question} failed, going on without its advice"
            self._report("policy", message, error)
            return otherwise

    def _report(self, kind: str, message: str, error: Exception | None = None) -> None:
        """A warning for the first event of a kind; further ones are there for debugging only."""
        level = logging.DEBUG if kind in self._warned else logging.WARNING
        logger.log(level, "%s", message, exc_info=error)
        self._warned.add(kind)
