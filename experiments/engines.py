"""Ranking engines side by side: latency of the same batches in one process, interleaved, after the gate.

    python experiments/engines.py model=dlrm_v3,wide_heads
    python experiments/engines.py model=hstu_tiny engine.cpu_threads=1 --histories 128 512 --batches 1 8
    python experiments/engines.py --case "engine=hstu kernel=triton" --case "engine=aoti kernel=triton"

A case is a set of overrides; the defaults are those of a CPU or of an NVIDIA GPU. Each engine is built once, for the
largest batch. Times are wall clock around `rank`: packing, copies, computation, scores on the host. Before an engine is
timed at a shape, it passes the harness's gate there. Speed is compared by the least time. An engine that cannot be
built, or that fails the gate, is a row with the reason. --rounds 0 builds and checks only, which fills the caches of
packages and exports.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import common
import torch

from grbench.config.schema import RunSpec
from grbench.gate.base import GateResult
from grbench.gate.rank import RankGate
from grengines.api import Request

CPU = [
    "engine=hstu kernel=torch engine.precision=fp32",
    "engine=hstu kernel=torch engine.precision=bf16",
    "engine=aoti kernel=torch engine.precision=fp32",
    "engine=onnxruntime engine.precision=fp32",
    "engine=onnxruntime engine.precision=fp16",
    "engine=onnxruntime engine.precision=int8",
]
GPU = [
    "engine=hstu kernel=triton",
    "engine=hstu kernel=triton engine.cuda_graphs=true",
    "engine=hstu kernel=cutlass",
    "engine=hstu kernel=cutlass engine.cuda_graphs=true",
    "engine=aoti kernel=triton",
    "engine=aoti kernel=triton engine.cuda_graphs=true",
    "engine=onnxruntime engine.precision=fp16",
]
DEFAULTS = ["workload=synthetic"]
Shape = tuple[int, int, int]  # requests of a batch, events of the longest history, candidates


def tokens(request: Request) -> int:
    return len(request.history_items) + len(request.candidates)


def build(
    rows: common.Rows, specs: dict[str, RunSpec], sample: Sequence[Request], max_batch: int
) -> dict[str, tuple[Any, float]]:
    """The prepared engine of each case and the seconds until it was ready; a row for each that cannot be built."""
    engines = {}
    for case, spec in specs.items():
        begun = time.perf_counter()
        try:
            engine = common.engine_of(spec, sample, max_batch)
        except Exception as e:  # other engines are compared all the same
            rows.fail(e, model=spec.model.name, case=case)
            continue
        engines[case] = engine, time.perf_counter() - begun
    return engines


def check(engine: Any, spec: RunSpec, pool: Sequence[Request], batch: int, gates: dict[str, RankGate]) -> GateResult:
    """Pass the gate on the pool, then warm up. gates: of this pool, by precision. Raises what the engine raises."""
    actual = engine.actual()
    precision = actual["precision"]
    if precision not in gates:
        gates[precision] = RankGate(spec, common.CATALOGUE, pool, actual["device"], precision)
    found = gates[precision].check(engine, batch)
    for _ in range(2):
        engine.rank(pool[:batch])
    return found


def compare(
    rows: common.Rows, specs: dict[str, RunSpec], shapes: Sequence[Shape], shortest: float, rounds: int
) -> None:
    """Build an engine for each case, then check and time all of them at each shape. shortest: as `requests_of`."""
    # The gate needs two requests even where a batch has one.
    pools = {(b, h, c): common.requests_of(max(b, 2), h, c, shortest=shortest) for b, h, c in shapes}
    sample = sorted((request for pool in pools.values() for request in pool), key=tokens)
    engines = build(rows, specs, sample, max(batch for batch, _, _ in shapes))
    for (batch, history, candidates), pool in pools.items():
        gates: dict[str, RankGate] = {}
        ready: dict[str, tuple[dict[str, Any], GateResult]] = {}
        for case, (engine, start_s) in engines.items():
            row = {"model": specs[case].model.name, "batch": batch, "history": history, "candidates": candidates}
            row |= {"case": case, "start_s": start_s}
            try:
                ready[case] = row, check(engine, specs[case], pool, batch, gates)
            except Exception as e:
                rows.fail(e, **row)
        calls = common.interleaved({case: partial(engines[case][0].rank, pool[:batch]) for case in ready}, rounds)
        first = next(iter(ready), "")
        for case, (row, gate) in ready.items():
            if rounds:
                row |= common.latency(calls[case])
                row["requests_per_s"] = 1e3 * batch / row["p50_ms"]
                row["times_as_fast"] = common.latency(calls[first])["least_ms"] / row["least_ms"]
            rows.add(**row, error=gate.error, allowed=gate.tolerance, samples_ms=[call.ms for call in calls[case]])
    for engine, _ in engines.values():
        engine.close()


def main(arguments: Sequence[str] | None = None) -> None:
    gpu = torch.cuda.is_available()
    parser = common.parser(__doc__ or "", rounds=20)
    parser.add_argument("--case", action="append", metavar="OVERRIDES", help="an engine, by its overrides; repeat it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--histories", type=int, nargs="+", default=[1024, 4096] if gpu else [128, 512, 1024])
    parser.add_argument("--candidates", type=int, nargs="+", default=[256, 2048] if gpu else [32])
    least = "share of the longest history that the others have at least (default: %(default)s)"
    parser.add_argument("--shortest", type=float, default=1.0, help=least)
    args = parser.parse_args(arguments)
    shapes = list(itertools.product(args.batches, args.histories, args.candidates))
    lengths = sorted({history + candidates for _, history, candidates in shapes})
    specs: dict[str, list[RunSpec]] = {}
    for case in args.case or (GPU if gpu else CPU):
        words = case.split()
        if "engine.cuda_graphs=true" in words:
            words.append(f"engine.graph_lengths={lengths}")
        specs[case] = common.specs_of(parser, DEFAULTS, [*words, *args.overrides])
    rows = common.Rows(args, __file__, arguments)
    for combination in zip(*specs.values(), strict=True):  # one for each model that the overrides sweep over
        compare(rows, dict(zip(specs, combination, strict=True)), shapes, args.shortest, args.rounds)
    rows.close()


if __name__ == "__main__":
    common.run(main)
