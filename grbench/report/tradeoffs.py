"""Quality against speed: cells that answered the same users and differ in one choice, beside a base.

The base is the cell from which the most others differ in one axis of `AXES`. The quality of a cell is compared with
the base's over the same resamples of the users (`quality.parquet`), so the interval of the difference is that of pairs.
Of a speed, the interval is that over repeats, or of one run's own batches.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grbench.execution.energy import METRIC as JOULES
from grbench.execution.environment import machine_of
from grbench.execution.load import DISTURBED
from grbench.execution.records import IN_RUN, RESAMPLES_FILE, RunRecord
from grbench.execution.stats import SHORTEST_S, overloaded
from grbench.quality.metrics import Estimate, Floats, estimate_of
from grbench.report.cells import MISSING, engine_name, figure, shown, with_interval
from grbench.report.chart import Chart, Series
from grbench.report.cost_charts import precision_of
from grbench.report.groups import VERBS, Row
from grbench.report.work import LOADS, emulated, has_speed, offered_load, options_of, scenario_of, servers_of

FIGURES = {  # those of a task, the headline first, and the name of each
    "rank": {"auc": "AUC", "ne": "NE"},
    "generate": {"hr10": "HR@10", "ndcg10": "NDCG@10"},
    "recommend": {"hr10": "HR@10", "ndcg10": "NDCG@10"},
}
CANDIDATES = {"recommend": "retrieval.k", "rank": "workload.num_candidates"}  # of a task that ranks: the option
POPULAR = {"hr10_popular": "HR@10", "ndcg10_popular": "NDCG@10"}  # of a ranker with fewer candidates
LEAST = 0.0001  # of a figure that is shown
NOT_ALONE = (
    "speeds are not compared where other processes were at work, a run took less than a second or products are emulated"
)
READING = (
    "HR@10, NDCG@10: each user's last item among the first ten of the answer; an answer of fewer items misses the rest",
    "HR@10, NDCG@10 of a ranker: the same of its order of as many candidates as the row says, the most popular items "
    "outside the user's past; fewer candidates leave out the less popular ones",
    "AUC, NE: means of the tasks, over the last requests that the training did not see; a lower NE is better",
    "change: from the base; of quality over the same resamples of the users, so its interval is that of pairs",
    "requests/s: offline; the interval is over repeats, or of the run's own batches, which says nothing of other runs",
    "p99: of the server with Poisson arrivals, one rate for all",
    "J/request: joules of the GPU, else of the processor, for each answer, offline or of that server; left out where "
    "the machine does not tell",
    "[ ]: 95% interval; none is corrected for the number of rows",
)


@dataclass(frozen=True)
class Axis:
    """A choice: the options that it sets, and the text and the place of a cell's value among others."""

    title: str
    phrase: str  # of the base's value, in a sentence
    options: Callable[[str, str], bool]  # of a task and an option's key
    text: Callable[[RunRecord], str]
    place: Callable[[RunRecord], float] = lambda record: 0.0

    def figures(self, task: str) -> dict[str, str]:
        """Return the figures to compare: AUC is of the candidates, so it does not compare those with fewer."""
        return POPULAR if task == "rank" and self.options(task, CANDIDATES[task]) else FIGURES[task]


def _number(*keys: str) -> tuple[Callable[[RunRecord], str], Callable[[RunRecord], float]]:
    """Return the text and the place of an option that is a number: the first of several that a record has."""

    def value(record: RunRecord) -> Any:
        options = options_of(record)
        return next((options[key] for key in keys if options.get(key) is not None), None)

    return lambda record: shown(value(record)), lambda record: float(value(record) or 0)


def _cache(record: RunRecord) -> str:
    """Return the name of a record's cache, and the precision of its pages where that is an option."""
    cache: dict[str, Any] = record.spec.get("cache") or {}
    precision = cache.get("precision", "engine")
    return f"{cache.get('name', 'none')}{'' if precision == 'engine' else f' {precision}'}"


AXES = (
    Axis(
        "Beam width",
        "{} beams",
        lambda task, key: key == "retrieval.beam_width" or (task == "generate" and key == "retrieval.k"),
        *_number("retrieval.beam_width"),
    ),
    Axis(
        "Candidates scored",
        "{} candidates",
        lambda task, key: key == CANDIDATES.get(task),
        *_number(*CANDIDATES.values()),
    ),
    Axis(
        "Engine and precision",
        "{}",
        lambda task, key: key.split(".")[0] in ("engine", "kernel"),
        lambda record: f"{engine_name(record.spec)} {precision_of(record)}",
    ),
    Axis(
        "History window",
        "the last {} events",
        lambda task, key: key == "workload.max_history",
        *_number("workload.max_history"),
    ),
    Axis(
        "Age of the state",
        "a state {} events old",
        lambda task, key: key == "workload.stale_events",
        *_number("workload.stale_events"),
    ),
    Axis("KV cache", "{}", lambda task, key: key.split(".")[0] == "cache", _cache),
)


@dataclass(frozen=True)
class Point:
    """A cell that has quality and throughput, and the cells that measured it as a server, by their offered load."""

    row: Row
    drawn: dict[str, Floats]  # resamples of each figure
    servers: dict[float, Row]

    def quality(self, name: str) -> Estimate:
        return estimate_of(self.row.record.metrics[f"quality/{name}"], self.drawn[name])

    @property
    def speed(self) -> tuple[float, float, float]:
        """Requests/s with the ends of its interval; of a run without one all three are its value."""
        record = self.row.record
        value = record.metrics["throughput_rps"]
        low, high = record.intervals.get("throughput_rps") or record.intervals.get(IN_RUN) or (value, value)
        return value, low, high

    @property
    def alone(self) -> bool:
        """True if the speed may be compared: no other process, no run that is too short, no emulated products."""
        record = self.row.record
        if emulated(record):
            return False
        long = record.metrics.get("duration_s", SHORTEST_S) >= SHORTEST_S
        return long and not record.environment.get("beside") and not any(DISTURBED in note for note in record.notes)


@dataclass(frozen=True)
class Tradeoff:
    """The points of one axis in its order, and the base, which is one of them."""

    axis: Axis
    base: Point
    points: list[Point]

    @property
    def task(self) -> str:
        return str(self.base.row.record.spec["task"])

    @property
    def figures(self) -> dict[str, str]:
        return {name: text for name, text in self.axis.figures(self.task).items() if name in self.base.drawn}

    @property
    def others(self) -> list[Point]:
        return [point for point in self.points if point is not self.base]

    @property
    def title(self) -> str:
        return f"{VERBS[self.task]}: {_lower(self.axis.title)} against speed"

    @property
    def load(self) -> float | None:
        """The one offered load of the servers in the table: that of most points, and of equal ones the highest."""
        loads = Counter(load for point in self.points for load in point.servers)
        return max(loads, key=lambda load: (loads[load], load), default=None)

    def server(self, point: Point) -> Row | None:
        """Return the cell that measured a point as a server at the load of the table."""
        return None if self.load is None else point.servers.get(self.load)

    def text(self, point: Point) -> str:
        return self.axis.text(point.row.record)

    def change(self, point: Point, name: str) -> Estimate:
        return change(self.base, point, name)

    def gain(self, point: Point) -> Estimate:
        """Return the share of requests/s that a point has more than the base. The two are independent runs."""
        (ours, *_), (theirs, *_) = point.speed, self.base.speed
        reach = math.hypot(*(math.log(high / low) / 2 for _, low, high in (point.speed, self.base.speed)))
        ratio = ours / theirs
        return Estimate(ratio - 1, ratio * math.exp(-reach) - 1, ratio * math.exp(reach) - 1)

    def comparable(self, point: Point) -> bool:
        """Return whether a point's requests/s may be compared with the base's."""
        return self.base.alone and point.alone

    @property
    def against(self) -> str:
        """The base that the others are compared with, in words."""
        return f"Against {self.axis.phrase.format(self.text(self.base))}"

    @property
    def sentence(self) -> str:
        """The sentence of what was found."""
        return f"{self.against}: {'; '.join(self.parts)}."

    @property
    def parts(self) -> list[str]:
        """The findings, each of one or several of the others."""
        name, text = next(iter(self.figures.items()))
        parts, even = [], []
        for point in self.others:
            change = self.change(point, name)
            if change.low <= 0 <= change.high:
                even.append(point)
                continue
            verb, sign = ("gains", 1) if change.value > 0 else ("loses", -1)
            low, high = sorted((sign * change.low, sign * change.high))
            speed = f" and {self._gains(point)}" if self.comparable(point) else ""
            change_of = f"{verb} {sign * change.value:.4f} [{low:.4f}, {high:.4f}] of {text}"
            if high < LEAST:
                change_of = f"changes {text} by less than {LEAST}"
            parts.append(f"{self.text(point)} {change_of}{speed}")
        if even:
            most = max(0.0, *(-self.change(point, name).low for point in even))
            names = _and([self.text(point) for point in even])
            parts.append(f"{names} {'lose' if len(even) > 1 else 'loses'} at most {most:.4f} of {text}, perhaps none")
        if timed := [point for point in even if self.comparable(point)]:
            fastest = max(timed, key=lambda point: point.speed[0])
            which = f"the fastest of them, {self.text(fastest)}," if len(even) > 1 else "it"
            parts.append(f"{which} {self._gains(fastest)}")
        if not all(self.comparable(point) for point in self.others):
            parts.append(NOT_ALONE)
        return parts

    def _gains(self, point: Point) -> str:
        gain = self.gain(point)
        if gain.low <= 0 <= gain.high:
            return f"is about as fast [{gain.low:+.0%}, {gain.high:+.0%}]"
        low, high = sorted((abs(gain.low), abs(gain.high)))
        verb = "gains" if gain.value > 0 else "costs"
        return f"{verb} {abs(gain.value):.0%} [{low:.0%}, {high:.0%}] of requests/s"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the heads and the lines of the table."""
        at = "" if self.load is None else f" at {self.load:g} {LOADS['server'][1]}"
        heads = ["#", _lower(self.axis.title)]
        for text in self.figures.values():
            heads += [text, f"change of {text}"]
        heads += ["requests/s", "change of requests/s", "J/request offline", f"p99{at}, ms", f"J/request{at}"]
        lines = [self._line(point) for point in self.points]
        kept = [
            i for i, head in enumerate(heads) if "J/request" not in head or any(line[i] != MISSING for line in lines)
        ]
        return [heads[i] for i in kept], [[line[i] for i in kept] for line in lines]

    def _line(self, point: Point) -> list[str]:
        server = self.server(point)
        numbers = [point.row.number, *([server.number] if server else [])]
        line = [", ".join(map(str, numbers)), self.text(point) + (" (base)" if point is self.base else "")]
        for name in self.figures:
            value, change = point.quality(name), self.change(point, name)
            line.append(f"{value.value:.4f} [{value.low:.4f}, {value.high:.4f}]")
            line.append(_unless(point is self.base, f"{change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"))
        (rate, *ends), gain = point.speed, self.gain(point)
        line.append(with_interval(rate, ends))
        line.append(
            _unless(
                not self.comparable(point) or point is self.base,
                f"{gain.value:+.0%} [{gain.low:+.0%}, {gain.high:+.0%}]",
            )
        )
        line.append(_joules(point.row.record))
        return [*line, *([_p99(server.record), _joules(server.record)] if server else [MISSING] * 2)]

    def chart(self, number: int) -> Chart:
        """Return the headline figure against requests/s, each with its interval."""
        name, text = next(iter(self.figures.items()))
        series = []
        for colour, (label, points) in enumerate((("base", [self.base]), ("others", self.others))):
            qualities, speeds = [point.quality(name) for point in points], [point.speed for point in points]
            series.append(
                Series(
                    label,
                    [value for value, _, _ in speeds],
                    [quality.value for quality in qualities],
                    [quality.low for quality in qualities],
                    [quality.high for quality in qualities],
                    [self.text(point) for point in points],
                    [point.row.name for point in points],
                    colour,
                    x_low=[low for _, low, _ in speeds],
                    x_high=[high for _, _, high in speeds],
                )
            )
        y = f"{text} with 95% interval over users"
        return Chart(
            f"quality_{number}", self.title, "offline requests/s with 95% interval (log)", y, series, log_x=True
        )

    @property
    def rows(self) -> list[Row]:
        """The rows of the page that the table has."""
        return [row for point in self.points for row in (point.row, self.server(point)) if row is not None]


def change(base: Point, point: Point, name: str) -> Estimate:
    """Return the figure of a point less that of the base, over pairs of resamples."""
    return estimate_of(point.quality(name).value - base.quality(name).value, point.drawn[name] - base.drawn[name])


def tradeoffs(rows: Sequence[Row]) -> list[Tradeoff]:
    """Return each axis along which OK cells with resamples differ from their base, by task in the order of the rows."""
    stars: dict[str, list[Point]] = {}
    for point in points(rows):
        stars.setdefault(_key(point.row.record, axes=False), []).append(point)
    found = []
    for star in stars.values():
        its = sorted(star, key=lambda point: point.row.record.started_at)  # of equal ones the first is the base
        base = max(its, key=lambda point: sum(_axis(point, other) is not None for other in its))
        for axis in AXES:
            name = next(iter(axis.figures(str(base.row.record.spec["task"]))))
            both = [point for point in its if name in base.drawn and name in point.drawn]
            if others := [point for point in both if _axis(base, point) is axis]:
                ordered = sorted([base, *others], key=lambda point: axis.place(point.row.record))
                found.append(Tradeoff(axis, base, ordered))
    return found


def _lower(title: str) -> str:
    """Return a title for the middle of a sentence: `beam width`, and `KV cache` as it is."""
    return title if title[:2].isupper() else title[0].lower() + title[1:]


def points(rows: Sequence[Row]) -> list[Point]:
    """Return the OK offline cells with quality and its resamples, each with the cells of its server."""
    ok = [row for row in rows if has_speed(row.record)]
    servers: dict[str, dict[float, Row]] = {}
    for row in ok:
        if (load := offered_load(row.record)) is not None and scenario_of(row.record) == "server":
            servers.setdefault(_key(row.record), {}).setdefault(load, row)  # rows are best first
    found = []
    for row in ok:
        drawn = _resamples(row) if scenario_of(row.record) == "offline" else {}
        if drawn:
            found.append(Point(row, drawn, servers.get(_key(row.record), {})))
    return found


def _resamples(row: Row) -> dict[str, Floats]:
    """Return the resamples beside a record that its task is compared by; {} without any that can be read."""
    path = row.folder / RESAMPLES_FILE
    if not path.is_file():
        return {}
    from grbench.report.frame import ReportError, load_columns

    try:
        table = load_columns(path)
    except ReportError:  # the page has a note on the file
        return {}
    task = row.record.spec["task"]
    names = [name for name in FIGURES[task] | (POPULAR if task == "rank" else {}) if name in table]
    return {name: table[name].to_numpy() for name in names if f"quality/{name}" in row.record.metrics}


def _key(record: RunRecord, axes: bool = True) -> str:
    """Return a key of all that a cell was asked except the load, and without `axes` except the choices too."""
    task = str(record.spec.get("task"))
    left = {
        key: shown(value)
        for key, value in options_of(record).items()
        if key.split(".")[0] not in ("scenario", "gate", "latency_limit_ms", "warmup_batches")
        and (axes or not any(axis.options(task, key) for axis in AXES))
    }
    asked = {} if axes else record.spec["gate"]["quality_requests"]
    code = [record.environment.get(name) for name in ("git_sha", "code")]
    servers = max(1, servers_of(record))  # several share the requests: their speed is not that of an engine
    where = [machine_of(record.environment), code, record.actual.get("device"), servers]
    return json.dumps([left, asked, *where], sort_keys=True)


def _axis(base: Point, other: Point) -> Axis | None:
    """Return the one axis in which two points differ, or None."""
    task = str(base.row.record.spec["task"])
    ours, theirs = (options_of(point.row.record) for point in (base, other))

    def differs(axis: Axis) -> bool:
        keys = {key for key in (*ours, *theirs) if axis.options(task, key)}
        return any(shown(ours.get(key)) != shown(theirs.get(key)) for key in keys)

    different = [axis for axis in AXES if differs(axis)]
    return different[0] if len(different) == 1 else None


def _p99(record: RunRecord) -> str:
    """Return p99 with its interval, or the rate of a server that did not keep up."""
    if overloaded(record.metrics):
        return f"overloaded: {figure(record.metrics['throughput_rps'])}/s"
    return with_interval(record.metrics.get("latency_ms/p99"), record.intervals.get("latency_ms/p99"))


def _joules(record: RunRecord) -> str:
    return with_interval(record.metrics.get(JOULES), record.intervals.get(JOULES))


def _unless(absent: bool, text: str) -> str:
    return MISSING if absent else text


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
