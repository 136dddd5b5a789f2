"""The embedding hot cache under Zipf skew: hit rates against the best static set, bytes moved, time of a lookup.

    python experiments/item_cache.py [--rows 10000000] [--device cuda] ...

Draws are independent, so that the best that any cache can expect is known: to hold the most frequent rows for ever.
LRU is computed, not run. Prints a Markdown table, a line for each exponent and budget; distinct, MB and µs are a
lookup's. Lookups follow each other without other work between.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import torch

from grengines.cache.items import HotRows, RowCounters

HEADER = [
    *("zipf", "budget", "token hits", "static", "LRU", "distinct", "distinct hits", "static", "MB moved"),
    *("µs", "p99 µs"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the host table (%(default)s)")
    parser.add_argument("--width", type=int, default=512, help="elements of a row, bf16 (%(default)s)")
    parser.add_argument("--tokens", type=int, default=10_000, help="rows a lookup, repeats included (%(default)s)")
    parser.add_argument("--zipf", type=float, nargs="+", default=[0.8, 1.0, 1.2], help="exponents")
    parser.add_argument("--budget", type=float, nargs="+", default=[1, 5, 10, 25], help="slots, %% of the rows")
    parser.add_argument("--warmup", type=int, default=1000, help="lookups before those that count (%(default)s)")
    parser.add_argument("--lookups", type=int, default=200, help="that count (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the gather (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    host = torch.ones(args.rows, args.width, dtype=torch.bfloat16)
    columns = [*HEADER, *(["GPU µs", "GB/s"] if args.device == "cuda" else [])]
    print(f"{args.rows} rows of {args.width} bf16, {args.tokens} tokens a lookup, {args.threads} threads", end="")
    print(f"; page-locked copies of 8 MiB: {copy_rate():.1f} GB/s\n" if args.device == "cuda" else "\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for power in args.zipf:
        for budget in args.budget:
            print(f"| {power:g} | {budget:g} % | {' | '.join(measure(args, host, power, budget))} |", flush=True)


def measure(args: argparse.Namespace, host: torch.Tensor, power: float, budget: float) -> list[str]:
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
    figures = [
        f"{counted.token_hits / counted.tokens:.1%}",
        f"{static_tokens:.1%}",
        f"{lru(weights / weights.sum(), slots):.1%}",
        f"{counted.distinct / args.lookups:.0f}",
        f"{counted.hits / counted.distinct:.1%}",
        f"{static_distinct:.1%}",
        f"{counted.bytes / args.lookups / 1e6:.2f}",
        f"{np.median(taken):.0f}",
        f"{np.quantile(taken, 0.99):.0f}",
    ]
    if marks:
        on_device = marks[0].elapsed_time(marks[1]) * 1e3  # µs, the gaps in which the host was late included
        figures += [f"{on_device / args.lookups:.0f}", f"{counted.bytes / on_device / 1e3:.1f}"]
    return figures


def lru(p: npt.NDArray[np.float64], slots: int) -> float:
    """Hit rate of LRU for independent draws (Che's approximation): a row stays for the time in which as many different
    rows as there are slots are drawn. p: probability of each row."""
    low, high = float(slots), float(slots)
    while np.exp(-p * high).sum() > len(p) - slots:
        high *= 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if np.exp(-p * middle).sum() > len(p) - slots else (low, middle)
    return float(p @ (1 - np.exp(-p * high)))


def copy_rate() -> float:
    """GB/s of page-locked copies to the device, one after another: what a lookup's copies can reach."""
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


if __name__ == "__main__":
    main()
