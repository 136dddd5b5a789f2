"""The cache of hot embedding rows under Zipf skew: hit rates beside the best static set, bytes moved, time of a lookup.

    python experiments/item_cache.py --threads 1
    python experiments/item_cache.py --device cuda --rows 2000000

Draws are independent, so the best that any cache can expect is known: to hold the most frequent rows forever. LRU is
computed by Che's approximation, not run. Distinct rows, MB and microseconds are those of one lookup. Lookups follow
each other without other work between.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import torch

from grengines.cache.items import HotRows, RowCounters


def measure(args: argparse.Namespace, host: torch.Tensor, power: float, budget: float) -> dict[str, Any]:
    """The row of one exponent and one budget (% of the table's rows)."""
    rng = np.random.default_rng(args.seed)
    weights = np.arange(1, args.rows + 1) ** -power
    cumulative = np.cumsum(weights / weights.sum())
    order = rng.permutation(args.rows)  # order[rank]: hot rows lie anywhere in the table
    slots = max(round(args.rows * budget / 100), 1)
    hot = HotRows(host, slots=slots, device=args.device, dtype=host.dtype)

    def draw() -> npt.NDArray[np.int64]:
        return np.searchsorted(cumulative, rng.random(args.tokens)).clip(max=args.rows - 1)

    for _ in range(args.warmup):
        hot.lookup(order[draw()])
    batches = [draw() for _ in range(args.lookups)]
    before, taken = asdict(hot.counters), []
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if args.device == "cuda" else []
    if marks:
        torch.cuda.synchronize()
        marks[0].record()
    for ranks in batches:
        rows = order[ranks]
        begun = time.perf_counter()
        hot.lookup(rows)
        taken.append((time.perf_counter() - begun) * 1e6)
    if marks:
        marks[1].record()
        marks[1].synchronize()
    counted = RowCounters(**{name: value - before[name] for name, value in asdict(hot.counters).items()})
    different = [np.unique(ranks) for ranks in batches]
    static_tokens = sum(int((ranks < slots).sum()) for ranks in batches) / counted.tokens
    static_distinct = sum(int((ranks < slots).sum()) for ranks in different) / counted.distinct
    row = {
        "zipf": power,
        "budget_%": budget,
        "token_hits_%": 100 * counted.token_hits / counted.tokens,
        "static_%": 100 * static_tokens,
        "lru_%": 100 * lru(weights / weights.sum(), slots),
        "distinct": round(counted.distinct / args.lookups),
        "distinct_hits_%": 100 * counted.hits / counted.distinct,
        "distinct_static_%": 100 * static_distinct,
        "moved_mb": counted.bytes / args.lookups / 1e6,
        "p50_us": float(np.median(taken)),
        "p99_us": float(np.quantile(taken, 0.99)),
    }
    if marks:
        on_device = marks[0].elapsed_time(marks[1]) * 1e3  # us, with the gaps in which the host was late
        row |= {"device_us": on_device / args.lookups, "gb_per_s": counted.bytes / on_device / 1e3}
    return row


def lru(p: npt.NDArray[np.float64], slots: int) -> float:
    """Hit rate of LRU for independent draws (Che's approximation). p: probability of each row.

    A row stays for the time in which as many different rows are drawn as there are slots.
    """
    low, high = float(slots), float(slots)
    while np.exp(-p * high).sum() > len(p) - slots:
        high *= 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if np.exp(-p * middle).sum() > len(p) - slots else (low, middle)
    return float(p @ (1 - np.exp(-p * high)))


def copy_rate() -> float:
    """GB/s of page-locked copies to the device, one after another: the limit of a lookup's copies."""
    source = torch.empty(8 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source, non_blocking=True)
    begun.record()
    for _ in range(100):
        target.copy_(source, non_blocking=True)
    ended.record()
    ended.synchronize()
    return 100 * source.nbytes / begun.elapsed_time(ended) / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", overrides=False)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the host table (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="elements of a row, bf16 (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=10_000, help="rows per lookup, with repeats (default: %(default)s)"
    )
    parser.add_argument("--zipf", type=float, nargs="+", default=[0.8, 1.0, 1.2], help="exponents")
    parser.add_argument("--budget", type=float, nargs="+", default=[1, 5, 10, 25], help="slots, %% of the rows")
    parser.add_argument("--warmup", type=int, default=1000, help="lookups that are not timed (default: %(default)s)")
    parser.add_argument("--lookups", type=int, default=200, help="lookups that are timed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the gather (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    rows = common.Rows(args, __file__, arguments)
    host = torch.ones(args.rows, args.width, dtype=torch.bfloat16)
    rows.note(f"{args.rows} rows of {args.width} bf16, {args.tokens} tokens per lookup, {args.threads} threads.")
    if args.device == "cuda":
        common.need_gpu(parser)
        rows.note(f"Page-locked copies of 8 MiB reach {copy_rate():.1f} GB/s.")
    for power in args.zipf:
        for budget in args.budget:
            rows.add(**measure(args, host, power, budget))
    rows.close()


if __name__ == "__main__":
    common.run(main)
