"""Measure the latency that the server's front end adds to its engine.

    grbench serve engine=hstu model=hstu_tiny workload=synthetic       # in another shell
    python experiments/front_end.py --url http://127.0.0.1:8000 --rate 100 --seconds 20

Calls of one user with 100 events and 32 candidates are sent at fixed times over one connection, as JSON and as binary
tensors in turn. Of each the program takes the round trip, less the server's own report of waiting and of the engine.
What is left is the network on this machine, the parsing, the choice, the event loop, and the client.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import common
import numpy as np

from grengines.api import Request
from grengines.remote.client import Client, tensors_of

PARTS = ("queue_ms", "pack_ms", "compute_ms")


def request(events: int = 100, candidates: int = 32) -> Request:
    """Return a request with random items."""
    rng = np.random.default_rng(0)
    history, weights = rng.integers(0, 1000, events), rng.random(events).astype(np.float32)
    times = np.arange(events) * 60
    wanted = rng.integers(0, 1000, candidates)
    return Request(0, 1, history, np.ones(events, np.int64), weights, times, 0, wanted, events * 60, 0.0, 0.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Send both forms in turn, and print the percentiles of what the front end adds."""
    parser = common.parser(__doc__ or "", overrides=False)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=100, help="calls per second (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="how long to call (default: %(default)s)")
    args = parser.parse_args(arguments)
    rows = common.Rows(args, __file__, arguments)
    url, rate, seconds = args.url, args.rate, args.seconds
    client, one = Client(url), request()
    client.wait_until_ready(60)
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
    kinds = {"f": "FP32", "i": "INT64"}
    inputs = [
        {"name": n, "shape": list(t.shape), "datatype": kinds[t.dtype.kind], "data": t.tolist()}
        for n, t in tensors_of([one], rank=True).items()
    ]
    body = json.dumps({"inputs": inputs, "parameters": {"deadline_ms": 30_000}})

    def as_json() -> dict[str, float]:
        connection.request("POST", f"/v2/models/{client.model}/infer", body)
        found: dict[str, float] = json.loads(connection.getresponse().read())["parameters"]
        return found

    forms = {"json": as_json, "binary": lambda: client.rank([one], 30_000).parameters}
    added: dict[str, list[float]] = {name: [] for name in forms}
    for call in forms.values():
        call()
    begun = time.perf_counter()
    for i in range(int(rate * seconds)):
        name = list(forms)[i % 2]
        time.sleep(max(begun + i / rate - time.perf_counter(), 0.0))
        sent = time.perf_counter()
        reported = forms[name]()
        added[name].append((time.perf_counter() - sent) * 1e3 - sum(reported[part] for part in PARTS))
    for name, values in added.items():
        p50, p99 = np.percentile(values, [50, 99])
        rows.add(form=name, calls=len(values), p50_ms=float(p50), p99_ms=float(p99))
    rows.close()


if __name__ == "__main__":
    main()
