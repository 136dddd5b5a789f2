"""Searches one by one: what a wide beam costs, and what the prefix cache saves a user who returns.

    python experiments/gpu_retrieval.py wide --model decoder_1p7b --engines vllm hf --history 333 --beam 256 --batch 1 8
    python experiments/gpu_retrieval.py returning --model hstu_0p2b --history 1024 4096 --delta 16 64
    python experiments/gpu_retrieval.py --help

Random weights, random semantic IDs of 3 codes, histories of this very length, all different. Before an engine is timed
it passes the harness's gate on these requests. Times are of whole searches, from a request on the host to items there.
Prints Markdown tables. Options of an engine: --set engine.cuda_graphs=true. On a CPU: --model hstu_tiny --kernel torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from beam_search import LEVELS, random_ids

from grbench.beam_gate import BeamGate
from grbench.compose import compose_spec
from grengines import registry
from grengines.api import Catalogue, Request, Retrieval


def requests_of(items: int, history: int, count: int, seed: int) -> list[Request]:
    """Requests with random histories of this length."""
    rng = np.random.default_rng(seed)
    return [request_of(seed * 100_000 + i, rng.integers(0, items, history)) for i in range(count)]


def request_of(number: int, items: np.ndarray) -> Request:
    none, floats = np.zeros(len(items), np.int64), np.zeros(len(items), np.float32)
    return Request(number, number, items, none, floats, none, 0, items[:0], 0, 0.0, 1000.0)


@contextmanager
def engine_of(
    name: str, model: str, overrides: Sequence[str], retrieval: Retrieval, sample: Sequence[Request], batch: int
) -> Iterator[Any]:
    """A prepared engine that passed the gate on a few requests of the sample."""
    chosen = [f"engine={name}", f"model={model}", "task=generate", f"retrieval.beam_width={retrieval.beam_width}"]
    spec = compose_spec([*chosen, f"retrieval.k={retrieval.k}", *overrides])[0]
    catalogue = Catalogue(num_items=len(retrieval.ids.codes), num_users=1, num_actions=1)
    engine: Any = registry.build(
        spec.engine, spec.model, spec.kernel, catalogue, spec.seed, spec.cache, task="generate", retrieval=retrieval
    )
    try:
        engine.prepare(sample, batch)
        actual = engine.actual()
        gate = BeamGate(spec, catalogue, sample[:4], retrieval, actual["device"], actual["precision"])
        checked = gate.check(engine, batch)
        print(
            f"<!-- {name} {model}: gate error {checked.error:.2g} of {checked.tolerance:.2g}; {actual} -->", flush=True
        )
        engine.forget()
        yield engine
    finally:
        engine.close()


def milliseconds(engine: Any, requests: Sequence[Request]) -> float:
    begun = time.perf_counter()
    engine.generate(requests)
    return (time.perf_counter() - begun) * 1e3


def wide(args: argparse.Namespace) -> None:
    """A search with a wide beam, by engine, history and batch: every user new, and every user known."""
    ids = random_ids(args.items, args.codes)
    print("\n| model | engine | history, tokens | beam | batch | new users: p50 ms | p90 ms | known users: p50 ms |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.engines:
        for history in args.history:
            retrieval = Retrieval(ids, min(10, args.beam), args.beam)
            rounds = [requests_of(args.items, history, max(args.batch), seed) for seed in range(args.rounds + 1)]
            overrides = [*args.set, f"kernel={args.kernel}", f"model.max_positions={LEVELS * history}"]
            with engine_of(name, args.model, overrides, retrieval, rounds[0], max(args.batch)) as engine:
                for batch in args.batch:
                    engine.generate(rounds[0][:batch])  # shapes seen once
                    engine.forget()
                    new = [milliseconds(engine, r[:batch]) for r in rounds[1:]]
                    known = [milliseconds(engine, rounds[-1][:batch]) for _ in rounds[1:]]
                    p50, p90 = np.percentile(new, [50, 90])
                    told = f"| {args.model} | {name} | {LEVELS * history} | {args.beam} | {batch} "
                    print(f"{told}| {p50:.1f} | {p90:.1f} | {np.median(known):.1f} |", flush=True)


def returning(args: argparse.Namespace) -> None:
    """One user at a time: a first visit, the same history again, and with new items at its end."""
    ids = random_ids(args.items, args.codes)
    deltas = [0, *args.delta]
    told = [f"returns with {d} new items: p50 ms" for d in deltas]
    print(f"\n| model | engine | history, tokens | beam | first visit: p50 ms | {' | '.join(told)} | hit tokens |")
    print("|" + "---|" * (6 + len(deltas)))
    for name in args.engines:
        for history in args.history:
            retrieval = Retrieval(ids, min(10, args.beam), args.beam)
            users = requests_of(args.items, history + max(deltas), args.rounds, seed=1)
            overrides = [*args.set, f"kernel={args.kernel}", f"model.max_positions={LEVELS * (history + max(deltas))}"]
            with engine_of(name, args.model, overrides, retrieval, users, 1) as engine:
                first, again, hits = [], {d: [] for d in deltas}, 0.0
                for user in users:
                    visits = {d: request_of(user.request_id, user.history_items[: history + d]) for d in deltas}
                    for delta, visit in visits.items():
                        engine.forget()
                        first.append(milliseconds(engine, [visits[0]]))
                        again[delta].append(milliseconds(engine, [visit]))
                        hits = engine.generate([visit]).details.get("prefix_hit_tokens", 0.0)
                cells = " | ".join(f"{np.median(again[d]):.1f}" for d in deltas)
                told_first = f"| {args.model} | {name} | {LEVELS * history} | {args.beam} | {np.median(first):.1f} "
                print(f"{told_first}| {cells} | {hits:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["wide", "returning"])
    parser.add_argument("--model", default="hstu_0p2b", help="a file of conf/model")
    parser.add_argument("--engines", nargs="+", default=["vllm"], help="files of conf/engine")
    parser.add_argument("--kernel", default="triton", help="a file of conf/kernel; decoders and engine hf: torch")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--history", type=int, nargs="+", default=[333], help="items; three tokens each")
    parser.add_argument("--delta", type=int, nargs="+", default=[16, 64], help="items that are new at a return")
    parser.add_argument("--beam", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--set", nargs="*", default=[], help="further overrides, as for python -m grbench")
    args = parser.parse_args()
    {"wide": wide, "returning": returning}[args.what](args)


if __name__ == "__main__":
    main()
