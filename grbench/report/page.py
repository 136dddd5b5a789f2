"""The report page: one Markdown file with its figures beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from grbench.execution.records import RunRecord
from grbench.report import plots
from grbench.report.cells import MISSING, Cell, command, figure, flatten, labels, shown
from grbench.report.findings import findings
from grbench.report.frame import HITS, PARTS, PERCENTILES, cells_frame, samples_problem, within_limit
from grbench.report.markdown import bullets, code, table
from grbench.report.provenance import origin_line
from grbench.report.repeats import pooled, run_count
from grbench.report.table import columns_for, notes

if TYPE_CHECKING:
    import pandas as pd


def write_page(cells: Sequence[Cell], out: Path, title: str, remarks: Sequence[str] = ()) -> list[Path]:
    """Write `out` and its figures under `<out's stem>_files/`. Returns all written paths, the page first.

    `remarks` are lines for the reader, such as records that could not be read. Samples that can't be read cost only
    their cell's curves, with a remark.
    """
    figures = draw(cells, out.parent / f"{out.stem}_files")
    problems = [samples_problem(folder) for folder, record in cells if record.ok]
    damaged = [why for why in problems if why] if not all(problems) else []
    remarks = [origin_line([record.environment for _, record in cells]), *remarks, *damaged]
    sections = [f"# {title}", *cell_sections(cells, remarks, _figure_section(figures, out))]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return [out, *figures]


def cell_sections(cells: Sequence[Cell], remarks: Sequence[str] = (), figures: Sequence[str] = ()) -> list[str]:
    """Return the sections of a page, from the summary to the commands. figures: the section of figures."""
    frame = cells_frame(cells)
    records = [record for _, record in cells]
    recorded = [record.environment for record in records]
    return [
        _summary(frame),
        *bullets([finding.sentence for finding in findings(records)]),
        *bullets(remarks),
        "## Comparison",
        _comparison(frame, records, _different(recorded)),
        "Times in milliseconds. Percentiles are samples, not interpolated; in brackets their 95% interval.",
        *bullets(notes(records, [f"row {number}" for number in frame.index])),
        *_repeats(records),
        *_failures(frame),
        *figures,
        *environment_section(recorded),
        *_requested_and_actual(records),
        "## Run it again",
        table(["#", "cell", "command"], [[str(n), cell, code(command(r))] for n, cell, r in _numbered(records)]),
    ]


def draw(cells: Sequence[Cell], folder: Path) -> dict[Path, plots.Plot]:
    """Draw the figures of `cells` into `folder`. Distributions and shares of time are of cells with samples."""
    frame = cells_frame(cells)
    ok = frame[frame["status"] == "OK"]
    if ok.empty:
        return {}
    sampled = ok[[not samples_problem(path) for path in ok["folder"]]]
    named = {
        **({"latency_cdf.png": (plots.plot_latency_cdf, sampled)} if len(sampled) else {}),
        "throughput_latency.png": (plots.plot_throughput_latency, ok),
        **({"time_shares.png": (plots.plot_time_shares, sampled)} if len(sampled) else {}),
        **({"hit_mix.png": (plots.plot_hit_mix, ok)} if HITS[0] in frame else {}),
    }
    return {folder / name: plot(drawn, folder / name) for name, (plot, drawn) in named.items()}


def _numbered(records: Sequence[RunRecord]) -> list[tuple[int, str, RunRecord]]:
    return [(n, label, r) for n, (label, r) in enumerate(zip(labels(records), records, strict=True), 1)]


def _summary(frame: pd.DataFrame) -> str:
    ok = int((frame["status"] == "OK").sum())
    days = sorted({started[:10] for started in frame["started_at"]})
    return f"{len(frame)} cells, {ok} OK, measured {' to '.join(dict.fromkeys([days[0], days[-1]]))}."


def _comparison(frame: pd.DataFrame, records: Sequence[RunRecord], environments: list[dict[str, str]]) -> str:
    knobs: list[str] = ["cell"]
    several = len(environments) > 1
    heads = ["#", *knobs, *(["environment"] if several else []), "status", "throughput rps", "goodput rps"]
    heads += [name.removeprefix("latency_ms/") for name in PERCENTILES]
    heads += [f"{part.removesuffix('_ms')} p50" for part in PARTS]
    cached = HITS[0] in frame  # some cell has a user-state cache
    heads += ["hits on device / host, %"] if cached else []
    compared = [record.gate.get("measured") for record in records]
    heads += ["gate error / allowed", *(["answers compared"] if any(compared) else []), "p99 within limit"]
    rows = []
    verdicts = within_limit(frame)
    for (number, row), record, sample, verdict in zip(frame.iterrows(), records, compared, verdicts, strict=True):
        ok = record.ok
        cells = [str(number), *(str(row[key]) for key in knobs)]
        if several:
            cells.append(_letter(environments.index(_flat(record.environment))))
        offline = record.spec["scenario"]["name"] == "offline"  # its latency is the time in a queue of all requests
        late = [figure(row["goodput_rps"])]
        late += [_with_interval(row, name) if row[name] == row[name] or not ok else "withheld" for name in PERCENTILES]
        cells += [row["status"], figure(row["throughput_rps"]), *([MISSING] * len(late) if offline else late)]
        cells += [MISSING if offline and part == "queue_ms" else figure(row[f"{part}/p50"]) for part in PARTS]
        if cached:
            cells.append(MISSING if row[HITS[0]] != row[HITS[0]] else " / ".join(figure(100 * row[n]) for n in HITS))
        gate = [figure(row[name]) for name in ("gate_error", "gate_tolerance")]
        cells.append(MISSING if gate == [MISSING, MISSING] else " / ".join(gate))
        if any(compared):
            cells.append(f"{sample['checked']} of {sample['answers']}" if sample else MISSING)
        cells.append(MISSING if offline else verdict)
        rows.append(cells)
    return table(heads, rows)


def _repeats(records: Sequence[RunRecord]) -> list[str]:
    """Return the section of cells that ran several times, which is empty if none did."""
    several = [record for record in pooled(records) if run_count(record) > 1]
    if not several:
        return []
    columns = [column for column in columns_for(several) if column.heading != "gate"]
    rows = [
        [label, *(column.text(record) for column in columns)]
        for record, label in zip(several, labels(several), strict=True)
    ]
    note = "Means of several runs with other seeds. The 95% intervals have the spread between runs."
    return ["## Repeated cells", table(["cell", *(column.heading for column in columns)], rows), note]


def _with_interval(row: pd.Series, name: str) -> str:
    low, high = row[f"{name}/low"], row[f"{name}/high"]
    return figure(row[name]) + (f" [{figure(low)}, {figure(high)}]" if low == low else "")


def _failures(frame: pd.DataFrame) -> list[str]:
    failed = frame[frame["status"] != "OK"]
    if failed.empty:
        return []
    rows = [[str(number), row["cell"], row["status"], row["error"]] for number, row in failed.iterrows()]
    return ["## Cells without a result", table(["#", "cell", "status", "reason"], rows)]


def _figure_section(figures: dict[Path, plots.Plot], out: Path) -> list[str]:
    if not figures:
        return ["No cell is OK: there is nothing to plot."]
    parts = ["## Figures"]
    for path, plot in figures.items():
        link = quote(Path(os.path.relpath(path, out.parent)).as_posix())
        parts += [f"![{plot.figure.axes[0].get_title()}]({link})", *bullets(plot.notes)]
    if "latency_cdf.png" not in {path.name for path in figures}:
        parts.append("No samples are beside the records: latency distributions and shares of time are not drawn.")
    return parts


def environment_section(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Return the section about machines and versions, with a column for each different environment."""
    environments = _different(recorded)
    keys = dict.fromkeys(key for environment in environments for key in environment)
    heads = ["", *(_letter(i) for i in range(len(environments)))] if len(environments) > 1 else ["", "all rows"]
    return ["## Environment", table(heads, [[key, *(e.get(key, MISSING) for e in environments)] for key in keys])]


def _flat(environment: dict[str, Any]) -> dict[str, str]:
    return {key: "none" if value in ([], {}) else shown(value) for key, value in flatten(environment).items()}


def _different(recorded: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return each environment once, in the order in which they come, flattened."""
    different: list[dict[str, str]] = []
    for environment in map(_flat, recorded):
        if environment not in different:
            different.append(environment)
    return different


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"E{index + 1}"


def _requested_and_actual(records: Sequence[RunRecord]) -> list[str]:
    """List options whose actual value differs from the requested one, such as engine.device=auto on cuda.

    Options with equal values share a row.
    """
    cells: dict[tuple[str, str, str], list[str]] = {}
    for number, _, record in _numbered(records):
        ran = flatten(record.actual)
        for key, asked in flatten(record.requested).items():
            found = _ran(key, ran)
            if found is not None and found != shown(asked):
                cells.setdefault((key, shown(asked), found), []).append(str(number))
    rows: dict[tuple[str, str, str], list[str]] = {}
    for (key, asked, found), who in cells.items():
        where = "all" if len(who) == len(records) else ", ".join(who)
        rows.setdefault((asked, found, where), []).append(key)
    if not rows:
        return []
    lines = [[", ".join(keys), *rest] for rest, keys in rows.items()]
    return ["## Requested and actual", table(["option", "requested", "actual", "cells"], lines)]


def _ran(key: str, ran: dict[str, Any]) -> str | None:
    """Return the actual value of a requested option; for a kernel in several stages each variant once."""
    group, _, name = key.rpartition(".")
    if group == "kernel":
        return ", ".join(sorted({str(v) for k, v in ran.items() if k.endswith(f"kernels.{name}")})) or None
    found = ran.get(key, ran.get(name))
    return None if found is None else shown(found)
