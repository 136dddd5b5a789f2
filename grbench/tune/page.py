"""The page of a search: the answer, the Pareto front, every configuration, parallel coordinates. HTML and Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grbench.report import html
from grbench.report.cells import figure
from grbench.report.chart import Chart, Series
from grbench.report.markdown import escape, sections
from grbench.report.page import Block, Bullets, Figure, Heading, Table, Text
from grbench.report.write import draw
from grbench.tune import answer, rates
from grbench.tune.answer import Answer
from grbench.tune.config import Declared
from grbench.tune.knowledge import Knowledge
from grbench.tune.outcome import Configuration, Outcome
from grbench.tune.space import Space
from grbench.tune.trial import Trial
from grengines.runtime import atomic_io

if TYPE_CHECKING:
    import plotly.graph_objects as go

NAME = "tune"
STEP = ("option", "change", "requests_s", "against")  # of one step from the winner
SMALLER = ("p99 ms", "quality loss %", "memory MiB", "J/1000 requests")  # figures of which less is better


def write(knowledge: Knowledge, found: Answer | None, declared: Declared, space: Space, folder: Path) -> list[Path]:
    """Write tune.html, tune.md with its figures, and tune.json. Returns the paths, the page first."""
    content = blocks(knowledge, found, declared, space)
    title = f"grbench tune: {declared.goal.objective}"
    page = folder / f"{NAME}.html"
    text = html.page(title, content)
    if dimensions := coordinates(knowledge, space):
        both = parallel_coordinates(dimensions).to_html(
            full_html=False, include_plotlyjs=False, div_id="figure_coordinates"
        )
        text = text.replace("</body>", f"{both}</body>")
    atomic_io.write(page, text.encode())
    markdown = folder / f"{NAME}.md"
    pictures = folder / f"{NAME}_files"
    draw([block for block in content if isinstance(block, Figure)], pictures)
    lines = [f"# {title}", *sections(content, pictures, markdown)]
    atomic_io.write(markdown, ("\n\n".join(lines) + "\n").encode())
    data = folder / f"{NAME}.json"
    atomic_io.write(data, (json.dumps(facts(knowledge, found, declared, space), indent=1) + "\n").encode())
    return [page, markdown, data]


def blocks(knowledge: Knowledge, found: Answer | None, declared: Declared, space: Space) -> list[Block]:
    """Return the content of the page."""
    limits = ", ".join(map(str, declared.goal.limits)) or "no limit"
    content: list[Block] = [Text(answer.sentence(found) if found else f"No answer: {answer.nobody(knowledge)}.")]
    if found:
        content.append(Text(answer.binding(found)))
    if busy := answer.busy(knowledge):
        content.append(Text(busy))
    measured = sum(trial.measured for trial in knowledge.trials)
    count = f"{measured} of {len(space.configurations)} configurations were measured"
    content.append(Text(f"Objective {declared.goal.objective}, limits: {limits}, budget {declared.budget}; {count}."))
    if returns := answer.returns(knowledge):
        content.append(Text(returns))
    if charts := charts_of(knowledge, found):
        content += [Heading("Pareto front"), *(Figure(chart.key, chart) for chart in charts), front_table(knowledge)]
    if found and (rows := answer.neighbours(found)):
        content += [
            Heading("One step from the winner"),
            _steps(rows),
        ]
    content += [Heading("Configurations"), _all(knowledge)]
    content += _correlations(knowledge)
    if found and found.certificate and found.certificate.failures:
        content += [Heading("Better, but not certified"), Bullets(found.certificate.failures)]
    if knowledge.left_out:
        slow = [[str(len(some)), reason] for reason, some in knowledge.left_out.items()]
        content += [Heading("Left out during the search"), Table(["configurations", "reason"], slow)]
    if space.left_out:
        content += [
            Heading("Left out before anything ran"),
            Table(["combinations", "reason"], [[str(n), why] for why, n in space.left_out.items()]),
        ]
    return content


def summary(knowledge: Knowledge, found: Answer | None) -> str:
    """Return the answer as Markdown without figures, for the description of a run in MLflow."""
    if found is None:
        return escape(f"No answer: {answer.nobody(knowledge)}.") if knowledge.trials else ""
    content: list[Block] = [Text(escape(answer.sentence(found))), Text(escape(answer.binding(found)))]
    content += [Text(escape(busy))] if (busy := answer.busy(knowledge)) else []
    content += [Heading("Pareto front"), front_table(knowledge)]
    if rows := answer.neighbours(found):
        content += [Heading("One step from the winner"), _steps(rows)]
    content += _correlations(knowledge)
    return "\n\n".join(sections(content))


def _steps(rows: list[tuple[str, str, str, str]]) -> Table:
    return Table(["option", "change", "requests/s offered", "against the winner"], rows)


def _correlations(knowledge: Knowledge) -> list[Block]:
    """Return how each lower fidelity orders the configurations; nothing where probes at rates decide no pair."""
    words = [
        f"{name}: {value:.2f} over {number} pairs of configurations" if number else f"{name}: no pair is in an order"
        for name, number, value in answer.correlations(knowledge)
    ]
    return [Heading("Rank correlation with what probes at rates found"), Bullets(words)] if words else []


def charts_of(knowledge: Knowledge, found: Answer | None) -> list[Chart]:
    """Return the charts of what keeps the limits: rate and p99, then the rate and each further figure."""
    first = front_chart(knowledge, found)
    return [first, *trade_offs(knowledge)] if first else []


def trade_offs(knowledge: Knowledge) -> list[Chart]:
    """Return a chart for each further figure in which configurations within the limits differ: it and the rate."""
    points = [(trial, answer.figures(trial)) for trial in knowledge.trials if trial.best is not None]
    charts = []
    for name in SMALLER[1:]:
        have = [(trial, row) for trial, row in points if name in row]
        if len({row[name] for _, row in have}) < 2:
            continue
        series = Series(
            "configurations",
            [row["requests/s"] for _, row in have],
            [row[name] for _, row in have],
            hover=[trial.configuration.name for trial, _ in have],
            colour=0,
        )
        key = re.sub(r"\W+", "_", name.lower()).strip("_")
        charts.append(Chart(key, f"Rate and {name} within the limits", "requests/s answered", name, [series]))
    return charts


def front(knowledge: Knowledge) -> list[Trial]:
    """Return the trials that no other beats in every figure that both have, the highest rate first."""
    points = [(trial, answer.figures(trial)) for trial in knowledge.trials if trial.best is not None]

    def beats(one: dict[str, float], other: dict[str, float]) -> bool:
        names = [name for name in one if name in other]
        gains = [(other[n] - one[n] if n in SMALLER else one[n] - other[n]) for n in names]
        return min(gains) >= 0 and max(gains) > 0

    kept = [trial for trial, mine in points if not any(beats(its, mine) for _, its in points)]
    return sorted(kept, key=lambda trial: trial.low or 0, reverse=True)


def front_table(knowledge: Knowledge) -> Table:
    """Return the Pareto front with every figure."""
    trials, numbers = front(knowledge), _numbers(knowledge)
    rows = [answer.figures(trial) for trial in trials]
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = [
        [numbers[t.configuration], t.configuration.name, *(figure(row.get(name)) for name in names)]
        for t, row in zip(trials, rows, strict=True)
    ]
    heads = ["requests/s answered" if name == "requests/s" else name for name in names]
    return Table(["#", "configuration", *heads], shown)


def front_chart(knowledge: Knowledge, found: Answer | None = None) -> Chart | None:
    """Return rate and p99 of the configurations that keep the limits, the front of these two, and the answer."""
    kept = [
        (trial, rate, best)
        for trial in knowledge.trials
        if (rate := trial.carried) and (best := trial.best) and "latency_ms/p99" in best.metrics
    ]
    if not kept:
        return None
    numbers = _numbers(knowledge)

    def ends(outcome: Outcome, end: int) -> float:
        value = outcome.metrics["latency_ms/p99"]
        return outcome.intervals.get("latency_ms/p99", [value, value])[end]

    line: list[tuple[float, float]] = []
    for _, rate, outcome in sorted(kept, key=lambda point: point[1], reverse=True):
        if not line or outcome.metrics["latency_ms/p99"] < line[-1][1]:
            line.append((rate, outcome.metrics["latency_ms/p99"]))
    points = Series(
        "configurations",
        [rate for _, rate, _ in kept],
        [outcome.metrics["latency_ms/p99"] for _, _, outcome in kept],
        [ends(outcome, 0) for _, _, outcome in kept],
        [ends(outcome, 1) for _, _, outcome in kept],
        [numbers[trial.configuration] for trial, _, _ in kept],
        [trial.configuration.name for trial, _, _ in kept],
        0,
    )
    series = [points]
    if len(line) > 1:
        series.append(Series("Pareto front", [x for x, _ in line], [y for _, y in line], colour=1, mode="line"))
    if found is not None and "latency_ms/p99" in found.outcome.metrics:
        how = "certified" if found.certified else "not certified"
        place = ([found.rate], [found.outcome.metrics["latency_ms/p99"]])
        both = ([ends(found.outcome, 0)], [ends(found.outcome, 1)])
        name = found.trial.configuration.name
        series.append(Series(f"answer, {how}", *place, *both, hover=[name], colour=2))
    bounds = [("y", x.bound, f"limit {x.bound:g} ms") for x in knowledge.goal.limits if x.metric == "latency_ms/p99"]
    return Chart("pareto", "Rate and p99 within the limits", "requests/s answered", "p99, ms", series, limits=bounds)


def _ranked(knowledge: Knowledge) -> list[Trial]:
    """Return the trials in the order of the table of all configurations."""

    def order(trial: Trial) -> tuple[bool, float]:
        return trial.low is None, -(trial.estimate if trial.estimate is not None else -1e9)

    return sorted(knowledge.trials, key=order)


def _numbers(knowledge: Knowledge) -> dict[Configuration, str]:
    """Return the number of each configuration: its row in the table of all of them, in every table and figure."""
    return {trial.configuration: str(number) for number, trial in enumerate(_ranked(knowledge), 1)}


def _all(knowledge: Knowledge) -> Table:
    numbers, rows = _numbers(knowledge), []
    for trial in _ranked(knowledge):
        offline = trial.offline.metrics["throughput_rps"] if trial.offline else None
        rate = figure(rates.rate_of(trial.low)) if trial.low is not None else "-"
        best = trial.best.metrics.get("latency_ms/p99") if trial.best else None
        rows.append(
            [
                numbers[trial.configuration],
                trial.configuration.name,
                rate,
                figure(best),
                figure(offline),
                str(len(trial.probes)),
                trial.failed or _limit(knowledge, trial),
            ]
        )
    heads = ["#", "configuration", "requests/s offered", "p99 ms", "offline", "probes", "why not more"]
    return Table(heads, rows)


def _limit(knowledge: Knowledge, trial: Trial) -> str:
    """Return what keeps a trial from a higher rate."""
    if not trial.measured:
        return "no room in the budget for its first probe"
    high, best = trial.high, knowledge.incumbent
    if high is not None and trial.binding is not None:
        verdict, limit, outcome = trial.binding
        how = f" ({verdict})" if limit is not None else ""
        at = "certifying at" if trial.refuted is not None and trial.refuted.step == high else "at"
        return f"{limit.shown(outcome) if limit else outcome.status} {at} {rates.rate_of(high):.4g}/s{how}"
    if knowledge.goal.rate is not None:
        return "the rate is fixed"
    if not trial.verdicts:
        return "no load was tried under these limits"
    if trial.low is None or (trial.top is not None and trial.low >= trial.top):
        return "offline rate"
    level = best.low if best is not None and knowledge.goal.objective == "throughput" else None
    beaten = trial.top is not None and level is not None and trial.top <= level
    return "offline rate below the best" if beaten else "budget ended"


def coordinates(knowledge: Knowledge, space: Space) -> list[dict[str, Any]]:
    """Return the axes of parallel coordinates: options of the space and the rate, of each configuration with one.

    They are data, as those of a chart are. There are none where nothing keeps the limits.
    """
    trials = [trial for trial in knowledge.trials if trial.estimate is not None]
    if not trials or front_chart(knowledge) is None:
        return []
    dimensions: list[dict[str, Any]] = []
    for key, values in space.axes.items():
        texts = [trial.configuration.get(key) or "-" for trial in trials]
        shown = [value for value in [*values, "-"] if value in texts]
        dimensions.append(
            {
                "label": key.rpartition(".")[2],
                "values": [shown.index(text) for text in texts],
                "tickvals": list(range(len(shown))),
                "ticktext": shown,
            }
        )
    reach = [rates.RATIO ** (trial.estimate or 0.0) for trial in trials]
    return [*dimensions, {"label": "requests/s (estimate)", "values": reach}]


def parallel_coordinates(dimensions: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Return parallel coordinates of these axes, of which the last colours the lines, for a browser."""
    import plotly.graph_objects as go

    line = {"color": dimensions[-1]["values"], "colorscale": "Viridis", "showscale": True}
    lines = go.Figure(go.Parcoords(dimensions=list(dimensions), line=line))
    return lines.update_layout(title="Options and the rate that is reached, as far as it is known", height=460)


def facts(knowledge: Knowledge, found: Answer | None, declared: Declared, space: Space) -> dict[str, object]:
    """Return the search as data, for other programs."""

    def of(trial: Trial) -> dict[str, object]:
        folders = [str(outcome.folder) for outcome in [trial.offline, *trial.probes.values()] if outcome is not None]
        return {
            "overrides": trial.configuration.words,
            "rate_low": None if trial.low is None else rates.rate_of(trial.low),
            "rate_high": None if trial.high is None else rates.rate_of(trial.high),
            "offline_rps": trial.offline.metrics["throughput_rps"] if trial.offline else None,
            "failed": trial.failed,
            "figures": answer.figures(trial),
            "records": folders,
        }

    correlated = [{"fidelity": n, "pairs": c, "gamma": v} for n, c, v in answer.correlations(knowledge)]
    return {
        "objective": declared.goal.objective,
        "limits": {limit.metric: limit.bound for limit in declared.goal.limits},
        "budget": str(declared.budget),
        "answer": answer.sentence(found) if found else None,
        "binding": answer.binding(found) if found else None,
        "winner": of(found.trial) if found else None,
        "steps": [dict(zip(STEP, row, strict=True)) for row in answer.neighbours(found)] if found else [],
        "certified": found.certified if found else False,
        "pareto": [trial.configuration.words for trial in front(knowledge)],
        "trials": [of(trial) for trial in knowledge.trials],
        "rank_correlation": correlated,
        "charts": [chart.to_dict() for chart in charts_of(knowledge, found)],
        "coordinates": coordinates(knowledge, space),
        "left_out": space.left_out,
        "left_out_during": {reason: len(some) for reason, some in knowledge.left_out.items()},
    }
