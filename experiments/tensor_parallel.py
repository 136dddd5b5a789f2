"""Latency of one request on one GPU and on two that share the heads, by length of the history, without a cache and hit.

    python experiments/tensor_parallel.py
    python experiments/tensor_parallel.py --predict              # what is expected, without a GPU
    python experiments/tensor_parallel.py model=hstu_tiny --histories 64 --candidates 8 --rounds 3

Engines of one process are timed side by side, interleaved: one GPU and two, each with CUDA graphs and with kernels
launched one by one. On one GPU there are graphs where they pay. Times are wall clock around `rank`. Every case passes
the harness's gate first. A hit has all of the history in pages on the device.

The prediction is printed beside each time, from constants that a run on two H200s gave. Its device time is the
operations of the model over the GPUs, and for two GPUs the bytes of all-reduces and a fixed time for each collective.
To it comes the host's time outside of the device's. A case without graphs takes at least the host's time for its
launches. The run can be read in two ways: `predicted_ms` has short collectives over a slow link, and
`predicted_fast_link_ms` longer ones over a fast link. `--predict` adds the decoder of study=gpu_tensor_parallel, whose
launches and time outside the device are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import common
import torch

from grbench import workloads
from grbench.config.schema import RunSpec
from grbench.gate.rank import RankGate
from grbench.tools.sizing import flops, kv_bytes, prompt_tokens, search_flops
from grengines.api import Request
from grengines.models.decoder.config import DecoderConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.semantic.ids import propose_codes
from grengines.vllm.config import VLLMEngineConfig
from grengines.vllm.engine import LONGEST_STEP

DEFAULTS = ["workload=synthetic", "engine=hstu"]
LARGE = ["model.name=large", "model.layers=16", "model.heads=8", "model.qk_dim=128", "model.v_dim=128"]
MODELS = (["model=dlrm_v3"], ["model=wide_heads"], ["model=hstu_0p2b"], ["model=wide_heads", *LARGE])
# What the predictions take, for H200s, from docs/PERFORMANCE.md#a-hit-in-the-kv-cache and, of commit 20be85d,
# docs/SCALING.md#one-request-on-two-gpus, both with `wide_heads` and batches of one.
FLOPS_S = 480e12  # 4096 events take the device 1.57 ms, and 16,384 events 11.8 ms
LAYER_S = 50e-6  # the least of a layer on the device: hits take 0.39 ms and more for 8 layers
OUTSIDE_S = {1: 0.33e-3, 2: 0.71e-3}  # 1.90 and 2.73 ms by the clock, 1.57 and 2.02 ms on the device
LAUNCHES_S = {1: 0.39e-3, 2: 0.95e-3}  # of a layer on the host: 3.1 and 7.6 ms without graphs
# Seconds of a collective, bytes/s of an all-reduce. The first two meet 2.73 ms and the hit's 1.61 ms. The second two
# meet 2.73 ms only: they assume a faster link, because messages of long histories are larger.
COLLECTIVE, FAST_LINK = (28e-6, 80e9), (64e-6, 300e9)
# Of a decoder in vLLM (docs/PERFORMANCE.md#decoders): 8 prompts of 999 tokens take 74.5 ms, and 35.3 ms if cached.
DECODER_FLOPS_S = 597e12
DECODER = ["study=gpu_tensor_parallel", "workload.max_history=16384"]
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


def predicted_ms(model: HSTUConfig, history: int, candidates: int, case: Case) -> tuple[float, float, float]:
    """Milliseconds of the device, of the request, and of the request over a fast link."""
    cached = history if case.hit else 0
    rows = history + candidates - cached
    compute_s = max(flops(model, history, candidates, cached) / case.gpus / FLOPS_S, model.layers * LAYER_S)
    host_s = 0.0 if case.graphs else model.layers * LAUNCHES_S[case.gpus]
    summed = ((model.layers - 1) * rows + candidates) * model.embedding_dim * 2
    device_s, fast_s = (
        compute_s + (case.gpus > 1) * (model.layers * COLLECTIVES * each_s + summed / bytes_s)
        for each_s, bytes_s in (COLLECTIVE, FAST_LINK)
    )
    outside_s = OUTSIDE_S[case.gpus]
    return device_s * 1e3, max(device_s + outside_s, host_s) * 1e3, max(fast_s + outside_s, host_s) * 1e3


def facts_of(spec: RunSpec, history: int, candidates: int, case: Case) -> dict[str, Any]:
    """The columns of a row that are known before it is measured."""
    device_ms, ms, fast_ms = predicted_ms(spec.ranking_model, history, candidates, case)
    return {
        "model": spec.model.name,
        "history": history,
        "candidates": candidates,
        "case": case.name,
        "predicted_device_ms": device_ms,
        "predicted_ms": ms,
        "predicted_fast_link_ms": fast_ms,
    }


def facts_of_search(spec: RunSpec) -> dict[str, Any]:
    """The same of a decoder's search, whose layers have two all-reduces of all rows."""
    model, asked, engine = spec.model, spec.retrieval, spec.engine
    assert isinstance(model, DecoderConfig) and isinstance(engine, VLLMEngineConfig) and asked is not None
    history, gpus = spec.workload.max_history, engine.tensor_parallel
    sizes = [asked.codes or propose_codes(workloads.catalogue(spec.workload).num_items, asked.levels)] * asked.levels
    prompt, beams = prompt_tokens(model, history, asked.levels), (asked.levels - 1) * asked.beam_width
    compute_s = search_flops(model, history, sizes, asked.beam_width) / gpus / DECODER_FLOPS_S
    steps = -(-prompt // LONGEST_STEP) + asked.levels - 1
    summed = model.layers * COLLECTIVES * (prompt + beams) * model.embedding_dim * 2
    ms, fast_ms = (
        1e3 * (compute_s + (gpus > 1) * (steps * model.layers * COLLECTIVES * each_s + summed / bytes_s))
        for each_s, bytes_s in (COLLECTIVE, FAST_LINK)
    )
    return {
        "model": model.name,
        "history": history,
        "case": "two GPUs, no cache" if gpus > 1 else "one GPU, no cache",
        "predicted_device_ms": ms,
        "predicted_ms": ms,
        "predicted_fast_link_ms": fast_ms,
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
    if args.predict and models == MODELS:
        for spec in common.specs_of(parser, DECODER, args.overrides):
            rows.add(**facts_of_search(spec))
    rows.close()


if __name__ == "__main__":
    common.run(main)
