"""Latency of a hit in the KV cache of the native engine, by where the user's state is.

    python experiments/user_cache.py
    python experiments/user_cache.py model=hstu_tiny --history 256 --candidates 32
    python experiments/user_cache.py cache.precision=int8     # states in 8 bits
    python experiments/user_cache.py --kernels 8              # also where the device's time goes, by kernel

Requests of returning users are ranked by engines side by side in one process, interleaved: without a cache, with all or
most of the history in pages on the device, with all of it on the host, and with an empty cache (the cost of storing).
From the host, states are loaded layer by layer, or all of them before the first layer, or before the requests come.
Times are wall clock around `rank`: packing, copies, computation, scores on the host. Every case passes the harness's
gate first, in the very state in which it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import common
import numpy as np
import torch

from grbench.config.schema import RunSpec
from grbench.gate.rank import RankGate, has_fp8_attention, stored_precision
from grbench.tools.sizing import kv_bytes
from grengines.api import Request, Tier
from grengines.cache.config import stored

DEFAULTS = ["workload=synthetic", "model=wide_heads", "engine=hstu"]
NEW = 128  # events since the last visit


class Case(NamedTuple):
    engine: str
    before: Callable[[], object]  # brings the engine into the state that the requests find
    prefetches: bool = False  # the states are asked for when the requests come, and their copies are part of the time


def engines_of(parse: Callable[[list[str]], RunSpec], users: Sequence[Request]) -> dict[str, Any]:
    """The engine without a cache and three with one. parse: a cell with further overrides."""
    history = len(users[0].history_items)
    none = common.engine_of(parse(["cache=none"]), users, len(users))
    spec = parse(["cache=lru"])
    state = len(users) * kv_bytes(spec.model, history, stored(spec.cache) or none.actual()["precision"]) / 1e9
    host = f"cache.host_gb={2 * state}"
    overrides = {
        "device": ["cache=lru", f"cache.memory_gb={3 * state}"],
        "part": ["cache=lru", f"cache.memory_gb={3 * state}", host],
        "whole": ["cache=lru", f"cache.memory_gb={20 * state}", host, "cache.onload_share=1"],
    }
    others = {name: common.engine_of(parse(more), users, len(users)) for name, more in overrides.items()}
    return {"none": none, **others}


def cases_of(engines: dict[str, Any], users: Sequence[Request]) -> dict[str, Case]:
    """The cases by name."""
    history = len(users[0].history_items)
    new = min(NEW, history // 2)
    earlier = [common.first_events(user, history - new) for user in users]
    device, part, whole = (engines[name] for name in ("device", "part", "whole"))

    def on_host(engine: Any) -> None:
        engine.rank(users)
        engine.reset_cache(keep=Tier.HOST)

    def prefetched() -> None:
        on_host(whole)
        whole.prefetch(user.user_id for user in users)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are done before the requests come

    return {
        "no cache": Case("none", lambda: None),
        "nothing cached": Case("device", device.reset_cache),
        f"{history - new} of {history} on the device": Case("device", lambda: device.rank(earlier)),
        f"{history} of {history} on the device": Case("device", lambda: device.rank(users)),
        "on the host, all copied before the first layer": Case("whole", lambda: on_host(whole), True),
        "on the host, all loaded layer by layer": Case("whole", lambda: on_host(whole)),
        "on the host, part loaded, the rest computed meanwhile": Case("part", lambda: on_host(part)),
        "on the host, prefetched": Case("whole", prefetched),
    }


def measure(rows: common.Rows, spec: RunSpec, parse: Callable[[list[str]], RunSpec], batch: int, args: Any) -> None:
    """Check and time every case with one batch size."""
    pool = common.requests_of(max(batch, 2), args.history, args.candidates)  # the gate needs two requests
    engines = engines_of(parse, pool)
    gates = {}
    for stored_as in {stored_precision(engine.actual()) for engine in engines.values()}:
        actual = engines["none"].actual()
        gates[stored_as] = RankGate(
            *(spec, common.CATALOGUE, pool, actual["device"], actual["precision"]),
            stored=stored_as,
            fp8_attention=has_fp8_attention(actual),
        )
    gate_of = {name: gates[stored_precision(engine.actual())] for name, engine in engines.items()}
    cases, users = cases_of(engines, pool), pool[:batch]

    def rank(case: Case) -> Any:
        if case.prefetches:
            engines[case.engine].prefetch(user.user_id for user in users)
        return engines[case.engine].rank(users)

    errors = {}
    for name, case in cases.items():
        case.before()
        if case.prefetches:
            engines[case.engine].prefetch(user.user_id for user in pool)
        errors[name] = gate_of[case.engine].check(engines[case.engine], len(pool)).error
    calls = common.interleaved(
        {name: partial(rank, case) for name, case in cases.items()},
        args.rounds,
        {name: case.before for name, case in cases.items()},
    )
    first = next(iter(cases))
    for name, case in cases.items():
        details = [call.result.details | {"compute_ms": call.result.compute_ms} for call in calls[name]]

        def median(key: str, details: list[dict[str, float]] = details) -> float:
            return float(np.median([found[key] for found in details if key in found] or [0.0]))

        times = common.latency(calls[name])
        copied_ms, gigabytes = median("cache_host_copy_ms"), median("cache_host_bytes") / 1e9
        rows.add(
            model=spec.model.name,
            batch=batch,
            history=args.history,
            candidates=args.candidates,
            cached=name,
            pages=engines[case.engine].actual().get("cache_precision"),
            p50_ms=times["p50_ms"],
            times_as_fast=common.latency(calls[first])["p50_ms"] / times["p50_ms"],
            compute_ms=median("compute_ms"),
            copied_ms=copied_ms or None,
            waited_ms=median("cache_host_wait_ms") if copied_ms else None,
            copy_gb_per_s=1e3 * gigabytes / copied_ms if copied_ms else None,
            error=errors[name],
            allowed=gate_of[case.engine].tolerance,
            samples_ms=[call.ms for call in calls[name]],
        )
    for name, case in cases.items() if args.kernels else ():
        case.before()
        rows.note(f"Batch {batch}, {name}: {kernels_of(partial(rank, case), args.kernels)}.")
    facts = engines["part"].actual()
    withheld = facts.get("cache_compute_withheld")
    token = f"is not known: {withheld}" if withheld else f"takes {facts['cache_compute_us_a_token']:.3f} us to compute"
    rows.note(
        f"Batch {batch}: copies of page-locked memory reach {facts['cache_copy_gb_s']:.1f} GB/s. "
        f"A token {token}. "
        f"A batch without a graph takes at least {facts['cache_launch_ms']:.2f} ms. "
        f"Attention over pages is {facts['kernels']['hstu_attention']}."
    )
    for engine in engines.values():
        engine.close()


def kernels_of(call: Callable[[], object], most: int) -> str:
    """Return the device's time of one call in words: in all, and of the kernels and copies that take most of it."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        call()
    found = [event for event in profile.key_averages() if event.device_type.name == "CUDA"]
    found.sort(key=lambda event: event.self_device_time_total, reverse=True)
    total, count = sum(event.self_device_time_total for event in found), sum(event.count for event in found)
    largest = (f"{event.self_device_time_total:.0f} us {event.count}x {event.key[:48]}" for event in found[:most])
    return f"{total:.0f} us in {count} kernels and copies: {', '.join(largest)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", rounds=40)
    parser.add_argument("--history", type=int, default=4096, help="events (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="name the N longest kernels of each case")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1])
    args = parser.parse_args(arguments)
    if args.kernels:
        common.need_gpu(parser)

    def parse(more: list[str]) -> RunSpec:
        own = [word for word in args.overrides if "cache=none" not in more or not word.startswith("cache.")]
        return common.specs_of(parser, DEFAULTS, [*own, *more], multirun=False)[0]

    spec = parse(["cache=none"])
    rows = common.Rows(args, __file__, arguments)
    for batch in args.batches:
        measure(rows, spec, parse, batch, args)
    rows.close()


if __name__ == "__main__":
    common.run(main)
