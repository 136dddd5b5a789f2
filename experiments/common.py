"""The parts that the programs in this folder share: overrides, requests, engines, interleaved timing, results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from grbench.config.arguments import CommandError
from grbench.config.compose import compose_jobs, prepare_hydra
from grbench.config.schema import ConfigError, RunSpec, to_spec
from grbench.execution import results
from grbench.execution.records import one_line
from grbench.execution.worker import classify
from grbench.report.chart import Chart
from grbench.report.markdown import sections
from grbench.report.page import Block
from grbench.report.results import row_cell, rows_blocks
from grengines import registry
from grengines.api import Catalogue, Request, Retrieval, UnavailableError
from grengines.options import URLS, is_url
from grengines.remote.client import Client, ServerError

WAIT_S = 60.0  # for a server
CATALOGUE = Catalogue(num_users=100, num_items=100_000, num_actions=8)


def parser(description: str, rounds: int | None = None, overrides: bool = True) -> argparse.ArgumentParser:
    """A parser with --out and, if the program has a use for them, overrides and --rounds with this default."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if overrides:
        made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for grbench, such as model=hstu_tiny")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="write results.json there")
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help="timed calls of each case (default: %(default)s)")
    return made


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call a program's main and exit with its code, or with 2 and one line where this machine lacks what it needs."""
    try:
        sys.exit(main() or 0)
    except (CommandError, UnavailableError, ServerError, ImportError, OSError) as e:
        print(f"{Path(sys.argv[0]).name}: {one_line(e)}", file=sys.stderr)
        sys.exit(2)


def need_gpu(arguments: argparse.ArgumentParser) -> None:
    """Exit with 2 and one line on a machine without a GPU."""
    import torch

    if not torch.cuda.is_available():
        arguments.error("PyTorch finds no GPU, and this program needs one; `python -m grbench doctor` says why")


def server_at(arguments: argparse.ArgumentParser, url: str) -> Client:
    """The client of a server that is ready. Says that it waits. Exits with 2 and one line if there is no server."""
    if not is_url(url):
        arguments.error(f"--url {url}: allowed is {URLS}")
    client = Client(url)
    try:
        client.wait_until_ready(WAIT_S, lambda line: print(line, file=sys.stderr, flush=True))
    except ServerError as e:
        arguments.error(f"--url {e}; start one: python -m grbench serve engine=hstu")
    return client


def specs_of(
    arguments: argparse.ArgumentParser, defaults: Sequence[str], overrides: Sequence[str], multirun: bool = True
) -> list[RunSpec]:
    """The cells that the overrides describe, which may sweep. Exits with 2 and one line for a wrong override."""
    try:
        prepare_hydra()
        return [spec for spec, _ in compose_jobs("config", to_spec, [*defaults, *overrides], multirun)]
    except ConfigError as e:
        arguments.error(str(e))


def requests_of(
    count: int, history: int, candidates: int, *, shortest: float = 1.0, seed: int = 0, catalogue: Catalogue = CATALOGUE
) -> list[Request]:
    """Random requests of different users. The first history has `history` events, the others at least this share."""
    rng, made = np.random.default_rng(seed), []
    for user in range(count):
        events = history if user == 0 else int(rng.integers(int(shortest * history), history + 1))
        made.append(
            Request(
                request_id=user,
                user_id=user,
                history_items=rng.integers(0, catalogue.num_items, events),
                history_actions=rng.integers(1, 2**catalogue.num_actions, events),
                history_weights=rng.random(events, dtype=np.float32),
                history_timestamps=np.cumsum(rng.integers(1, 1000, events)),
                num_seen=0,
                candidates=rng.integers(0, catalogue.num_items, candidates),
                timestamp=events * 1000,
                arrival_s=0.0,
                deadline_ms=80.0,
            )
        )
    return made


def first_events(request: Request, count: int) -> Request:
    """The request with the first `count` events of its history."""
    columns = [name for name in Request.__dataclass_fields__ if name.startswith("history_")]
    return replace(request, **{name: getattr(request, name)[:count] for name in columns})


def engine_of(
    spec: RunSpec,
    sample: Sequence[Request],
    max_batch: int,
    catalogue: Catalogue = CATALOGUE,
    *,
    task: str = "rank",
    retrieval: Retrieval | None = None,
) -> Any:
    """The prepared engine of a cell."""
    engine = registry.build(
        spec.engine, spec.model, spec.kernel, catalogue, spec.seed, spec.cache, task=task, retrieval=retrieval
    )
    engine.prepare(sample, max_batch)
    return engine


class Call(NamedTuple):
    """One timed call: wall-clock milliseconds and the result."""

    ms: float
    result: Any


def timed(call: Callable[[], Any]) -> Call:
    """Call and take the time."""
    begun = time.perf_counter()
    result = call()
    return Call((time.perf_counter() - begun) * 1e3, result)


def interleaved(
    cases: Mapping[str, Callable[[], Any]], rounds: int, before: Mapping[str, Callable[[], object]] | None = None
) -> dict[str, list[Call]]:
    """Time every case once a round, in a new order each round, so that all see the same clocks.

    before: brings a case into its state, untimed, ahead of each of its calls.
    """
    calls: dict[str, list[Call]] = {name: [] for name in cases}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for name in order.permutation(list(cases)):
            if before and name in before:
                before[name]()
            calls[name].append(timed(cases[name]))
    return calls


def latency(calls: Sequence[Call]) -> dict[str, float]:
    """The median and the least of calls, in milliseconds."""
    ms = [call.ms for call in calls]
    return {"p50_ms": float(np.median(ms)), "least_ms": min(ms)}


class Rows:
    """The rows of a program: printed as a table at the end and, with --out, written after every row."""

    def __init__(self, args: argparse.Namespace, program: str, words: Sequence[str] | None) -> None:
        words = sys.argv[1:] if words is None else words
        self._out: Path | None = args.out
        self._facts = results.origin(["python", f"experiments/{Path(program).name}", *words])
        self._rows: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._charts: list[Chart] = []

    @property
    def command(self) -> str:
        """The command line of the program."""
        return str(self._facts["command"])

    def add(self, **row: Any) -> None:
        """Take one row of scalars; a list, such as samples, is written and not printed."""
        self._rows.append(row)
        shown = (f"{key}={row_cell(value)}" for key, value in row.items() if not isinstance(value, list))
        print("  ".join(shown), file=sys.stderr, flush=True)
        self._save()

    def note(self, text: str) -> None:
        """Take a line that readers of the table need."""
        self._notes.append(text)
        self._save()

    def draw(self, chart: Chart) -> None:
        """Take a chart of the rows: `grbench reports` draws it."""
        self._charts.append(chart)
        self._save()

    def blocks(self) -> list[Block]:
        """Return the table, the notes, and the reasons of rows without a result."""
        return rows_blocks(self._rows, self._notes)

    def _save(self) -> None:
        if self._out:
            charts = {"charts": [chart.to_dict() for chart in self._charts]} if self._charts else {}
            results.save(self._out, {**self._facts, "notes": self._notes, **charts}, self._rows)

    def fail(self, error: Exception, **row: Any) -> None:
        """Take a row without a result and the reason."""
        status, reason = classify(error)
        self.add(**row, status=str(status), reason=one_line(ValueError(reason)))

    def close(self) -> None:
        """Print the table and the reasons of rows without a result."""
        print("\n\n".join(sections(self.blocks())))
        if self._out:
            print(f"\nresults: {self._out / results.RESULTS_FILE}", file=sys.stderr)
