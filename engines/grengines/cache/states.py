"""Which user's keys and values are cached, up to which event, and in which pages."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grengines.api import Request
from grengines.cache import policies
from grengines.cache.history import History
from grengines.cache.host import HostTier, Load, Onload
from grengines.cache.policies import Policy
from grengines.cache.pool import PagePool, PoolFullError
from grengines.runtime import staging

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """What happened since the beginning. hits + partial_hits + misses + bypassed is the number of lookups."""

    hits: int = 0  # everything that was cached is valid; perhaps there are new events
    partial_hits: int = 0  # the first tokens of what was cached are valid
    misses: int = 0  # nothing was cached, or nothing of it is valid
    bypassed: int = 0  # another request of the user was in flight: answered without the cache
    stale: int = 0  # of the partial hits and misses: the history is not a continuation of the cached one
    cached_tokens: int = 0  # tokens that the lookups found on the device
    host_hits: int = 0  # of the misses, those for which tokens came from the host
    loaded_tokens: int = 0  # tokens that came from the host
    evictions: int = 0  # states that went to make room, or by `evict`
    offloads: int = 0  # of them, those that the host took
    offloads_refused: int = 0  # those that it did not: too many on their way, or no room
    host_refused: int = 0  # and those that it was not offered: the host's policy did not admit the user
    prefetches: int = 0  # states sent up before they were asked for
    refused: int = 0  # new states that the policy did not admit
    unstored: int = 0  # requests whose new tokens found no room beside those in flight, or whose allocation failed
    policy_errors: int = 0  # the policy raised, or named a victim that can't be one
    faults: int = 0  # batches that failed with the cache and were answered without it; offloads that failed


@dataclass(slots=True)
class _State:
    """What one user has in the pool while no request of theirs is in flight."""

    tokens: int
    history: History
    pages: list[int]  # exactly as many as the tokens need
    now: float  # of the last visit
    host_admits: bool  # an eviction sends it to the host


@dataclass(slots=True, eq=False)
class Plan:
    """One request in flight: what of its history is in pages. The user's pages are its own until commit or abort."""

    request_id: int
    user: int
    history: History
    tokens: int  # of the history, contextual ones included
    now: float
    bypassed: bool = False  # another request of the user came first: no pages, ever
    on_device: int = 0  # the history's first tokens whose keys and values were in pages at the lookup
    on_host: int = 0  # its first tokens that the host has, if they are more
    cached: int = 0  # its first tokens that need not be computed: `on_device`, and what is loaded from the host
    stored: int = 0  # its first tokens that are in pages once the batch is computed; at least `cached`
    load: Load | None = None  # what is to come from the host before
    pages: list[int] = field(default_factory=list)  # page i holds tokens i * page to (i + 1) * page - 1
    known: bool = False  # the policy has heard of the user
    host_admits: bool = False  # the host has some of the history already, or its policy admits the user at this visit
    evicted: bool = False  # while in flight: nothing is kept after it
    cleared: bool = False  # while in flight: the host keeps nothing after it either


@dataclass
class PagedBatch:
    """Where the keys and values of a batch lie, on its device: B sequences, L tokens to encode."""

    page_table: Tensor  # int32 [B, most pages], at least one column; 0 past a request's last page
    paged_lengths: Tensor  # int64 [B]: tokens in pages before the batch
    stored_lengths: Tensor  # int64 [B]: the same once its new tokens are written
    slots: Tensor  # int64 [L]: where each token's keys and values go, for PagePool.write; -1: nowhere


@dataclass
class HostPlaces:
    """A PagedBatch on the host, in one int64 buffer."""

    buffer: Tensor  # int64 [total], pinned where it is to be copied to a GPU
    sizes: list[int]  # of paged_lengths, stored_lengths, slots and page_table
    pages: int  # columns of the page table

    def to(self, device: torch.device, out: Tensor | None = None) -> PagedBatch:
        """Copy to the device in one go, without waiting; into `out` (int64 [total]) where it is given."""
        buffer = self.buffer.to(device, non_blocking=True) if out is None else out.copy_(self.buffer, non_blocking=True)
        cached, stored, slots, table = buffer.split(self.sizes)
        B = len(cached)
        return PagedBatch(table.view(torch.int32)[: B * self.pages].view(B, self.pages), cached, stored, slots)


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

    **Host tier.** With a `tier`, a state that is evicted goes there (queued under the lock: its pages are given away
    after). A lookup that finds more on the host than on the device notes it; `extend` decides how much of it is
    loaded; `start_loading` starts it. The host's copy stays, so that only what is new goes down again. A policy of
    its own decides who leaves the host, and at each visit of a user of whom it has nothing valid whether it would take
    them: visits count, whatever is evicted when.

    Thread-safe: one lock, held while the index changes and while copies are queued, never while
    anything is computed. cost: of computing so many tokens' state, for the policies.
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
    ) -> None:
        self.pool, self.tier = pool, tier
        self._policy, self._contextual, self._cost = policy, contextual_seq_len, cost
        self._tier_policy = tier_policy or policies.LRU()
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
            return Counters(**vars(self._counters))

    def lookup(self, requests: Sequence[Request], now: float) -> list[Plan]:
        """What is cached of each request's history. now: the policy's clock, seconds.

        Pins it: each plan must be committed or aborted.
        """
        plans = [self._plan(r, now) for r in requests]
        with self._lock:
            for plan in plans:
                self._find(plan)
        return plans

    def extend(self, plan: Plan, share: float = 1.0) -> bool:
        """Make room for the rest of the plan's history, evicting where it must.

        share: how much of what only the host has is loaded, in whole pages; the rest is computed again, meanwhile.
        With contextual tokens, which can't be split, all of it.

        Returns whether the history will be stored: not for a bypassed plan, a user whom the policy doesn't admit, or
        where requests in flight hold too much of the pool. Raises PoolFullError, changing nothing, for a history that
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
            if not plan.pages and needed and not plan.on_host and not self._admits(plan):
                self._counters.refused += 1
                return False
            try:
                if growth := needed - len(plan.pages):
                    self._make_room(growth, plan.now)
                    plan.pages.extend(self.pool.allocate(growth))
            except PoolFullError as error:
                self._counters.unstored += 1
                self._report("unstored", f"request {plan.request_id}: its new tokens are not cached: {error}")
                return False
            plan.stored = plan.tokens
            self._plan_load(plan, share)
            return True

    def start_loading(self, plans: Sequence[Plan]) -> Onload | None:
        """Start bringing up what these plans are to have from the host; None where that is nothing."""
        loads = [plan.load for plan in plans if plan.load is not None]
        if self.tier is None or not loads:
            return None
        with self._lock:
            return self.tier.load(loads)

    def prefetched(self, plan: Plan) -> bool:
        """Whether what only the host has of the plan's history was sent up already: loading that costs little."""
        with self._lock:
            more = plan.on_host > plan.on_device
            return more and self.tier is not None and self.tier.prefetched(plan.user)

    def prefetch(self, now: float, horizon: float) -> None:
        """Send up whom the policy expects within so many seconds and only the host has, as far as there is room."""
        if self.tier is None or horizon <= 0:
            return
        with self._lock:
            for user in self._ask("prefetch", now, horizon, otherwise=[]):
                there = user in self._states or user in self._in_flight
                if not there and user in self.tier.states and self.tier.prefetch(user):
                    self._counters.prefetches += 1

    def fault(self, what: str, error: Exception) -> None:
        """Count and log that something failed that was then done without the cache."""
        with self._lock:
            self._fault(what, error)

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
                self._settle(plan, plan.on_device)

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

    def clear(self, keep_host: bool = False) -> None:
        """Drop every state, those in flight once they are settled. Counters stay; nothing counts as evicted.

        keep_host: what is on the device goes to the host tier, and what is there stays.
        """
        with self._lock:
            for plan in self._in_flight.values():
                plan.evicted, plan.cleared = True, plan.cleared or not keep_host
            for user in list(self._states):
                if keep_host:
                    self._offload(user)
                self._release(user)
            if self.tier is not None and not keep_host:
                for user in self.tier.states.keys() - self._in_flight.keys():
                    self._drop_from_host(user)

    def restart(self, policy: Policy, tier_policy: Policy) -> None:
        """Drop every state, and begin anew with policies that have seen nobody."""
        self.clear()
        with self._lock:
            for user in [user for user, plan in self._in_flight.items() if plan.known]:
                self._in_flight[user].known = False  # the new policy has not heard of them
            self._policy, self._tier_policy = policy, tier_policy

    def batch(
        self,
        plans: Sequence[Plan],
        first_rows: Sequence[int],
        rows: int,
        *,
        sequences: int = 0,
        pages: int = 0,
        pin: bool = False,
    ) -> HostPlaces:
        """Page table, lengths and slots of a batch of `rows` tokens.

        first_rows: for each plan, which row of the batch's keys holds its first token that is not cached; its further
        ones follow. sequences, pages: the sizes of the page table, at least (a CUDA graph's are fixed). pin:
        page-locked memory, for GPUs.
        """
        B = max(len(plans), sequences)
        width = max([1, pages, *(len(plan.pages) for plan in plans)])
        sizes = [B, B, rows, -(-B * width // 2)]
        buffer = staging.zeros(sum(sizes), pin)
        ends = list(accumulate(sizes))
        cached, stored, slots, packed = (buffer.numpy()[end - n : end] for n, end in zip(sizes, ends, strict=True))
        slots[:] = -1
        table = packed.view(np.int32)[: B * width].reshape(B, width)
        for b, plan in enumerate(plans):
            table[b, : len(plan.pages)] = plan.pages
            cached[b], stored[b] = plan.cached, plan.stored
            first, new = first_rows[b], plan.stored - plan.cached
            slots[first : first + new] = self.pool.slots(plan.pages, plan.cached, plan.stored)
        return HostPlaces(buffer, sizes, width)

    # Below, the lock is held (but in `_plan`).

    def _plan(self, request: Request, now: float) -> Plan:
        history = History.of(request)
        return Plan(request.request_id, request.user_id, history, self._contextual + len(history), now)

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
        self._find_on_device(plan, state)
        if self.tier is not None:
            there = self.tier.states.get(plan.user)
            valid = self._valid_tokens(there.tokens, there.history, plan.history) if there is not None else 0
            plan.on_host = valid if valid > plan.on_device else 0
            plan.host_admits = valid > 0 or self._admits(plan, self._tier_policy)

    def _find_on_device(self, plan: Plan, state: _State | None) -> None:
        count = self._counters
        if state is None:
            count.misses += 1
            return
        plan.known = True
        valid = self._valid_tokens(state.tokens, state.history, plan.history)
        plan.on_device = plan.cached = plan.stored = valid
        plan.pages = self._cut(state.pages, valid)
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

    def _valid_tokens(self, tokens: int, had: History, history: History) -> int:
        """How many first tokens of a state (`tokens` of a history `had`) a history begins with."""
        valid = had.common(history)
        if self._contextual:
            return tokens if valid == len(had) == len(history) else 0
        return valid

    def _plan_load(self, plan: Plan, share: float) -> None:
        """Have as many of the host's tokens loaded."""
        if not plan.on_host:
            return
        size, wanted = self.pool.page, plan.on_host
        if share < 1 and not self._contextual:
            wanted = int(plan.on_device + share * (plan.on_host - plan.on_device)) // size * size
        if wanted > plan.on_device:
            first = plan.on_device // size
            plan.load = Load(plan.user, first, plan.pages[first : self.pool.pages_for(wanted)])
            plan.cached = wanted
            self._counters.host_hits += not plan.on_device
            self._counters.loaded_tokens += wanted - plan.on_device

    def _settle(self, plan: Plan, tokens: int) -> None:
        """End a plan: its first `tokens` tokens are the user's state."""
        del self._in_flight[plan.user]
        tokens = 0 if plan.evicted else tokens
        pages = self._cut(plan.pages, tokens)
        if tokens:
            history = plan.history.first(tokens - self._contextual)
            self._states[plan.user] = _State(tokens, history, pages, plan.now, plan.host_admits)
            self._ask("touch", plan.user, *self._size_and_cost(tokens), plan.now)
        elif plan.known:
            self._ask("remove", plan.user)
        if plan.cleared and self.tier is not None and plan.user in self.tier.states:
            self._drop_from_host(plan.user)

    def _cut(self, pages: list[int], tokens: int) -> list[int]:
        """Those of a user's pages that so many tokens take; the others are free."""
        kept = self.pool.pages_for(tokens)
        if kept < len(pages):
            self.pool.free(pages[kept:])
        return pages[:kept]

    def _check_in_flight(self, plan: Plan) -> None:
        if self._in_flight.get(plan.user) is not plan:
            raise RuntimeError(f"request {plan.request_id}: the plan is committed or aborted already")

    def _admits(self, plan: Plan, policy: Policy | None = None) -> bool:
        size, cost = self._size_and_cost(plan.tokens)
        return bool(self._ask("admit", plan.user, size, cost, plan.now, otherwise=True, of=policy))

    def _size_and_cost(self, tokens: int) -> tuple[int, float]:
        return self.pool.pages_for(tokens) * self.pool.page_bytes, self._cost(tokens)

    def _make_room(self, pages: int, now: float) -> None:
        """Evict until so many pages are free. Raises PoolFullError, evicting nobody, where that can't be had."""
        if pages <= self.pool.available:
            return
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
        if self._states[user].host_admits:
            self._offload(user)
        elif self.tier is not None:
            self._counters.host_refused += 1
        self._release(user)
        self._counters.evictions += 1

    def _release(self, user: int) -> None:
        self.pool.free(self._states.pop(user).pages)
        self._ask("remove", user)

    def _offload(self, user: int) -> None:
        """Have the host take a user's state, if it has room or can make it."""
        tier, state = self.tier, self._states[user]
        if tier is None:
            return
        there = tier.states.get(user)
        same = there.history.common(state.history) if there is not None else 0
        if same == len(state.history):
            same = state.tokens
        elif self._contextual:
            same = 0
        try:
            taken = self._make_room_on_host(user, len(state.pages), state.now)
            taken = taken and tier.store(user, state.tokens, state.history, state.pages, same)
        except Exception as error:
            self._fault(f"the state of user {user} did not reach the host", error)
            taken = False
            if there is not None and user not in tier.states:
                self._ask("remove", user, of=self._tier_policy)
        if taken:
            self._counters.offloads += 1
            self._ask("touch", user, *self._size_and_cost(state.tokens), state.now, of=self._tier_policy)
        else:
            self._counters.offloads_refused += 1

    def _make_room_on_host(self, user: int, pages: int, now: float) -> bool:
        """Whether there is room for a state of so many pages; others leave the host for it, none of those in flight."""
        assert self.tier is not None
        stay = self._in_flight.keys() | {user}
        leaving = self.tier.states.keys() - stay
        if pages > self.tier.pages:
            return False
        while self.tier.lacking(user, pages):
            if not leaving:
                return False
            victim = self._ask("victim", now, stay, of=self._tier_policy)
            if victim not in leaving:
                victim = next(iter(leaving))
            self._drop_from_host(victim)
            leaving.discard(victim)
        return True

    def _drop_from_host(self, user: int) -> None:
        assert self.tier is not None
        self.tier.drop(user)
        self._ask("remove", user, of=self._tier_policy)

    def _ask(self, question: str, *args: Any, otherwise: Any = None, of: Policy | None = None) -> Any:
        """A policy's answer; `otherwise` where it raises. of: by default the device's."""
        policy = of or self._policy
        known: Any = self._states if of is None or self.tier is None else self.tier.states
        try:
            answer = getattr(policy, question)(*args)
            if question == "victim" and answer not in known:
                raise LookupError(f"user {answer!r} has no state that can be evicted")
            return answer
        except Exception as error:
            self._counters.policy_errors += 1
            message = f"cache policy {type(policy).__name__}.{question} failed, going on without its advice"
            self._report("policy", message, error)
            return otherwise

    def _fault(self, what: str, error: Exception) -> None:
        self._counters.faults += 1
        self._report("fault", f"{what}; going on without it", error)

    def _report(self, kind: str, message: str, error: Exception | None = None) -> None:
        """A warning for the first event of a kind; further ones are there for debugging only."""
        level = logging.DEBUG if kind in self._warned else logging.WARNING
        logger.log(level, "%s", message, exc_info=error)
        self._warned.add(kind)
