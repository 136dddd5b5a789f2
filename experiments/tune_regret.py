"""Regret of search strategies against evaluations, replayed from a measured grid.

    python -m grbench study=tune_grid
    python experiments/tune_regret.py --grid outputs/studies/tune_grid

The grid is a folder of offline cells, one for each configuration. docs/SEARCHES.md says how a replay draws latencies.
With --out it also writes OUT/regret.html, with a chart of the regrets and one of the best rate of each batch size by
kernel, precision and graphs. OUT/grid/results.json is then the grid itself, with at most 128 batches of each
configuration: it is small enough to be kept, and `--grid OUT/grid` replays from it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import common

from grbench.config.schema import ConfigError
from grbench.execution import records, results
from grbench.execution.records import Status
from grbench.report import html
from grbench.report.cells import flatten, shown
from grbench.report.chart import Chart, Series
from grbench.report.frame import ReportError
from grbench.report.page import Figure
from grbench.report.provenance import Origin
from grbench.tune import limits
from grbench.tune.live import batches_of
from grbench.tune.outcome import Configuration
from grbench.tune.replay import OURS, STRATEGIES, Grid, Measured, Run, replay
from grbench.tune.trial import Batching, Goal
from grengines.runtime import atomic_io

BOUND, WITHIN = 0.05, 0.15  # the target: of the mean regret, after this share of as many cells as the grid has
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
BATCHES = 128  # of a cell that are kept, evenly spaced
PAGE = "regret.html"
KINDS = ("engine", "kernel", "engine.precision", "engine.cuda_graphs")
ORDER = ("engine", "kernel", "engine.precision", "engine.cpu_threads", "engine.cuda_graphs", "cache")

Cell = tuple[Configuration, Measured, Batching]


class Kept(NamedTuple):
    """A grid, and the facts of the results file that it is or may be kept in."""

    grid: Grid
    facts: dict[str, Any]
    file: Path | None = None  # the results file that it is from


def load(folder: Path) -> Kept:
    """Return the grid of the offline cells in a folder, or of a results file there. Raises ReportError.

    Its options are those in which the cells differ. What an engine refused is not in it: a search leaves that out
    before anything runs. All cells must have one commit and one machine.
    """
    if (folder / results.RESULTS_FILE).is_file():
        return load_rows(folder / results.RESULTS_FILE)
    cells = [
        (path, record)
        for path, record in records.find(folder)
        if record.spec["scenario"]["name"] == "offline" and record.status is not Status.UNAVAILABLE
    ]
    if not cells:
        return Kept(Grid({}, {}, {}), {})
    origins = list(dict.fromkeys(str(Origin.of(record.environment)) for _, record in cells))
    if len(origins) > 1:
        raise ReportError(f"{folder}: cells of {' and of '.join(origins)}; measure those of one commit on one machine")
    specs = [flatten(record.spec) for _, record in cells]
    typed = {word.partition("=")[0] for _, record in cells for word in record.overrides}
    keys = [key for key in specs[0] if key in typed and len({shown(spec.get(key)) for spec in specs}) > 1]
    keys.sort(key=lambda key: (ORDER.index(key) if key in ORDER else len(ORDER), key))
    found: list[Cell] = []
    for (path, record), spec in zip(cells, specs, strict=True):
        scenario = record.spec["scenario"]
        batches = batches_of(path) if record.ok else []
        if record.ok and not batches:
            continue
        some = [(size, round(seconds, 7)) for size, seconds in batches[:: math.ceil(len(batches) / BATCHES) or 1]]
        values = tuple((key, shown(spec[key])) for key in keys if key in spec)
        cell = Measured(record.metrics.get("throughput_rps", 0.0), some, str(record.status), error=record.error or "")
        mine = Batching(scenario["max_batch"], scenario["max_wait_ms"] / 1e3, scenario["in_flight"])
        found.append((Configuration(values), cell, mine))
    first = min((record for _, record in cells), key=lambda record: record.started_at)
    studies = dict.fromkeys(word for _, record in cells for word in record.overrides if word.startswith("study="))
    title = ", by ".join(["Requests/s of each configuration", *(f"`python -m grbench {word}`" for word in studies)])
    facts = {"started_at": first.started_at, "environment": first.environment, "title": title}
    return Kept(_grid(keys, found), facts)


def load_rows(file: Path) -> Kept:
    """Return the grid that `save_rows` wrote. Raises ReportError for other results."""
    found: list[Cell] = []
    try:
        data = results.load(file)
        for row in data["rows"]:
            batches = [(int(size), ms / 1e3) for size, its in row["batches"].items() for ms in its]
            cell = Measured(row.get("offline", 0.0), batches, row["status"], error=row.get("reason", ""))
            found.append((Configuration(tuple(row["options"].items())), cell, Batching(*row["batching"])))
    except KeyError as e:
        raise ReportError(f"{file}: no grid, as {e} is missing; tune_regret.py --out OUT writes OUT/grid") from None
    except ValueError as e:
        raise ReportError(str(e)) from None
    keys = dict.fromkeys(key for configuration, _, _ in found for key, _ in configuration.values)
    return Kept(_grid(keys, found), {}, file)


def _grid(keys: Iterable[str], cells: Sequence[Cell]) -> Grid:
    """Return the grid of cells. The values of an option are in the order in which cells have them."""
    values = {key: [value for c, _, _ in cells if (value := c.get(key)) is not None] for key in keys}
    axes = {key: list(dict.fromkeys(its)) for key, its in values.items()}
    return Grid(axes, {c: cell for c, cell, _ in cells}, {c: batching for c, _, batching in cells})


def save_rows(
    kept: Kept, truths: Mapping[Configuration, float], command: str, limit: str, chart: Chart, out: Path
) -> None:
    """Write the grid to results.json: of each configuration its rates, and the milliseconds of its batches by size.

    chart: of the best rates, which the page of the kept grid has too.
    """
    rows = []
    for configuration, cell in kept.grid.cells.items():
        batching, batches = kept.grid.batching[configuration], defaultdict(list)
        for size, seconds in cell.batches:
            batches[str(size)].append(round(1e3 * seconds, 4))
        rates = {"offline": cell.throughput, f"within {limit}": truths[configuration]} if cell.status == "OK" else {}
        rows.append(
            {
                "configuration": configuration.name,
                **rates,
                "status": cell.status,
                **({"reason": cell.error} if cell.error else {}),
                "options": dict(configuration.values),
                "batching": [batching.max_batch, batching.max_wait_s, batching.in_flight],
                "batches": batches,
            }
        )
    results.save(out, {"command": command, **kept.facts, "charts": [chart.to_dict()]}, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Replay every strategy and print a row for each."""
    parser = common.parser(__doc__ or "", overrides=False)
    parser.add_argument(
        "--grid", type=Path, required=True, help="folder of the study's records, or OUT/grid of an earlier run"
    )
    parser.add_argument("--limit", default="latency_ms.p99=80", help="METRIC=LIMIT (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="replays of a strategy (default: %(default)s)")
    parser.add_argument(
        "--most", type=float, default=0.4, help="cells of a replay, as a share of the grid (default: %(default)s)"
    )
    parser.add_argument(
        "--probe-s", type=float, default=4.0, help="seconds of a simulated probe (default: %(default)s)"
    )
    parser.add_argument(
        "--places", type=int, nargs="+", default=[1, 2, 4], help="probes at a time of our search (default: 1 2 4)"
    )
    args = parser.parse_args(arguments)
    if min(args.places) < 1:
        parser.error(f"--places {min(args.places)}: allowed is at least 1")
    if find_spec("optuna") is None:
        parser.error("package optuna is not installed, and one strategy is its; pip install 'grbench[experiments]'")
    rows = common.Rows(args, __file__, arguments)
    try:
        kept = load(args.grid)
    except ReportError as e:
        parser.error(str(e))
    grid = kept.grid
    total = len(grid.cells)
    if total < 2:
        parser.error(f"--grid {args.grid}: no grid of offline cells; run python -m grbench study=tune_grid first")
    try:
        limit = limits.parse(*args.limit.split("=", 1)) if "=" in args.limit else limits.parse(args.limit, "")
    except ConfigError as e:
        parser.error(str(e))
    goal = Goal("throughput", (limit,), probe_s=args.probe_s)
    with ProcessPoolExecutor(initializer=_share, initargs=(grid, goal, {}, 0)) as processes:
        truths = dict(zip(grid.cells, processes.map(_truth, grid.cells, chunksize=8), strict=True))
    flips = best_by_batch(grid, truths)
    by_batch = flip_chart(flips, args.limit)
    if kept.file:
        rows.draw(by_batch)  # the grid is not written beside the rows
    elif args.out:
        save_rows(kept, truths, rows.command, args.limit, by_batch, args.out / "grid")
    best = max(truths, key=lambda configuration: truths[configuration])
    rows.note(f"{total} configurations; the best is {best.name} with {truths[best]:.4g} requests/s within {args.limit}")
    rows.note(
        f"columns with % alone are mean regrets of {args.seeds} seeds, after that share of as many cells as there are "
        "configurations; docs/SEARCHES.md says what the others are"
    )
    for line in best_batches(flips):
        rows.note(line)
    cells = max(round(args.most * total), 2)
    curves: dict[str, list[float]] = {}
    with ProcessPoolExecutor(initializer=_share, initargs=(grid, goal, truths, cells)) as processes:
        for name in STRATEGIES:
            runs = list(processes.map(_replay, [(name, seed, 1) for seed in range(args.seeds)]))
            curves[name] = [mean([run.regret[i] for run in runs]) for i in range(cells)]
            rows.add(strategy=name, **columns(runs, total, args.most))
        for places in args.places:
            runs = list(processes.map(_replay, [(OURS, seed, places) for seed in range(args.seeds)]))
            rows.note(f"{OURS}, {places} probes at a time: {in_rounds(runs)}")
    regrets = regret_chart(curves, total)
    rows.draw(regrets)
    rows.close()
    if args.out:
        content = [*rows.blocks(), *(Figure(chart.key, chart) for chart in (regrets, by_batch))]
        atomic_io.write(args.out / PAGE, html.page("Regret of search strategies", content).encode())


_shared: dict[str, Any] = {}


def _share(grid: Grid, goal: Goal, truths: Mapping[Configuration, float], cells: int) -> None:
    """Keep in a process what all of its replays need."""
    _shared.update(grid=grid, goal=goal, truths=truths, cells=cells)


def _truth(configuration: Configuration) -> float:
    return _shared["grid"].truth(configuration, _shared["goal"].limits)  # type: ignore[no-any-return]


def _replay(which: tuple[str, int, int]) -> Run:
    strategy, seed, places = which
    return replay(_shared["grid"], _shared["goal"], strategy, _shared["cells"], seed, _shared["truths"], places)


def columns(runs: Sequence[Run], total: int, most: float) -> dict[str, Any]:
    """Return what the replays of one strategy show, by column.

    total: configurations of the grid. most: cells of a replay, as a share of them.
    """
    at = {share: [run.regret[max(round(share * total), 1) - 1] for run in runs] for share in SHARES if share <= most}
    finals = [run.final for run in runs if run.final is not None]
    claims = [run.claim for run in runs if run.claim is not None]
    within = f"{BOUND:.0%}"
    return {
        **{f"{share:.0%}": mean(regrets) for share, regrets in at.items()},
        **({f"{WITHIN:.0%} within {within}": _counted(at[WITHIN])} if WITHIN in at else {}),
        "certified": f"{len(finals)} of {len(runs)}",
        "final": mean(finals) if finals else None,
        f"final within {within}": _counted(finals),
        "false_feasible": sum(run.false_feasible for run in runs),
        "highest_claim": max(claims) if claims else None,
    }


def _counted(regrets: Sequence[float]) -> str:
    """Return how many regrets are within the target."""
    return f"{sum(regret <= BOUND for regret in regrets)} of {len(regrets)}"


def in_rounds(runs: Sequence[Run]) -> str:
    """Return how many rounds of probes searches took, and after how many their mean regret stays below a bound."""
    longest = max(len(run.by_round) for run in runs)
    curves = [[*run.by_round, *(longest - len(run.by_round)) * run.by_round[-1:]] for run in runs]
    above = [i for i, values in enumerate(zip(*curves, strict=True), 1) if mean(values) > BOUND]
    after = f"at most {BOUND:.0%} after {max(above, default=0) + 1}" if longest not in above else f"above {BOUND:.0%}"
    whole = mean(len(run.by_round) for run in runs)
    return f"{whole:.1f} rounds, {mean(run.cells for run in runs):.1f} cells, a mean regret {after}"


def best_by_batch(grid: Grid, truths: Mapping[Configuration, float]) -> dict[str, dict[int, float]]:
    """Return the best rate within the limit at each batch size, by those of KINDS that differ: "cutlass bf16"."""
    differ = [key for key in KINDS if len({configuration.get(key) for configuration in truths}) > 1]
    found: dict[str, dict[int, float]] = {}
    for configuration, rate in truths.items():
        chosen = [(key, value) for key in differ if (value := configuration.get(key)) is not None]
        kind = " ".join(f"{key.rpartition('.')[2]}={v}" if v in ("true", "false", "auto") else v for key, v in chosen)
        its, batch = found.setdefault(kind or "all", {}), grid.batching[configuration].max_batch
        its[batch] = max(its.get(batch, 0.0), rate)
    return found


def best_batches(flips: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Return a line for each kind of configuration with its best batch size."""
    best = {kind: max(its, key=lambda batch: its[batch]) for kind, its in flips.items() if any(its.values())}
    return [f"{kind}: best at max_batch={batch}, {flips[kind][batch]:.4g} requests/s" for kind, batch in best.items()]


def regret_chart(curves: Mapping[str, Sequence[float]], total: int) -> Chart:
    """Return the mean regret of each strategy after each cell. total: configurations of the grid."""
    series = [
        Series(name, list(range(1, len(its) + 1)), [round(100 * value, 2) for value in its], colour=i, mode="line")
        for i, (name, its) in enumerate(curves.items())
    ]
    bounds = [("y", 100 * BOUND, f"{BOUND:.0%}"), ("x", WITHIN * total, f"{WITHIN:.0%} of the grid")]
    return Chart("regret", "Regret against evaluations", "cells", "mean regret, %", series, limits=bounds)


def flip_chart(flips: Mapping[str, Mapping[int, float]], limit: str) -> Chart:
    """Return the best rate of each batch size, a line for each kind of configuration."""
    series = [
        Series(kind, sorted(its), [round(its[batch], 2) for batch in sorted(its)], colour=i, mode="line+points")
        for i, (kind, its) in enumerate(flips.items())
    ]
    return Chart("flips", f"Best rate within {limit}", "max_batch", "requests/s", series, log_x=True)


if __name__ == "__main__":
    common.run(main)
