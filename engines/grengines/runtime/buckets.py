"""Buckets: the sizes for which an engine captures CUDA graphs, and the one that a batch fits."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch

from grengines.api import Request
from grengines.runtime.batch import Bucket, Encoding

TILE = 128  # rows that a kernel processes at once: fewer take as long
STEP = 1.15  # most padding of the tokens of a large packed batch


class Buckets:
    """Buckets by their size of a batch, for a look-up that takes microseconds."""

    def __init__(self, buckets: Iterable[Bucket] = ()) -> None:
        groups: dict[int, list[Bucket]] = defaultdict(list)
        for bucket in sorted(buckets):
            groups[bucket.batch].append(bucket)
        self._batches = list(groups)
        self._groups = [(group, [b.tokens for b in group]) for group in groups.values()]

    def __iter__(self) -> Iterator[Bucket]:
        for group, _ in self._groups:
            yield from group

    def choose(self, needed: Bucket) -> Bucket | None:
        """Return the bucket of the fewest sequences, and then tokens, that holds these sizes; None if none does."""
        for group, totals in self._groups[bisect_left(self._batches, needed.batch) :]:
            for bucket in group[bisect_left(totals, needed.tokens) :]:
                if needed.fits(bucket):
                    return bucket
        return None


def batch_buckets(max_batch: int) -> list[int]:
    """Return 1, 2, 4, 8, ... and max_batch."""
    return [*(1 << i for i in range((max_batch - 1).bit_length())), max_batch]


def first_batches(max_batch: int, device: torch.device) -> list[int]:
    """Return the sizes of warm-up batches: all buckets' on a GPU, which compiles for a size, else the largest."""
    return batch_buckets(max_batch) if device.type == "cuda" else [max_batch]


def length_buckets(lengths: Iterable[int]) -> list[int]:
    """Return those of 16, 24, 32, 48, 64, ... that the given lengths (tokens) need, shortest first."""
    wanted = sorted(set(lengths))
    steps = [16]
    while steps[-1] < wanted[-1]:
        power = 1 << (steps[-1].bit_length() - 1)
        steps.append(power * 3 // 2 if steps[-1] == power else power * 2)
    return sorted({steps[bisect_left(steps, n)] for n in wanted})


def total_buckets(least: int, most: int) -> list[int]:
    """Return totals of tokens that hold batches of `least` to `most` tokens, the last exactly.

    They are 32, 64, 128 and from there on multiples of TILE, about STEP apart.
    """
    steps = [32, 64, 128]
    while steps[-1] < most:
        steps.append(-(-int(max(steps[-1] * STEP, steps[-1] + 1)) // TILE) * TILE)
    return [*(n for n in steps if least <= n < most), most]


def token_count(request: Request, encoding: Encoding) -> int:
    """Return the tokens of a request: contextual, history and candidates."""
    events = len(request.history_items)
    return encoding.contextual(events) + events + len(request.candidates)


def plan_buckets(
    sample: Sequence[Request],
    encoding: Encoding,
    max_batch: int,
    lengths: Sequence[int] = (),
    *,
    packed: bool,
    cached: bool = False,
) -> list[Bucket]:
    """Return all buckets for batches of requests like `sample`, in which the tokens of some may be cached.

    packed: a bucket has a total of tokens, which its sequences share in any way: for attention that skips what is past
    a sequence's end. Otherwise every sequence is padded to one length. lengths: tokens of a sequence for which there
    are buckets; empty for those that the sample needs.
    """
    most = max(len(r.candidates) for r in sample)
    counts = [token_count(r, encoding) for r in sample]
    longest = max([*counts, *lengths])
    keys = longest if cached else 0
    if not packed:
        few = [most + (1 << i) for i in range(longest.bit_length())] if cached else []  # new events of a visit
        chosen = set(lengths) or length_buckets([*counts, *(n for n in few if n < longest)])
        return even_buckets(chosen, max_batch, most, keys)
    shortest = max(min(len(r.candidates) for r in sample), 1) if cached else min(counts)
    buckets, fewer = [], 0
    for batch in batch_buckets(max_batch):
        totals = [batch * n for n in lengths] or total_buckets((fewer + 1) * shortest, batch * longest)
        for tokens in totals:
            length, targets = min(tokens, longest), min(tokens, most)
            buckets.append(
                Bucket(batch, tokens, min(tokens, batch * most), length, targets, max(keys, length)),
            )
        fewer = batch
    return sorted(set(buckets))


def even_buckets(lengths: Iterable[int], max_batch: int, candidates: int = 0, keys: int = 0) -> list[Bucket]:
    """Return a bucket for each of the lengths and each size of a batch."""
    return sorted(Bucket.even(b, n, min(candidates, n), keys) for n in lengths for b in batch_buckets(max_batch))
