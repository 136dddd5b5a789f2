"""Latency of one request on one GPU and on two that share the heads, by length of the history, without a cache and hit.

    python experiments/tensor_parallel.py
    python experiments/tensor_parallel.py --predict              # what is expected, without a GPU
    python experiments/tensor_parallel.py model=hstu_tiny --histories 64 --candidates 8 --rounds 3

Engines of one process are timed side by side, interleaved: one GPU and two, each with CUDA graphs and with kernels
launched one by one. On one GPU there are graphs where they pay. Times are wall clock around `rank`. Every case passes
the harness's gate first. A hit has all of the history in pages on the device.

The prediction is printed beside each time. Its device time is the operations of the model over the GPUs at the rate
that the engine reaches, and for two GPUs the bytes of all-reduces over NVLink and a fixed time for each collective. A
case without graphs takes at least the host's time for its launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import common
import torch

from grbench.config.schema import RunSpec
from grbench.gate.rank import RankGate
from grbench.tools.sizing import flops, kv_bytes
from grengines.api import Request
from grengines.models.hstu.config import HSTUConfig

DEFAULTS = ["workload=synthetic", "engine=hstu"]
LARGE = ["model.name=large", "model.layers=16", "model.heads=8", "model.qk_dim=128", "model.v_dim=128"]
MODELS = (["model=dlrm_v3"], ["model=wide_heads"], ["model=hstu_0p2b"], ["model=wide_heads", *LARGE])
# What the predictions take. The first is what the engine reaches in requests of 8790 tokens on an H200, the last two
# are what a batch with one short request takes on an H100, by layers (docs/SCALING.md has the records).
FLOPS_S = 550e12
LINK_BYTES_S = 300e9  # of an all-reduce over NVLink
COLLECTIVE_S = 10e-6
LAUNCHES_S, MORE_LAUNCHES_S = 0.23e-3, 0.08e-3  # of a layer on the host, and more with collectives
COLLECTIVES = 2  # of a layer


class Case(NamedTuple):
    """An engine, and whether the request's history is in its cache."""

    gpus: int
    graphs: bool
    hit: bool

    @property
    def name(self) -> str:
        where = "two GPUs" if self.gpus > 1 else "one GPU"
        return f"{where}{'' if self.graphs else ', no graphs'}, {'hit' if self.hit else 'no cache'}"

    @property
    def overrides(self) -> list[str]:
        here = torch.cuda.is_available() and self.graphs
        graphs = "false" if not here else "true" if self.gpus > 1 else "auto"
        return [f"engine.tensor_parallel={self.gpus}", f"engine.cuda_graphs={graphs}"]


CASES = [Case(gpus, graphs, hit) for hit in (False, True) for gpus in (1, 2) for graphs in (True, False)]


def cases_of(args: Any) -> list[Case]:
    """The cases that the command asks for."""
    return [case for case in CASES if case.graphs or not args.graphs]


def predicted_ms(model: HSTUConfig, history: int, candidates: int, case: Case) -> tuple[float, float]:
    """Milliseconds of the device, and of the host's launches where they are not in a graph."""
    cached = history if case.hit else 0
    rows = history + candidates - cached
    device_s = flops(model, history, candidates, cached) / case.gpus / FLOPS_S
    host_s = 0.0 if case.graphs else model.layers * (LAUNCHES_S + MORE_LAUNCHES_S * (case.gpus > 1))
    if case.gpus > 1:
        summed = ((model.layers - 1) * rows + candidates) * model.embedding_dim * 2
        device_s += summed / LINK_BYTES_S + model.layers * COLLECTIVES * COLLECTIVE_S
    return device_s * 1e3, host_s * 1e3


def facts_of(spec: RunSpec, history: int, candidates: int, case: Case) -> dict[str, Any]:
    """The columns of a row that are known before it is measured."""
    device_ms, host_ms = predicted_ms(spec.ranking_model, history, candidates, case)
    return {
        "model": spec.model.name,
        "history": history,
        "candidates": candidates,
        "case": case.name,
        "predicted_device_ms": device_ms,
        "predicted_host_ms": host_ms,
        "predicted_ms": max(device_ms, host_ms),
    }


def measure(
    rows: common.Rows, spec: RunSpec, parse: Callable[[list[str]], RunSpec], pool: Sequence[Request], args: Any
) -> None:
    """Check and time every case of one model and one length."""
    history = len(pool[0].history_items)
    state = len(pool) * kv_bytes(spec.model, history, "fp32") / 1e9
    cache = ["cache=lru", f"cache.memory_gb={3 * state}", "cache.admit_visit=1"]
    engines: dict[str, Any] = {}
    cases = cases_of(args)
    try:
        for case in cases:
            its = parse([*case.overrides, *(cache if case.hit else ["cache=none"])])
            engines[case.name] = common.engine_of(its, pool, len(pool))
        actual = engines[cases[0].name].actual()
        gate = RankGate(spec, common.CATALOGUE, pool, actual["device"], actual["precision"])
        errors: dict[str, float] = {}
        for case in cases:
            engine = engines[case.name]
            for _ in range(1 + case.hit):  # the second time from pages
                errors[case.name] = gate.check(engine, len(pool)).error
        calls = common.interleaved(
            {name: partial(engine.rank, pool[:1]) for name, engine in engines.items()}, args.rounds
        )
    except Exception as e:
        rows.fail(e, model=spec.model.name, history=history)
        return
    finally:
        for engine in engines.values():
            engine.close()
    for case in cases:
        times, first = (common.latency(calls[each.name]) for each in (case, Case(1, True, case.hit)))
        rows.add(
            **facts_of(spec, history, args.candidates, case),
            p50_ms=times["p50_ms"],
            compute_ms=sorted(call.result.compute_ms for call in calls[case.name])[args.rounds // 2],
            times_as_fast=first["p50_ms"] / times["p50_ms"],
            error=errors[case.name],
            allowed=gate.tolerance,
            samples_ms=[call.ms for call in calls[case.name]],
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", rounds=40)
    parser.add_argument("--histories", type=int, nargs="+", default=[1024, 4096, 16384], metavar="EVENTS")
    parser.add_argument("--candidates", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--graphs", action="store_true", help="leave out the cases without CUDA graphs")
    parser.add_argument("--predict", action="store_true", help="print the predictions alone")
    args = parser.parse_args(arguments)
    models = [[]] if any(word.startswith("model=") for word in args.overrides) else MODELS
    rows = common.Rows(args, __file__, arguments)
    for model in models:

        def parse(more: list[str], model: list[str] = model) -> RunSpec:
            return common.specs_of(parser, [*DEFAULTS, *model], [*args.overrides, *more], multirun=False)[0]

        spec = parse([])
        for history in args.histories:
            if args.predict:
                for case in cases_of(args):
                    rows.add(**facts_of(spec, history, args.candidates, case))
                continue
            measure(rows, spec, parse, common.requests_of(2, history, args.candidates), args)  # two for the gate
    rows.close()


if __name__ == "__main__":
    common.run(main)
