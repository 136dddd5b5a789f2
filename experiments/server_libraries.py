"""Measure what server libraries take for a call of the Open Inference Protocol, without an engine behind them.

    for name in kserve mlserver; do python -m venv /tmp/$name && /tmp/$name/bin/pip install $name; done
    python experiments/server_libraries.py kserve=/tmp/kserve/bin/python mlserver=/tmp/mlserver/bin/python \
        fastapi=/tmp/kserve/bin/python

Each word names a library and a Python that has it. The servers are in `library_servers.py`. `grbench` is the front end
of `grbench serve`, with all its checks of a call; the others check what their library checks.

A call ranks candidates for one user with 100 events, in JSON and with binary tensors, and gets three scores for each of
them. Each server has one connection, and they take turns, so that all have the same neighbours on a shared machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import numpy as np
from front_end import inputs_of, request
from library_servers import MODEL, SERVERS, TASKS
from proxies import WARM_UP, free_ports, http_caller, started

from grengines.api import UnavailableError
from grengines.remote.client import body_of, tensors_of

HERE = Path(__file__).parent
NO_BINARY = "mlserver"  # it has binary tensors by gRPC only


def checked(call: Callable[[], bytes], candidates: int) -> Callable[[], bytes]:
    """Return a call whose answer is b"" if it has the scores of all candidates, and else its beginning."""

    def ask() -> bytes:
        body = call()
        try:
            content, _ = json.JSONDecoder().raw_decode(body.decode("latin-1"))
            is_right = np.prod(content["outputs"][0]["shape"]) == candidates * TASKS
        except (ValueError, KeyError):
            is_right = False
        return b"" if is_right else body[:200]

    return ask


def main(words: Sequence[str] | None = None) -> None:
    """Measure."""
    parser = common.parser(__doc__ or "", rounds=2000, overrides=False)
    parser.add_argument("libraries", nargs="*", metavar="NAME=PYTHON", help=f"of {', '.join(list(SERVERS)[1:])}")
    parser.add_argument("--candidates", type=int, default=2048, help="of a call (default: %(default)s)")
    args = parser.parse_args(words)
    pythons = {"grbench": sys.executable} | dict(word.partition("=")[::2] for word in args.libraries)
    if unknown := sorted(set(pythons) - set(SERVERS)):
        parser.error(f"{unknown[0]}: allowed are {', '.join(SERVERS)}")
    rows = common.Rows(args, __file__, words)
    tensors = tensors_of([request(candidates=args.candidates)], rank=True)
    forms = {
        "JSON": (json.dumps({"inputs": inputs_of(tensors)}).encode(), {"content-type": "application/json"}),
        "binary": body_of(tensors, {"binary_data_output": True}),
    }
    cases: dict[str, Callable[[], bytes]] = {}
    with contextlib.ExitStack() as running:
        for (name, python), port in zip(pythons.items(), free_ports(len(pythons)), strict=True):
            command = [python, "-c", f"import library_servers; library_servers.{name}({port})"]
            server = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            running.callback(server.wait)
            running.callback(server.kill)
            for form, (body, headers) in forms.items():
                if (form, name) == ("binary", NO_BINARY):
                    continue
                call = checked(http_caller(port, body, f"/v2/models/{MODEL}/infer", headers), args.candidates)
                try:
                    cases[f"{form} {name}"] = started(f"{name}, {form}", call, b"")
                except UnavailableError as e:
                    rows.fail(e, form=form, library=name)
        common.interleaved(cases, WARM_UP)
        timed = common.interleaved(cases, args.rounds)
    for case, calls in timed.items():
        form, name = case.split()
        p50, p99 = np.percentile([call.ms for call in calls], [50, 99])
        rows.add(form=form, library=name, calls=args.rounds, p50_ms=p50, p99_ms=p99)
    rows.note(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    rows.close()


if __name__ == "__main__":
    common.run(main)
