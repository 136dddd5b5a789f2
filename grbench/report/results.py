"""The sections of a page that shows results files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grbench.report.cells import MISSING, figure, flatten, shown
from grbench.report.chart import Chart
from grbench.report.markdown import bullets, table
from grbench.report.markdown import sections as written
from grbench.report.page import Block, Bullets, Table

Results = dict[str, Any]  # what a results file holds
Row = dict[str, Any]

MOST_POINTS = 12  # of a chart that is a table too


def results_sections(files: Sequence[tuple[str, Results]]) -> list[str]:
    """The sections of a page about results files, given with their names: commands, tables, rows without a result."""
    commands = dict.fromkeys(results["command"] for _, results in files)
    sections = ["## Commands", "\n".join(f"    {' '.join(command.split())}" for command in commands)]
    jobs = [results for _, results in files if results.get("kind") == "cachesim"]
    if len(jobs) > 1:
        sections += ["## Policies by job", *_jobs(jobs)]
    for name, results in files:
        if results.get("kind") == "cachesim" and len(jobs) > 1:
            continue
        title = [results["title"] + "."] if "title" in results else []
        sections += [f"## {name}", *title, *KINDS.get(results.get("kind", ""), _other_rows)(results)]
    return sections


def charts_of(results: Results) -> list[Chart]:
    """The charts that a program has put beside its rows. Raises ValueError for anything else there."""
    try:
        return [Chart.from_dict(chart) for chart in results.get("charts", [])]
    except (KeyError, TypeError) as e:
        raise ValueError(f"charts: not those of a program in experiments/ ({e})") from None


def rows_blocks(rows: Sequence[Row], notes: Sequence[str] = ()) -> list[Block]:
    """A table with a column for each scalar of the rows, headed by its key; then notes, and rows without a result."""
    done = [row for row in rows if row.get("status", "OK") == "OK"]
    keys = dict.fromkeys(key for row in done for key, value in row.items() if not isinstance(value, list | dict))
    keys.pop("status", None)
    cells = [[row_cell(row.get(key)) for key in keys] for row in done]
    lists = [lines for lines in (notes, _failures(rows)) if lines]
    return [*([Table([key.replace("_", " ") for key in keys], cells)] if done else []), *map(Bullets, lists)]


def _other_rows(results: Results) -> list[str]:
    sections = written(rows_blocks(results["rows"], results.get("notes", [])))
    for chart in charts_of(results):
        places = sorted({x for series in chart.series for x in series.x})
        if len(places) <= MOST_POINTS:
            sections += [f"### {chart.title}", _points(chart, places)]
    return sections


def _points(chart: Chart, places: Sequence[float]) -> str:
    """The points of a chart: a row for each series, a column for each place."""
    found = [(series.name, dict(zip(series.x, series.y, strict=True))) for series in chart.series]
    heads = [f"{chart.y}, by {chart.x}", *(f"{x:g}" for x in places)]
    return table(heads, [[name, *(figure(points.get(x)) for x in places)] for name, points in found])


def _kernel_rows(results: Results) -> list[str]:
    """A table for each family, under the ceilings that shares refer to."""
    from grbench.kernelbench.output import COLUMNS

    rows, roofs = results["rows"], results["ceilings"]
    sections = [
        f"Ceilings of this process, {roofs['dtype']}: {figure(roofs['tflops'])} TFLOP/s "
        f"({roofs['matmul_size']}^3 product), {figure(roofs['tbps'])} TB/s (copy, read and written)."
    ]
    others = {row["metrics"].get("ceiling_tflops", roofs["tflops"]) for row in rows if row["status"] == "OK"}
    for peak in sorted(others - {roofs["tflops"]}):
        sections.append(f"Shares of variants with fp8 in their name refer to {figure(peak)} TFLOP/s, its own product.")
    heads = ["shape", "dtype", "variant", *(heading.replace("\n", " ") for heading in COLUMNS)]
    for family in dict.fromkeys(row["family"] for row in rows):
        done = [row for row in rows if row["family"] == family and row["status"] == "OK"]
        cells = [
            [row["shape"], row["dtype"], row["variant"]]
            + [_scaled(row["metrics"].get(metric), factor, figure) for metric, factor in COLUMNS.values()]
            for row in done
        ]
        sections += [f"### {family}", table(heads, cells)] if done else []
    return sections + bullets(_failures(rows))


def _policy_rows(results: Results) -> list[str]:
    """A row for each policy at each cache size of one job; its tiers and its plan are tables of their own."""
    from grbench.cachesim.output import tables

    rows, sections = results["rows"], []
    for columns in tables([row["metrics"] for row in rows]):
        heads = ["size, GB", "of all states, %", "policy", *(heading.replace("\n", " ") for heading in columns)]
        cells = [
            [f"{row['gb']:.3g}", f"{100 * row['share']:.3g}", row["policy"]]
            + [
                _scaled(row["metrics"].get(metric), factor, f"{{:{form}}}".format)
                for metric, factor, form in columns.values()
            ]
            for row in rows
            if any(metric in row["metrics"] for metric, *_ in columns.values())
        ]
        sections.append(table(heads, cells))
    return sections


def _jobs(jobs: Sequence[Results]) -> list[str]:
    """Jobs of a simulation side by side: a row for each job and policy, a column for each size."""
    configs = [flatten(job["config"]) for job in jobs]
    knobs = [key for key in configs[0] if len({shown(config.get(key)) for config in configs}) > 1]
    ordered = sorted(zip(configs, jobs, strict=True), key=lambda pair: [_order(pair[0][key]) for key in knobs])
    config = jobs[0]["config"]
    sizes = [f"{gb:g} GB" for gb in config["sizes_gb"]] or [f"{100 * share:g}%" for share in config["shares"]]
    heads = [*(key.rpartition(".")[2].replace("_", " ") for key in knobs), "policy", *sizes]
    sections = []
    for title, metric, form in JOB_TABLES:
        lines = []
        for config, job in ordered:
            found: dict[str, list[str]] = {}
            for row in job["rows"]:
                if (value := row["metrics"].get(metric)) is not None and row["policy"] != "none":
                    found.setdefault(row["policy"], []).append(format(100 * value, form))
            if metric == "over_lru":
                found.pop("lru", None)
            lines += [[*(shown(config[key]) for key in knobs), policy, *cells] for policy, cells in found.items()]
        sections += [f"### {title}", table(heads, lines)] if lines else []
    return sections


def _order(value: object) -> tuple[bool, float, str]:
    """Sort numbers by size, before words; null comes first."""
    number = isinstance(value, int | float)
    return not number and value is not None, float(value) if isinstance(value, int | float) else -1.0, str(value)


JOB_TABLES = (("Hit rate, %", "hit_rate", ".2f"), ("Points of hit rate over lru", "over_lru", "+.2f"))
KINDS: dict[str, Callable[[Results], list[str]]] = {"kernels": _kernel_rows, "cachesim": _policy_rows}


def _failures(rows: Sequence[Row]) -> list[str]:
    """A line for each reason, with the rows that it holds for."""
    places: dict[str, list[str]] = {}
    for row in rows:
        if row.get("status", "OK") != "OK":
            names = [str(v) for k, v in row.items() if k not in ("status", "reason") and isinstance(v, str | int)]
            places.setdefault(f"{row['status']}: {row.get('reason') or 'no reason was recorded'}", []).append(
                " ".join(names)
            )
    return [f"{reason} ({'; '.join(which)})" for reason, which in places.items()]


def _scaled(value: float | None, factor: float, shown: Callable[[float], str]) -> str:
    return MISSING if value is None else shown(factor * value)


def row_cell(value: object) -> str:
    """A scalar of a row as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return figure(value) if isinstance(value, float) or value is None else str(value)
