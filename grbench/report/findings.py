"""Rankings of comparable cells, with one sentence for each.

Two cells are comparable if they did the same work on the same machine: one task, one trace, one scenario, one
latency limit. Among them

- `offline` cells are ranked by throughput;
- cells of another scenario at one offered load are ranked by the highest percentile that all of them have;
- cells at several loads are ranked by the highest load at which the upper end of p99's 95% interval keeps the limit,
  and those at one of these loads by latency, as above.

Cells that differ only in their seed are repeats of one strategy, and its interval has the spread between them. A run
with the same seed and options replaces the one before it. A single offline run of less than a second is not ranked,
and neither are cells whose products are emulated.
A difference counts only if the intervals do not overlap.

Where a cell measured one server and another several of the same strategies, offline or with a fixed number of clients
each, the sentence has the scaling efficiency: the rate of several over that of one, for each server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from grbench.execution.records import RunRecord
from grbench.execution.stats import PERCENTILES, SHORTEST_S, WORTH, overloaded, requests_for_interval, surely_beyond
from grbench.report.cells import figure, flatten, knobs, labels, named, short_paths, shown, with_interval
from grbench.report.repeats import P99_NEEDS, estimate, latest_by_seed, pooled, ranking_percentile
from grbench.report.work import (
    EMULATED,
    LOADS,
    emulated,
    has_speed,
    model_of,
    offered_load,
    scenario_of,
    served_by,
    servers_of,
    strategy_of,
    unit_of,
    work_of,
)

P99 = "latency_ms/p99"


@dataclass(frozen=True)
class Estimate:
    """One strategy at one load: the mean of its repeats and the 95% interval over them."""

    label: str
    records: tuple[RunRecord, ...]
    value: float  # requests/s, or milliseconds
    interval: tuple[float, float] | None  # a single offline run has none

    def overlaps(self, other: Estimate) -> bool:
        """Return whether the intervals leave open which is better. A single offline run has only its value."""
        (low, high), (other_low, other_high) = self._ends, other._ends
        return low <= other_high and other_low <= high

    @property
    def _ends(self) -> tuple[float, float]:
        return self.interval or (self.value, self.value)

    def __str__(self) -> str:
        return with_interval(self.value, self.interval)

    @property
    def too_short(self) -> bool:
        """True for one run that took too little time to count."""
        took = (record.metrics.get("duration_s", SHORTEST_S) for record in self.records)
        return self.interval is None and min(took) < SHORTEST_S

    @property
    def runs(self) -> str:
        """The number of runs behind it, if there are several."""
        return f" ({len(self.records)} runs)" if len(self.records) > 1 else ""


@dataclass(frozen=True)
class Finding:
    """Result of one group of comparable cells: the best strategy and one sentence."""

    best: tuple[RunRecord, ...]  # repeats of the best strategy
    sentence: str


def findings(records: Sequence[RunRecord]) -> list[Finding]:
    """Return one finding for each group of comparable OK cells that measured speed, in the order of the records."""
    groups = comparable([record for record in records if has_speed(record)])
    found = [_finding(group) for group in groups]
    work = work_names([group[0] for group in groups])
    if len(set(work)) > 1:  # a reader must know which trace a sentence is about
        return [Finding(one.best, f"{name}: {one.sentence}") for one, name in zip(found, work, strict=True)]
    return found


def comparable(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Return groups of records that did the same work on the same machine, in the order of their first record."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(work_of(record), []).append(record)
    return list(groups.values())


def work_names(records: Sequence[RunRecord]) -> list[str]:
    """Return what each record worked on, as "hstu_tiny on ml_100k".

    Where two records differ in options of the workload, in k or in the limit, these options follow.
    """
    names = [f"{model_of(record)} on {record.spec['workload']['name']}" for record in records]
    for name in set(names):
        alike = [i for i, other in enumerate(names) if other == name]
        those = [records[i] for i in alike]
        keys = [
            key for key in knobs(those) if key.startswith("workload.") or key in ("retrieval.k", "latency_limit_ms")
        ]
        specs = [flatten(record.spec) for record in those]
        short = {key: short_paths({shown(spec[key]) for spec in specs if key in spec}) for key in keys}
        for i, spec in zip(alike, specs, strict=True):
            for key in keys:
                if key in spec:
                    names[i] += f" {key.rpartition('.')[2]}={short[key].get(text := shown(spec[key]), text)}"
        contents = {key: {record.files.get(key) for record in those} for record in those for key in record.files}
        for i, record in zip(alike, those, strict=True):  # files of one path
            found = (record.files[key] for key in sorted(record.files) if key.startswith("workload."))
            differs = any(len(contents[key]) > 1 for key in contents if key.startswith("workload."))
            names[i] += "".join(f" sha256:{digest[:8]}" for digest in found if differs)
    return names


def limit_verdict(record: RunRecord) -> str:
    """Return "yes" if p99 keeps `latency_limit_ms`, "no" if not, or "unsure" if its interval does not tell.

    A smaller percentile that is surely beyond the limit says "no" too, and so does a growing queue whose median is
    beyond it. Without a limit or a p99 the verdict is "-".
    """
    limit = record.spec.get("latency_limit_ms")
    p99 = record.metrics.get("latency_ms/p99") if record.ok else None
    if scenario_of(record) == "offline" or limit is None or p99 is None:
        return "-"
    _, high = record.intervals.get("latency_ms/p99", [0.0, float("inf")])
    if high <= limit:
        return "yes"
    behind = overloaded(record.metrics) and record.metrics["latency_ms/p50"] > limit
    return "no" if behind or surely_beyond(record.intervals, 99.0, limit) else "unsure"


def _finding(group: list[RunRecord]) -> Finding:
    slow = [label for label, runs in _strategies(group).items() if emulated(runs[0])]
    if not slow:
        return _by_speed(group)
    why = f"{named(slow)} {'is' if len(slow) == 1 else 'are'} not ranked by speed, because {EMULATED}."
    real = [record for record in group if not emulated(record)]
    if not real:
        return Finding((), why)
    found = _by_speed(real)
    return Finding(found.best, f"{found.sentence} {why}")


def _by_speed(group: list[RunRecord]) -> Finding:
    if scenario_of(group[0]) == "offline":
        found = _highest_throughput(group)
    elif len({offered_load(record) for record in group}) == 1:
        found = _lowest_latency(_strategies(group), _why_not_p99)
    else:
        found = _highest_load(group)
    return Finding(found.best, " ".join([found.sentence, *_scaling(group)]))


def _scaling(group: Sequence[RunRecord]) -> Iterator[str]:
    """Yield the scaling efficiency of each number of servers that was measured beside one server."""
    if scenario_of(group[0]) not in ("offline", "closed_loop"):  # elsewhere the rate is what was asked for
        return
    measured: dict[str, dict[int, list[RunRecord]]] = {}  # by what is served, and by the number of servers
    for record in group:
        if servers := servers_of(record):
            measured.setdefault(served_by(record), {}).setdefault(servers, []).append(record)
    for runs in measured.values():
        rates = {n: estimate(_latest(those), "throughput_rps")[0] for n, those in sorted(runs.items())}
        for n, rate in rates.items():
            if n > 1 and (one := rates.get(1)):
                yield (
                    f"{n} servers answer {figure(rate / one)} times as many requests/s as one: a scaling efficiency of "
                    f"{rate / one / n:.0%}."
                )


def _highest_throughput(group: list[RunRecord]) -> Finding:
    ranked = [_estimate(label, runs, "throughput_rps") for label, runs in _strategies(group).items()]
    best, *others = sorted(ranked, key=lambda e: -e.value)
    if others and (short := [e for e in ranked if e.too_short]):
        names = ", ".join(e.label for e in short[:3]) + (f" and {len(short) - 3} more" if len(short) > 3 else "")
        why = f"{names} ran for less than {SHORTEST_S:g} s: raise scenario.queries or set runner.repeats=5"
        return Finding((), f"Offline, nothing is ranked, because {why}.")
    if not others:
        return Finding(best.records, f"Offline, {best.label} answers {best} requests/s{best.runs}.")
    first = _ties(best, others) or f"{best.label} is fastest"
    single = "" if any(e.interval for e in ranked) else " (one run each; runner.repeats=5 gives intervals)"
    return Finding(best.records, f"Offline, {first}: {best} requests/s{best.runs}{_next(others, best)}{single}.")


def _lowest_latency(
    strategies: dict[str, list[RunRecord]], why_not_p99: Callable[[Sequence[RunRecord]], str] = lambda group: ""
) -> Finding:
    """Rank strategies at one load. why_not_p99: returns what follows where another percentile ranks them."""
    group = [run for runs in strategies.values() for run in runs]
    percentile = ranking_percentile(group)
    ranked = [_estimate(label, runs, f"latency_ms/{percentile}") for label, runs in strategies.items()]
    best, *others = sorted(ranked, key=lambda e: e.value)
    where = (
        f"In {scenario_of(group[0])}"
        if (load := offered_load(group[0])) is None
        else f"At {load:g} {unit_of(group[0])}"
    )
    # The limit is one of p99.
    limit = _against_limit(best, group[0].spec.get("latency_limit_ms")) if percentile == "p99" else ""
    why = "" if percentile == "p99" else why_not_p99(group)
    if not others:
        return Finding(best.records, f"{where}, {best.label} has a {percentile} of {best} ms{best.runs}{limit}{why}.")
    ties = _ties(best, others)
    first = f"by {percentile}, {ties}" if ties else f"{best.label} has the lowest {percentile}"
    return Finding(best.records, f"{where}, {first}: {best} ms{best.runs}{limit}{_next(others, best, ' ms')}{why}.")


def _why_not_p99(group: Sequence[RunRecord]) -> str:
    """Return why another percentile ranks the cells of a group."""
    cells = pooled(group)
    lack = sum("latency_ms/p99" not in cell.intervals for cell in cells)
    who = "this cell lacks" if len(cells) == 1 else f"{lack} of {len(cells)} cells lack"
    return f"; a p99 with an interval needs {P99_NEEDS}, which {who}"


def _highest_load(group: list[RunRecord]) -> Finding:
    limit = group[0].spec.get("latency_limit_ms")
    limit_ms = float("inf") if limit is None else float(limit)
    unit = unit_of(group[0])
    strategies = _strategies(group)
    loads = _at_loads(strategies)
    cells = [(load, label, runs) for load, those in loads.items() for label, runs in those.items()]
    every = [
        (load, _estimate(label, runs, P99)) for load, label, runs in cells if all(P99 in run.metrics for run in runs)
    ]
    every.sort(key=lambda pair: (-pair[0], pair[1].value))
    kept: dict[str, tuple[float, Estimate]] = {}  # of each strategy the highest load that keeps the limit
    for load, one in every:
        if one.interval and one.interval[1] <= limit_ms:
            kept.setdefault(one.label, (load, one))
    within = f"p99 within {limit_ms:g} ms" if limit is not None else "a p99"
    rest = "".join(f" {_lowest_latency(those).sentence}" for _, those in sorted(loads.items()) if len(those) > 1)
    short = [(load, runs) for load, _, runs in cells if not _has_p99(runs)]
    if len(short) == len(cells):
        enough = _enough_for_p99(runs for _, runs in short)
        text = (
            f"In {scenario_of(group[0])}, the requests of every cell are too few for a p99 with an interval: {enough}"
        )
        return Finding((), f"{text}.{rest}")
    if not kept:
        text = f"In {scenario_of(group[0])}, no cell has {within} for certain"
        if near := next(((load, e) for load, e in every if limit is not None and e.value <= limit_ms), None):
            load, best = near
            interval = "" if best.interval else " without an interval"
            text += f"; nearest is {best.label} at {load:g} {unit} (p99 {best} ms{interval})"
            text += ": raise scenario.queries or set runner.repeats=5"
        return Finding((), f"{text}{_too_few([runs for _, runs in short], len(cells), 'cells')}.{rest}")
    (load, best), *others = kept.values()
    equal = [estimate for other, estimate in others if other == load]
    lower = [(other, estimate) for other, estimate in others if other < load]
    text = f"{_ties(best, equal) or best.label}: the highest load with {within} is {load:g} {unit}"
    text += f" (p99 {best} ms{best.runs.replace('(', 'over ').rstrip(')')})"
    if lower:
        text += f"; next is {lower[0][1].label} with {lower[0][0]:g}"
    higher = [runs for other, runs in short if other > load]  # they may keep the limit too
    text += _too_few(higher, sum(other > load for other, _, _ in cells), "cells at higher loads")
    return Finding(best.records, f"In {scenario_of(group[0])}, {text}.{rest}")


def _too_few(cells: Sequence[Sequence[RunRecord]], total: int, noun: str) -> str:
    """Return the clause on cells, of `total`, that have no p99 with an interval; "" if there are none."""
    if not cells:
        return ""
    have = "has" if len(cells) == 1 else "have"
    return f"; {len(cells)} of {total} {noun} {have} too few requests for an interval: {_enough_for_p99(cells)}"


def _at_loads(strategies: dict[str, list[RunRecord]]) -> dict[float, dict[str, list[RunRecord]]]:
    """Return by load the runs of each strategy."""
    loads: dict[float, dict[str, list[RunRecord]]] = {}
    for label, runs in strategies.items():
        for run in runs:
            loads.setdefault(offered_load(run) or 0.0, {}).setdefault(label, []).append(run)
    return loads


def _has_p99(runs: Sequence[RunRecord]) -> bool:
    """Return whether the runs of a cell have a p99 with an interval together."""
    return all(P99 in run.metrics for run in runs) and estimate(runs, P99)[1] is not None


def _enough_for_p99(cells: Iterable[Sequence[RunRecord]]) -> str:
    """Return about how many requests give the p99 of each of these cells an interval, in words."""
    return f"scenario.queries={max(_needs_for_p99(run) for runs in cells for run in runs)} is about enough"


def _needs_for_p99(record: RunRecord) -> int:
    metrics = record.metrics
    worth = [metrics[name] for p in PERCENTILES if (name := f"latency_ms/p{p:g}{WORTH}") in metrics]
    if "samples" in metrics and worth:
        return requests_for_interval(int(metrics["samples"]), int(min(worth)), 99.0)
    return requests_for_interval(1, 1, 99.0)  # at least: an earlier version's record does not say what they are worth


def _strategies(group: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Group records by strategy, which is everything except seed and load. The keys are names without the work."""
    strategies: dict[str, list[RunRecord]] = {}
    for record in group:
        strategies.setdefault(strategy_of(record), []).append(record)
    strategies = {key: _latest(runs) for key, runs in strategies.items()}
    first = [runs[0] for runs in strategies.values()]
    work = [key for record in first for key in flatten(record.spec) if key.split(".")[0] == "workload"]
    loads = [f"scenario.{option}" for option, _ in LOADS.values() if option]
    study = ["study", "case"] if len(first) == 1 else []  # it names no strategy, but what is measured
    names = labels(first, ["seed", "scenario", "scenario.queries", *loads, *work, *study])
    return dict(zip(names, strategies.values(), strict=True))


def _latest(runs: Sequence[RunRecord]) -> list[RunRecord]:
    loads: dict[float | None, list[RunRecord]] = {}
    for run in runs:
        loads.setdefault(offered_load(run), []).append(run)
    return [run for at_load in loads.values() for run in latest_by_seed(at_load)]


def _estimate(label: str, runs: Sequence[RunRecord], metric: str) -> Estimate:
    return Estimate(label, tuple(runs), *estimate(runs, metric))


def _ties(best: Estimate, others: Sequence[Estimate]) -> str:
    """Name the strategies that the intervals do not separate from the best; "" if there are none."""
    tied = [e for e in others if best.overlaps(e)]
    if not tied:
        return ""
    names = ", ".join(e.label for e in tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
    return f"{best.label} leads, but not beyond the 95% intervals of {names}"


def _next(others: Sequence[Estimate], best: Estimate, unit: str = "") -> str:
    clear = [e for e in others if not best.overlaps(e)]
    return f"; next is {clear[0].label} with {clear[0]}{unit}" if clear else ""


def _against_limit(best: Estimate, limit: float | None) -> str:
    if limit is None:
        return ""
    if all(limit_verdict(run) == "no" for run in best.records) or (best.interval and best.interval[0] > limit):
        return f", over the limit of {limit:g} ms"
    if best.interval is None:
        return f"; without an interval, the limit of {limit:g} ms is not decided"
    if best.interval[1] <= limit:
        return f", within the limit of {limit:g} ms"
    return f"; the limit of {limit:g} ms is in its interval"
