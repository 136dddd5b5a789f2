"""Beam search over semantic IDs in the native engine: python experiments/beam_search.py [--device cpu]

Time of a search end to end (prompts on the host, items back there) by history, batch and beam width, with random
weights and random semantic IDs. Before each is timed its items are held against the same search in fp32 by plain
PyTorch, which tests/test_beam.py holds against encoding every beam anew: the best item must be the same or a near-tie,
and 95% of the k best found. Prints a table.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from grbench.compose import compose_spec
from grengines.cache.pool import PagePool
from grengines.hstu import beam
from grengines.hstu.generator import HSTUGenerator
from grengines.semantic.ids import SemanticIds
from grengines.semantic.search import Beams
from grengines.semantic.trie import Trie
from grkernels.operators import Operators
from grkernels.registry import FAMILIES

LEVELS, TIE = 3, 0.05  # levels; log-probabilities nearer than this count as equal in half precision


def random_ids(items: int, codes: int) -> SemanticIds:
    """Different random tuples."""
    rng = np.random.default_rng(0)
    keys = rng.choice(codes**LEVELS, items, replace=False)
    columns = np.unravel_index(keys, (codes,) * LEVELS)
    return SemanticIds(np.stack(columns, axis=1).astype(np.int32), (codes,) * LEVELS)


def agreement(found: Beams, expected: Beams, tie: float) -> float:
    """Share of the expected items that were found, near-ties with the last aside.

    Ends the run where it is below 0.95 for a request, or where a best item differs by more than a near-tie."""
    shares = []
    for ours, theirs, scores in zip(found.items, expected.items, expected.scores, strict=True):
        last = scores[theirs >= 0][-1]
        sure = theirs[(theirs >= 0) & (scores > last + tie)]  # above the cut by more than rounding
        shares.append(np.isin(sure, ours).mean() if len(sure) else 1.0)
        best = theirs[scores >= scores[0] - tie]
        if ours[0] not in best or shares[-1] < 0.95:
            told = f"{ours[:5].tolist()} in place of {theirs[:5].tolist()}, agreement {shares[-1]:.2f}"
            raise SystemExit(f"wrong items: {told}")
    return float(np.mean(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="hstu_0p2b", help="a file of conf/model")
    parser.add_argument("--kernel", default="cutlass", help="variant of every operator")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--history", type=int, nargs="+", default=[1024, 4096], help="items; three tokens each")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--width", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()

    model_spec = compose_spec([f"model={args.model}"])[0].model
    config, gpu = replace(model_spec, max_positions=LEVELS * max(args.history)), args.device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    torch.set_float32_matmul_precision("highest")
    ids = random_ids(args.items, args.codes)
    trie = Trie.of(ids).on(args.device)
    kernels = Operators.of(dict.fromkeys(FAMILIES, args.kernel))
    model = HSTUGenerator.build(config, ids.sizes, kernels, seed=0, device=args.device, dtype=dtype)
    exact = HSTUGenerator.build(config, ids.sizes, Operators.plain(), seed=0, device=args.device, dtype=torch.float32)
    page, tokens = 64, LEVELS * max(args.history)
    pool = PagePool(
        layers=config.layers,
        pages=max(args.batch) * -(-tokens // page),
        page=page,
        heads=config.heads,
        qk_dim=config.qk_dim,
        v_dim=config.v_dim,
        dtype=dtype,
        device=args.device,
    )
    rng = np.random.default_rng(1)
    print(f"{args.model}, {args.kernel}, {args.device}, {args.items} items of {LEVELS} codes among {args.codes}")
    print("\n| history, items | batch | beams | p50 ms | p90 ms | requests/s | agreement with fp32 |")
    print("|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for history in args.history:
            for batch in args.batch:
                prompts = [ids.tokens(rng.integers(0, args.items, history)).reshape(-1) for _ in range(batch)]
                for width in args.width:
                    k = min(width, 10)

                    def run(width: int = width, k: int = k, prompts: Any = prompts) -> Beams:
                        return beam.search(model, trie, prompts, pool, width=width, k=k)

                    wide = PagePool.within(
                        (tokens // page + 2) * pool.page_bytes * (2 if gpu else 1),
                        device=args.device,
                        layers=config.layers,
                        page=page,
                        heads=config.heads,
                        qk_dim=config.qk_dim,
                        v_dim=config.v_dim,
                        dtype=torch.float32,
                    )
                    expected = beam.search(exact, trie, prompts[:1], wide, width=width, k=k)
                    found = run()
                    first = Beams(found.items[:1], found.scores[:1], found.cuts[:1])
                    share = agreement(first, expected, TIE if gpu else 1e-4)
                    times = []
                    for _ in range(args.rounds):
                        begun = time.perf_counter()
                        run()
                        times.append((time.perf_counter() - begun) * 1e3)
                    p50, p90 = np.percentile(times, [50, 90])
                    times_told = f"{p50:.2f} | {p90:.2f} | {1e3 * batch / p50:.1f}"
                    print(f"| {history} | {batch} | {width} | {times_told} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
