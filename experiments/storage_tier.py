"""Latency of a hit in the KV cache by the tier that has the user's state, at several lengths of history.

    python experiments/storage_tier.py
    python experiments/storage_tier.py cache.precision=int8
    TMPDIR=/mnt/nvme python experiments/storage_tier.py model=hstu_tiny --histories 2048 --candidates 32

Requests of returning users are ranked by one engine, interleaved: computed again, found on the device, on the host, and
on the disk below TMPDIR, from which the whole state is loaded. Times are wall clock around `rank`. The prediction is
made before the case is timed: the bytes of the states, divided by the bandwidth to the device or of the disk that the
engine measured when it started. `loaded_ms` is what came of it: the time of the copies, and from the begin of the reads
to their end. Every case passes the harness's gate first, in the very state in which it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import numpy as np

from grbench.config.schema import RunSpec
from grbench.gate.rank import RankGate, stored_precision
from grbench.tools.sizing import kv_bytes
from grengines.api import Tier
from grengines.cache.config import stored

DEFAULTS = ["workload=synthetic", "model=wide_heads", "engine=hstu", "cache=lru", "cache.onload_share=1"]
DEVICE, HOST, DISK = "on the device", "on the host", "on the disk"


def measure(rows: common.Rows, parse: Callable[[list[str]], RunSpec], history: int, args: Any) -> None:
    """Check and time every case at one length of history."""
    pool = common.requests_of(max(args.batch, 2), history, args.candidates)  # the gate needs two requests
    users = pool[: args.batch]
    none = common.engine_of(parse(["cache=none"]), pool, len(pool))
    precision, device = none.actual()["precision"], none.actual()["device"]
    none.close()
    spec = parse(["cache.host_gb=1"])
    states_gb = len(pool) * kv_bytes(spec.model, history, stored(spec.cache) or precision) / 1e9
    sizes = {"memory_gb": 3 * states_gb, "host_gb": 2 * states_gb, "storage_gb": 3 * states_gb}
    spec = parse([f"cache.{name}={size}" for name, size in sizes.items()])
    engine = common.engine_of(spec, pool, len(pool))
    actual = engine.actual()
    gate = RankGate(spec, common.CATALOGUE, pool, device, precision, stored=stored_precision(actual))

    def stored_in(tier: Tier) -> None:
        engine.rank(pool)
        if tier is not Tier.DEVICE:
            engine.reset_cache(keep=tier)

    before: dict[str, Callable[[], object]] = {
        "computed again": engine.reset_cache,
        DEVICE: partial(stored_in, Tier.DEVICE),
        HOST: partial(stored_in, Tier.HOST),
        DISK: partial(stored_in, Tier.STORAGE),
    }
    loaded_gb = states_gb * len(users) / len(pool)
    bandwidths = {HOST: actual["cache_copy_gb_s"], DISK: actual["cache_storage_gb_s"]}
    predicted = {name: 1e3 * loaded_gb / bandwidth for name, bandwidth in bandwidths.items()}
    errors = {}
    for name, bring in before.items():
        bring()
        errors[name] = gate.check(engine, len(pool)).error
    calls = common.interleaved({name: partial(engine.rank, users) for name in before}, args.rounds, before)
    times = {name: common.latency(calls[name])["p50_ms"] for name in before}
    for name in before:
        key = {HOST: "cache_host_copy_ms", DISK: "cache_storage_read_ms"}.get(name, "")
        loaded = [call.result.details[key] for call in calls[name]] if key else []
        found = [
            sum(part) for part in zip(*([c.tokens, c.from_storage] for c in calls[name][0].result.cached), strict=True)
        ]
        loaded_ms = float(np.median(loaded)) if loaded else None
        rows.add(
            model=spec.model.name,
            batch=args.batch,
            history=history,
            candidates=args.candidates,
            state=name,
            pages=actual["cache_precision"],
            states_mb=1e3 * loaded_gb,
            cached_tokens=found[0],
            from_disk=found[1],
            p50_ms=times[name],
            predicted_ms=predicted.get(name),
            loaded_ms=loaded_ms,
            loaded_gb_per_s=1e3 * loaded_gb / loaded_ms if loaded_ms else None,
            error=errors[name],
            allowed=gate.tolerance,
            samples_ms=[call.ms for call in calls[name]],
        )
    rows.note(
        f"History {history}: the disk is {actual['cache_storage_disk']} and reads {bandwidths[DISK]:.2f} GB/s, "
        f"{'past' if actual['cache_storage_direct'] else 'through'} the page cache; copies to the device reach "
        f"{bandwidths[HOST]:.1f} GB/s."
    )
    engine.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", rounds=20)
    parser.add_argument("--histories", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="events")
    parser.add_argument("--candidates", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="requests of a batch (default: %(default)s)")
    args = parser.parse_args(arguments)

    def parse(more: list[str]) -> RunSpec:
        defaults, own = DEFAULTS, args.overrides
        if "cache=none" in more:
            defaults, own = DEFAULTS[:3], [word for word in own if not word.startswith("cache.")]
        return common.specs_of(parser, defaults, [*own, *more], multirun=False)[0]

    rows = common.Rows(args, __file__, arguments)
    for history in args.histories:
        measure(rows, parse, history, args)
    rows.close()


if __name__ == "__main__":
    common.run(main)
