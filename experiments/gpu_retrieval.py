"""Retrieval by engine: under load, with wide beams, and for users who return.

    python experiments/gpu_retrieval.py load --engines hstu vllm hf --history 1024 4096 --beams 1 32 256
    python experiments/gpu_retrieval.py wide --model decoder_1p7b --engines vllm hf --history 333 --beam 256 --batch 1 8
    python experiments/gpu_retrieval.py returning --model hstu_0p2b --history 1024 4096 --delta 16 64
    python experiments/gpu_retrieval.py --help

Random weights, random semantic IDs of 3 codes, histories of this very length, all different. Before an engine is timed
it passes the harness's gate on these requests. Times are of whole searches, from a request on the host to items there.
`load` drives the harness's scenarios: offline, then a Poisson server at half the rate that offline reached; there every
request is a user's first.
Prints Markdown tables. Options of an engine: --set engine.cuda_graphs=true. On a CPU: --model hstu_tiny --kernel torch.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grbench.config.compose import compose_spec
from grbench.execution import stats
from grbench.gate.generate import GenerateGate, GenerateGateResult
from grbench.report.cells import figure
from grbench.scenarios import Measurement, run_scenario
from grbench.scenarios.config import OfflineConfig, ScenarioConfig, ServerConfig
from grengines import registry
from grengines.api import Catalogue, Request, Retrieval
from grengines.semantic.ids import SemanticIds

LEVELS = 3
SECONDS = 2.0  # about what a measurement of `load` takes
P99_SECONDS = 16.0  # and what the 1000 requests that a p99 needs may take; else there is none
Gates = dict[Any, GenerateGate]


def random_ids(items: int, codes: int) -> SemanticIds:
    """Different random tuples."""
    rng = np.random.default_rng(0)
    keys = rng.choice(codes**LEVELS, items, replace=False)
    columns = np.unravel_index(keys, (codes,) * LEVELS)
    return SemanticIds(np.stack(columns, axis=1).astype(np.int32), (codes,) * LEVELS)


def requests_of(items: int, history: int, count: int, seed: int) -> list[Request]:
    """Requests with random histories of this length."""
    rng = np.random.default_rng(seed)
    return [request_of(seed * 100_000 + i, rng.integers(0, items, history)) for i in range(count)]


def request_of(number: int, items: np.ndarray) -> Request:
    none, floats = np.zeros(len(items), np.int64), np.zeros(len(items), np.float32)
    return Request(number, number, items, none, floats, none, 0, items[:0], 0, 0.0, 1000.0)


@contextmanager
def engine_of(
    name: str,
    model: str,
    overrides: Sequence[str],
    retrieval: Retrieval,
    sample: Sequence[Request],
    batch: int,
    gates: Gates,
) -> Iterator[tuple[Any, GenerateGateResult]]:
    """A prepared engine that passed the gate on a few requests of the sample, and what the gate found. gates: those
    that engines of the same model, in the same precision, were held to before."""
    chosen = [f"engine={name}", f"model={model}", "task=generate", f"retrieval.beam_width={retrieval.beam_width}"]
    spec = compose_spec([*chosen, f"retrieval.k={retrieval.k}", *overrides])[0]
    catalogue = Catalogue(num_items=len(retrieval.ids.codes), num_users=1, num_actions=1)
    engine: Any = registry.build(
        spec.engine, spec.model, spec.kernel, catalogue, spec.seed, spec.cache, task="generate", retrieval=retrieval
    )
    try:
        engine.prepare(sample, batch)
        actual = engine.actual()
        key = model, retrieval.beam_width, sample[0].request_id, len(sample[0].history_items), actual["precision"]
        if key not in gates:
            gates.clear()  # a reference holds a model in fp32
            gates[key] = GenerateGate(spec, catalogue, sample[:4], retrieval, actual["device"], actual["precision"])
        checked = gates[key].check(engine, batch)
        print(f"<!-- {name} {model}: {checked.to_dict()}; {actual} -->", flush=True)
        engine.reset_cache()
        yield engine, checked
    finally:
        engine.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def milliseconds(engine: Any, requests: Sequence[Request]) -> float:
    begun = time.perf_counter()
    engine.generate(requests)
    return (time.perf_counter() - begun) * 1e3


def drive(config: ScenarioConfig, engine: Any, requests: list[Request]) -> tuple[float, stats.Summary]:
    """Requests a second, and latencies."""
    engine.reset_cache()
    with tempfile.TemporaryDirectory() as folder:
        found: Measurement = run_scenario(
            config, engine, requests, task="generate", latency_limit_ms=1000.0, seed=0, folder=Path(folder)
        )
    samples = found.samples
    took = float((samples["arrival_s"] + samples["latency_ms"] / 1e3).max())
    return stats.throughput(len(samples["latency_ms"]), took), stats.latency_summary(samples["latency_ms"])


def load(args: argparse.Namespace) -> None:
    """Offline, then a server under Poisson load, by model, history, beam and engine."""
    ids = random_ids(args.items, args.codes)
    columns = ["model", "engine", "history, tokens", "beam", "batch to", "offline requests/s", "server requests/s"]
    columns += ["p50 ms", "p90 ms", "p99 ms", "gate: error of allowed", "overlap"]
    print(f"\n| {' | '.join(columns)} |\n|" + "---|" * len(columns))
    gates: Gates = {}
    for model, history, beam in ((m, h, b) for h in args.history for b in args.beams for m in args.models):
        retrieval = Retrieval(ids, min(10, beam), beam)
        sample, more = (requests_of(args.items, history, 512, seed) for seed in (history, history + 1))
        for name in args.engines:
            batch = 1 if name == "hf" and history * beam > args.hf_rows else args.batch[-1]
            plain = name == "hf" or model.startswith("decoder")
            overrides = [f"kernel={'torch' if plain else args.kernel}", f"model.max_positions={LEVELS * history}"]
            if args.graphs and name == "hstu":
                overrides += ["engine.cuda_graphs=true", f"engine.graph_lengths=[{LEVELS * history}]"]
            if args.graphs and name == "vllm":
                overrides += ["engine.cuda_graphs=true", "engine.gpu_memory_utilization=0.6"]
                overrides += [f"engine.graph_tokens={args.graph_tokens}"]
            overrides += args.set
            told = f"| {model} | {name} | {LEVELS * history} | {beam} | {batch} "
            try:
                with engine_of(name, model, overrides, retrieval, sample, batch, gates) as (engine, checked):
                    batch_s = min(milliseconds(engine, sample[:batch]) for _ in range(2)) / 1e3
                    count = int(min(max(SECONDS / batch_s, 2), len(sample) // batch)) * batch
                    flying = {"max_batch": batch, "in_flight": args.in_flight if name == "hstu" else 1}
                    offline, _ = drive(OfflineConfig("offline", queries=count, **flying), engine, sample)
                    enough = stats.SAMPLES_NEEDED[99.0]
                    patient = enough / (offline / 2) <= P99_SECONDS
                    count = enough if patient else int(max(2 * SECONDS * offline / 2, 16))
                    server = ServerConfig("server", queries=count, target_qps=offline / 2, **flying)
                    rate, found = drive(server, engine, more)
                p = {n: figure(found.metrics.get(f"latency_ms/p{n}")) for n in (50, 90, 99)}
                gate = f"{checked.error:.2g} of {checked.tolerance:.2g} | {checked.overlap:.2f}"
                print(f"{told}| {offline:.1f} | {rate:.1f} | {p[50]} | {p[90]} | {p[99]} | {gate} |", flush=True)
            except Exception as e:  # whatever it is, the other rows are wanted
                print(f"{told}| {type(e).__name__}: {' '.join(str(e).split())[:160]} | | | | | | |", flush=True)


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
            with engine_of(name, args.model, overrides, retrieval, rounds[0], max(args.batch), {}) as (engine, _):
                for batch in args.batch:
                    engine.generate(rounds[0][:batch])  # shapes seen once
                    engine.reset_cache()
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
            with engine_of(name, args.model, overrides, retrieval, users, 1, {}) as (engine, _):
                first, again, hits = [], {d: [] for d in deltas}, 0.0
                for user in users:
                    visits = {d: request_of(user.request_id, user.history_items[: history + d]) for d in deltas}
                    for delta, visit in visits.items():
                        engine.reset_cache()
                        first.append(milliseconds(engine, [visits[0]]))
                        again[delta].append(milliseconds(engine, [visit]))
                        hits = engine.generate([visit]).details.get("prefix_hit_tokens", 0.0)
                cells = " | ".join(f"{np.median(again[d]):.1f}" for d in deltas)
                told_first = f"| {args.model} | {name} | {LEVELS * history} | {args.beam} | {np.median(first):.1f} "
                print(f"{told_first}| {cells} | {hits:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "wide", "returning"])
    parser.add_argument("--model", default="hstu_0p2b", help="a file of conf/model")
    parser.add_argument("--models", nargs="+", default=["hstu_0p2b"], help="of load")
    parser.add_argument("--engines", nargs="+", default=["vllm"], help="files of conf/engine")
    parser.add_argument("--kernel", default="triton", help="a file of conf/kernel; decoders and engine hf: torch")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--history", type=int, nargs="+", default=[333], help="items; three tokens each")
    parser.add_argument("--delta", type=int, nargs="+", default=[16, 64], help="items that are new at a return")
    parser.add_argument("--beam", type=int, default=256)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 32, 256], help="of load")
    parser.add_argument("--graphs", action="store_true", help="of load: CUDA graphs where an engine has them")
    parser.add_argument("--graph-tokens", default="[]", help="of load: steps that vLLM captures; default: the engine's")
    parser.add_argument("--in-flight", type=int, default=1, help="of load: engine hstu's scenario.in_flight")
    parser.add_argument("--hf-rows", type=int, default=16_384, help="of load: more items x beams go one by one in hf")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--set", nargs="*", default=[], help="further overrides, as for python -m grbench")
    args = parser.parse_args()
    {"load": load, "wide": wide, "returning": returning}[args.what](args)


if __name__ == "__main__":
    main()
