"""A request that a strategy holds, and how it ends: with an answer or with the reason why there is none."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grbench.gate.measured import Answer
from grbench.scenarios.batcher import Ticket
from grbench.serve.costs import Kind
from grbench.serve.requests import Reply
from grengines.api import Cached, Request


class FailedError(Exception):
    """A strategy did not answer. reason: raised, hung, device, wrong, outside, late or out."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def outside(error: Exception) -> FailedError:
    """Return the error of a request that a healthy engine cannot answer."""
    return FailedError("outside", f"{type(error).__name__}: {error}")


@dataclass(slots=True)
class Done:
    """An answer of a strategy, with the times of its stages in milliseconds."""

    reply: Reply
    request: Request
    cached: Cached
    fallback: str
    batch_size: int
    queue_ms: float
    pack_ms: float
    load_ms: float
    compute_ms: float
    engine_ms: float | None  # the engine's call: the parts above, and what is in none of them; None: unknown
    generation: int  # of the strategy

    def as_answer(self) -> Answer:
        """Return it as the gate judges answers."""
        return Answer(
            self.request, self.reply.items, self.reply.scores, 0, self.batch_size, 0, self.cached, self.fallback
        )


@dataclass(slots=True)
class Held:
    """A request in the queue or in a batch. cost_s: what it adds to its batch. before_s: from its call to the queue."""

    future: asyncio.Future[Done]
    kind: Kind
    cost_s: float
    deadline: float  # seconds, time.perf_counter
    before_s: float = 0.0

    def fail(self, error: BaseException) -> None:
        """Give the request back, unless its client has left."""
        if not self.future.done():
            self.future.set_exception(error)


def next_batch(
    tickets: list[Ticket], held: Mapping[int, Held], fixed_s: float, drop: Callable[[list[Ticket]], None]
) -> tuple[list[Ticket], list[Ticket]]:
    """Return the requests of the next batch, and those that wait for a later one.

    held: by key of the ticket. fixed_s: what a batch takes beside its requests. drop: takes those that are in neither.

    The batch ends before a request that would make an earlier one late. A request that would itself be late is
    dropped, and so is one whose client has left. One alone runs until its deadline, whatever is predicted: so costs
    that are too high are measured again.
    """
    now = time.perf_counter()
    end = now + (fixed_s if len(tickets) > 1 else 0.0)
    soonest = math.inf  # deadline of those that are wanted so far
    wanted: list[Ticket] = []
    others: list[Ticket] = []
    dropped: list[Ticket] = []
    for place, ticket in enumerate(tickets):
        one = held.get(ticket.key)
        own_s = 0.0 if one is None or len(tickets) == 1 else one.cost_s
        if one is None or one.future.done() or end + own_s > one.deadline:
            dropped.append(ticket)
        elif end + own_s > soonest:
            others = tickets[place:]  # all of them, so that a user's requests stay in order
            break
        else:
            wanted.append(ticket)
            end, soonest = end + own_s, min(soonest, one.deadline)
    if dropped:
        drop(dropped)
    return wanted, others
