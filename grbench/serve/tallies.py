"""Counters and histograms that every call counts with, on the event loop alone.

prometheus_client's own take a lock for each number, and compare it with one bucket after another.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily


@dataclass(slots=True)
class Count:
    """A counter. created: seconds, time.time."""

    value: float = 0.0
    created: float = field(default_factory=time.time)


class Spread:
    """A histogram. bounds: the upper ones of its buckets, in ascending order; one more bucket has what is above."""

    __slots__ = ("bounds", "created", "numbers", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.sum, self.created = bounds, 0.0, time.time()
        self.numbers = [0] * (len(bounds) + 1)  # of each bucket alone

    def observe(self, value: float) -> None:
        """Count a value."""
        self.sum += value
        self.numbers[bisect_left(self.bounds, value)] += 1

    @property
    def count(self) -> int:
        """Number of the values."""
        return sum(self.numbers)


class Counts:
    """Counters by the values of their labels."""

    def __init__(self, name: str, about: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self.by: defaultdict[tuple[str, ...], Count] = defaultdict(Count)
        self._name, self._about, self._labels = name, about, labels
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield what Prometheus reads."""
        family = CounterMetricFamily(self._name, self._about, labels=self._labels)
        has_created = _has_created()
        for labels, one in self.by.items():
            family.add_metric(labels, one.value, created=one.created if has_created else None)
        yield family


class Spreads:
    """Histograms by the values of their labels. buckets: their upper bounds, in ascending order."""

    def __init__(
        self, name: str, about: str, labels: Sequence[str], buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self.by: defaultdict[tuple[str, ...], Spread] = defaultdict(lambda: Spread(buckets))
        self._name, self._about, self._labels = name, about, labels
        self._bounds = [*(str(float(bound)) for bound in buckets), "+Inf"]
        registry.register(self)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield what Prometheus reads."""
        family = HistogramMetricFamily(self._name, self._about, labels=self._labels)
        has_created = _has_created()
        for labels, one in self.by.items():
            family.add_metric(labels, list(zip(self._bounds, accumulate(one.numbers), strict=True)), one.sum)
            if has_created:
                family.add_sample(f"{self._name}_created", dict(zip(self._labels, labels, strict=True)), one.created)
        yield family


def _has_created() -> bool:
    """Return whether the library writes when a counter began: PROMETHEUS_DISABLE_CREATED_SERIES=true forbids it."""
    [family] = Counter("any", "Any counter", registry=None).collect()
    return any(sample.name.endswith("_created") for sample in family.samples)
