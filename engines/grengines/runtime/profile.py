"""Batch sizes that a compiled engine is built for, from a sample of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import quantiles

from grengines.api import Request
from grengines.fallback import OutsideError
from grengines.runtime.batch import Encoding
from grengines.runtime.buckets import length_buckets, token_count


@dataclass(frozen=True)
class Sizes:
    """Sizes of a batch, or its limits."""

    batch: int  # sequences
    tokens: int  # of all sequences
    longest: int  # tokens of the longest sequence
    history: int  # contextual tokens and events of the longest history; at least 1
    candidates: int  # of all sequences

    @classmethod
    def of(cls, requests: Sequence[Request], encoding: Encoding) -> Sizes:
        """Return the sizes of these requests as one batch."""
        counts = [token_count(r, encoding) for r in requests]
        candidates = [len(r.candidates) for r in requests]
        history = max(n - c for n, c in zip(counts, candidates, strict=True))
        return cls(len(requests), sum(counts), max(counts), max(history, 1), sum(candidates))

    def fits(self, other: Sizes) -> bool:
        """Return whether no size exceeds the other's."""
        return all(a <= b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True))


def profiles(sample: Sequence[Request], encoding: Encoding, max_batch: int, count: int = 1) -> list[Sizes]:
    """Return the largest sizes of batches of `max_batch` requests like `sample`, smallest first. The last fits all.

    With count > 1 the others are for batches of requests no longer than the count-quantiles of the sample's lengths
    (2: the median). Lengths are rounded up to 16, 24, 32, 48, ..., so another sample of the same requests has the same
    profiles. Raises ValueError for an empty sample.
    """
    if not sample or max_batch < 1:
        raise ValueError(f"{len(sample)} sample requests, max_batch={max_batch}: both must be at least 1")
    lengths = sorted(token_count(r, encoding) for r in sample)
    limits = quantiles(lengths, n=count, method="inclusive") if min(count, len(lengths)) > 1 else []
    made = []
    for limit in [*limits, lengths[-1]]:
        alone = [Sizes.of([r], encoding) for r in sample if token_count(r, encoding) <= limit]
        longest, history, candidates = (
            length_buckets([max(getattr(s, name) for s in alone)])[0] for name in ("longest", "history", "candidates")
        )
        made.append(Sizes(max_batch, max_batch * longest, longest, history, max_batch * candidates))
    return sorted(set(made), key=lambda s: s.tokens)


def check(requests: Sequence[Request], encoding: Encoding, most: Sizes, hint: str) -> Sizes:
    """Return the sizes of the requests. Raises OutsideError if they exceed `most`, or there is no candidate.

    hint: the command or option that makes the engine take them.
    """
    needed = Sizes.of(requests, encoding)
    if not needed.candidates:
        raise OutsideError(f"request {requests[0].request_id}: no candidates; compiled engines rank at least one")
    for field in fields(Sizes):
        n, allowed = getattr(needed, field.name), getattr(most, field.name)
        if n > allowed:
            what = "requests" if field.name == "batch" else field.name
            ids = ", ".join(str(r.request_id) for r in requests[:4]) + (", ..." if len(requests) > 4 else "")
            raise OutsideError(f"requests {ids}: {what}={n}, the engine is built for at most {allowed}; {hint}")
    return needed
