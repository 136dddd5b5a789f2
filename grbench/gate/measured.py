"""The answers of the measurement: each is checked as it comes, and a sample is compared with the reference afterwards.

As it comes, an answer must be there, and have the right shape, type and range and finite numbers. The sample has
`gate.measured` answers drawn at random from all, and `EACH_CLASS` of every class, so that rare cases are in it too.
Classes are the batch's size, the place in the batch, the history's length, what was cached and by which tier, and the
engine that answered; sizes, places and lengths in classes that double in width. The shortest and the longest histories
and the run's first and last answers are in it as well.

The form is checked between batches, once a batch's latencies are taken, and the comparison follows the measurement.
A request that waits for the next batch waits for this check too, so `watch` does little for an answer that is not kept.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from grbench.gate.form import Form
from grengines.api import Cached, Float32Array, Int64Array, Request
from grengines.numerics import Comparison, IncorrectError

EACH_CLASS = 3
CONFIDENCE = 0.95
UNCACHED = Cached()


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One answer of the measurement, and the batch that it came in."""

    request: Request
    items: Int64Array | None  # None for the task rank
    scores: Float32Array
    number: int  # of the answers before it
    batch_size: int
    place: int  # in the batch, from 0
    cached: Cached
    fallback: str  # the engine that answered; "": the first

    def __str__(self) -> str:
        request, cached = self.request, self.cached
        there = f"{cached.tokens} of {cached.of} tokens cached" if cached.tokens else "nothing cached"
        below = [(cached.from_host, "the host tier"), (cached.from_storage, "the storage tier")]
        loaded = "".join(f", {tokens} of them from {tier}" for tokens, tier in below if tokens)
        engine = f", engine {self.fallback}" if self.fallback else ""
        return (
            f"answer {self.number} (request {request.request_id} of user {request.user_id}, "
            f"{len(request.history_items)} events, place {self.place + 1} in a batch of {self.batch_size}, "
            f"{there}{loaded}{engine})"
        )


@dataclass
class Verdict:
    """Comparison of one answer with the reference."""

    error: float
    tolerance: float  # the largest error that passes
    problem: str | None = None  # what is wrong; None: the answer is right


class Judge(Protocol):
    """A gate that judges answers of the measurement."""

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Compare each answer with the reference's."""


@dataclass(kw_only=True)
class MeasuredResult(Comparison):
    """Figures of the comparison. `error` is that of the worst answer, as a share of what it is allowed."""

    answers: int  # of the measurement
    checked: int
    at_random: int  # of those, drawn at random from all
    wrong: int
    most_wrong_share: float  # of all answers: a larger one is excluded with 95% confidence
    words: str
    classes: dict[str, list[int]]  # answers of each class, and how many of them were checked


class _Draw:
    """The `size` answers with the smallest numbers. With random numbers each answer is equally likely to be kept."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.below = math.inf  # only an answer with a smaller number would be kept
        self._kept: list[tuple[float, int, Answer]] = []

    def add(self, number: float, answer: Answer) -> None:
        heapq.heappush(self._kept, (-number, answer.number, answer))
        if len(self._kept) > self._size:
            heapq.heappop(self._kept)
        if len(self._kept) == self._size:
            self.below = -self._kept[0][0]

    def __iter__(self) -> Iterator[Answer]:
        return (answer for _, _, answer in self._kept)

    def __len__(self) -> int:
        return len(self._kept)


class MeasuredAnswers:
    """The sample. `watch` takes the answers of every batch, by one thread at a time."""

    def __init__(self, form: Form, count: int, seed: int) -> None:
        """Draw `count` answers at random."""
        self._form = form
        self._random = np.random.default_rng(seed).random
        self._seen = 0
        self._from_all = _Draw(count)
        self._classes: defaultdict[str, defaultdict[int | str, _Draw]]  # by axis
        self._classes = defaultdict(lambda: defaultdict(lambda: _Draw(EACH_CLASS)))
        self._counts: defaultdict[str, Counter[int | str]] = defaultdict(Counter)  # answers of each class, by axis
        self._batches: Counter[tuple[int, int]] = Counter()  # of a number of answers and a size
        self._first, self._shortest, self._longest = (_Draw(EACH_CLASS) for _ in range(3))  # by other numbers
        self._last: list[_Batch] = []

    def watch(self, requests: Sequence[Request], result: Any, size: int) -> None:
        """Check the answers of a batch, and keep those that are drawn. Raises IncorrectError.

        size: of the batch; with continuous batching, requests in the step.
        """
        if problem := self._form.problem(requests, result):
            raise IncorrectError(f"while measuring, in a batch of {size}: {problem}")
        batch, of = _Batch(requests, result, size, self._seen), self._classes
        lengths = [len(r.history_items) for r in requests]
        events = [length.bit_length() for length in lengths]
        states = [_state(cached) for cached in result.cached]
        numbers = self._random(len(requests)).tolist()

        by_place, by_events, by_state = of["place"], of["events"], of["cache"]
        below = max(self._from_all.below, of["batch size"][size.bit_length()].below)
        if result.fallback:
            below = max(below, of["engine"][result.fallback].below)
        if (
            self._seen < EACH_CLASS
            or min(lengths) < self._shortest.below
            or max(lengths) > -self._longest.below
            or (len(requests) == size > 1 and numbers[-1] < by_place["last"].below)
        ):
            below = math.inf
        for place, number in enumerate(numbers):
            if (
                number < below
                or number < by_place[(place + 1).bit_length()].below
                or number < by_events[events[place]].below
                or (states and number < by_state[states[place]].below)
            ):
                self._draw(batch, place, number)

        self._seen += len(requests)
        self._batches[len(requests), size] += 1
        self._counts["events"].update(events)
        self._counts["cache"].update(states)
        self._counts["engine"][result.fallback] += len(requests)
        self._last = [batch, *self._last[: EACH_CLASS - 1]]

    def kept(self) -> list[Answer]:
        """Return the sample in the order of the run."""
        places = [(batch, i) for batch in self._last for i in reversed(range(len(batch.requests)))]
        last = [batch.answer(i) for batch, i in places[:EACH_CLASS]]
        of_classes = (draw for draws in self._classes.values() for draw in draws.values())
        draws = (self._from_all, self._first, self._shortest, self._longest, *of_classes)
        drawn = [answer for draw in draws for answer in draw]
        return [answer for _, answer in sorted({a.number: a for a in (*last, *drawn)}.items())]

    def compare(self, judge: Judge) -> MeasuredResult:
        """Compare the sample with the reference."""
        answers = self.kept()
        verdicts = judge.judge(answers)
        shares = [v.error / v.tolerance for v in verdicts]
        wrong = [i for i, v in enumerate(verdicts) if v.problem is not None]
        everything, drawn = self._seen, len(self._from_all)
        excluded = 0.0 if drawn == everything else 1 - (1 - CONFIDENCE) ** (1 / drawn)
        words = _words(everything, len(answers), drawn, excluded)
        if wrong:
            worst = max(wrong, key=lambda i: shares[i])
            words = (
                f"{len(wrong)} of the {len(answers)} measured answers that were compared with the fp32 reference are "
                f"wrong; the worst is {answers[worst]}: {verdicts[worst].problem}"
            )
        return MeasuredResult(
            passed=not wrong,
            error=max(shares),
            tolerance=1.0,
            answers=everything,
            checked=len(answers),
            at_random=drawn,
            wrong=len(wrong),
            most_wrong_share=1.0 if wrong else excluded,
            words=words,
            classes={
                f"{axis} {_range(value)}": [self._answers_of(axis, value), len(draw)]
                for axis, draws in self._classes.items()
                for value, draw in draws.items()
            },
        )

    def _draw(self, batch: _Batch, place: int, number: float) -> None:
        """Let an answer take part in the draws. number: at random."""
        size, events, result, of = batch.size, len(batch.requests[place].history_items), batch.result, self._classes
        draws = [
            (self._from_all, number),
            (of["batch size"][size.bit_length()], number),
            (of["place"][(place + 1).bit_length()], number),
            (of["events"][events.bit_length()], number),
            (self._first, batch.first + place),
            (self._shortest, events),
            (self._longest, -events),
        ]
        if place and place + 1 == size:
            draws.append((of["place"]["last"], number))
        if result.cached:
            draws.append((of["cache"][_state(result.cached[place])], number))
        if result.fallback:
            draws.append((of["engine"][result.fallback], number))
        answer = None
        for draw, own_number in draws:
            if own_number < draw.below:
                answer = answer or batch.answer(place)
                draw.add(own_number, answer)

    def _answers_of(self, axis: str, value: int | str) -> int:
        """Return the number of answers of a class."""
        if axis == "batch size":
            return sum(answers * n for (answers, size), n in self._batches.items() if size.bit_length() == value)
        if axis == "place":
            return sum(
                n
                for (answers, size), n in self._batches.items()
                for place in range(answers)
                if value == (place + 1).bit_length() or (value == "last" and 0 < place == size - 1)
            )
        return self._counts[axis][value]


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """A batch that has ended. first: answers before it."""

    requests: Sequence[Request]
    result: Any
    size: int
    first: int

    def answer(self, place: int) -> Answer:
        """Return a copy of one answer, so that neither a buffer that is used again nor the batch's memory is kept."""
        result = self.result
        return Answer(
            self.requests[place],
            result.items[place].copy() if hasattr(result, "items") else None,
            result.scores[place].copy(),
            self.first + place,
            self.size,
            place,
            result.cached[place] if result.cached else UNCACHED,
            result.fallback,
        )


def tier_of(cached: Cached) -> str:
    """Return the lowest tier that a request's cached tokens came from, or "miss"."""
    if not cached.tokens:
        return "miss"
    return "storage" if cached.from_storage else "host" if cached.from_host else "device"


def _state(cached: Cached) -> str:
    """Return the class of a cache state."""
    if not cached.tokens:
        return "miss"
    tier = tier_of(cached)
    return f"{tier} hit" if cached.tokens >= cached.of else f"{tier} hit, new events"


def _range(value: int | str) -> str:
    """Return the numbers with this many bits, or a name as it is."""
    if isinstance(value, str):
        return value
    low, high = (1 << value) >> 1, (1 << value) - 1
    return f"{low}" if low == high else f"{low}-{high}"


def _words(everything: int, checked: int, drawn: int, excluded: float) -> str:
    """Say what a sample without a wrong answer shows."""
    if drawn == everything:
        return f"all {everything} measured answers were compared with the fp32 reference, and none is wrong"
    return (
        f"{checked} of {everything} measured answers were compared with the fp32 reference, {drawn} of them drawn at "
        f"random from all, and none is wrong: with 95% confidence fewer than {excluded:.2%} of all answers are wrong"
    )
