"""Comparison of two sets of cells: which of the new ones are faster, slower or not different.

A cell of one side is matched with the cell of the other that has the same configuration. Two kinds of options may
differ: the seed, whose values are repeats of one cell, and an option that has one value in all cells of one side and
another in all cells of the other, such as `kernel=torch` and `kernel=triton`. The latter are what is compared. A note
names those among them that say how much is measured and checked, such as `scenario.queries`.

A change is the ratio of the new value to the old. Its interval depends on the runs behind it:

- equal seeds on both sides: Student's t interval of the differences of logarithms, run by run;
- other runs, more than two in all: the t interval of two samples with one variance (pooled);
- one run on each side: a bootstrap of blocks of requests (Künsch, "The jackknife and the bootstrap for general
  stationary observations", Annals of Statistics 1989). It leaves out the differences between runs, and a note says so.

The sides must be measured in turn, and each of them first in every other pair. Then a drift of the machine favours
neither, and equal sides differ in at most about one comparison of twenty. No interval contains a drift between two
sides that were measured one after the other, and a note says so.

All intervals of one cell together hold with 95% confidence (Bonferroni).

No difference is a claim too: it needs an interval inside a margin (equivalence testing; Schuirmann, "A comparison of
the two one-sided tests procedure", 1987). An interval that has 1 in it and reaches beyond the margin decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grbench.execution import stats
from grbench.execution.environment import machine_of
from grbench.execution.records import RunRecord
from grbench.report.cells import GROUPS, Cell, counted, engine_name, figure, labels, named, number_of, shown
from grbench.report.frame import ReportError, load_samples
from grbench.report.repeats import RERUNS, pooled
from grbench.report.table import notes
from grbench.report.work import EMULATED, LOADS, emulated, has_speed, options_of

RESAMPLES = 1000
MARGIN = 0.05  # share within which a change is no difference
METRICS = {"offline": ("throughput_rps",), "closed_loop": ("throughput_rps", "latency_ms/p99")}
LATENCIES = ("latency_ms/p50", "latency_ms/p99")  # of every other scenario
IN_PLACE_OF = {"latency_ms/p99": "latency_ms/p90"}  # where there are too few samples
HIGHER_IS_BETTER = ("throughput_rps",)
EFFORT = ("scenario.queries", "warmup_batches")  # and those of the gate: how much is measured and checked
NOTHING_IN_COMMON = (
    "BASE and NEW have no configuration in common; what must be equal: all options but the seed and those that have "
    "one value in all cells of BASE and another one in all of NEW"
)
PARALLEL = "cells of runner.parallel have fewer cores each: they belong in a folder of their own (runner.output_root)"
APART = (
    "all runs of {} were measured before those of {}: a drift of the machine in between counts as a change, and no "
    "interval contains it; measure both with seed=0, then in the other order both with seed=1"
)
UNTIMED = "they have no rate and no latency to compare: scenario.mode=accuracy measures quality/loadgen/... alone"
SHARED = "{} on both sides: a measurement that is compared with itself never changes; check the paths of BASE and NEW"
ONE_RUN = "one run on each side: the interval leaves out differences between runs; runner.repeats=5 measures them"

Floats = npt.NDArray[np.float64]


class Verdict(StrEnum):
    """The direction of a change, as far as its interval says."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "no difference"
    UNDECIDED = "undecided"
    UNKNOWN = "not known"


@dataclass(frozen=True)
class Change:
    """One metric of one cell on both sides. `ratio`, `low` and `high` are new over base; NaN ends: no interval."""

    cell: str
    metric: str
    base: float  # requests/s or milliseconds, the geometric mean of the runs
    new: float
    ratio: float
    low: float
    high: float
    runs: tuple[int, int]

    def verdict(self, tolerance: float = 0.0, margin: float = MARGIN) -> Verdict:
        """Judge the change by its interval.

        It is SLOWER only if it is worse by more than `tolerance` (a share) for certain, FASTER if it is better for
        certain. Else it is SAME if the interval lies inside `margin` (a share, at least `tolerance`) on both sides of
        no change, and UNDECIDED if it does not.
        """
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return Verdict.UNKNOWN
        low, high = self.low, self.high
        if self.metric in HIGHER_IS_BETTER:
            low, high = 1 / high, 1 / low  # as times are
        if low > 1 + tolerance:
            return Verdict.SLOWER
        if high < 1:
            return Verdict.FASTER
        inside = 1 + max(margin, tolerance)
        return Verdict.SAME if 1 / inside <= low and high <= inside else Verdict.UNDECIDED


@dataclass
class Comparison:
    """All changes, what differs between the sides, and notes for the reader."""

    changes: list[Change] = field(default_factory=list)
    differing: dict[str, tuple[str, str]] = field(default_factory=dict)  # option: base, new
    notes: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> dict[str, tuple[str, str]]:
        """The options in `differing` that both sides have: an engine's own options follow from its name."""
        groups = {group for group in GROUPS if group in self.differing}
        return {
            key: sides for key, sides in self.differing.items() if all(sides) or key.partition(".")[0] not in groups
        }

    def counts(self, tolerance: float = 0.0, margin: float = MARGIN) -> dict[Verdict, int]:
        """Return how many changes have each verdict."""
        found = [change.verdict(tolerance, margin) for change in self.changes]
        return {verdict: found.count(verdict) for verdict in Verdict}


def compare(
    base: Sequence[Cell], new: Sequence[Cell], progress: Callable[[int, int], None] = lambda done, total: None
) -> Comparison:
    """Compare the OK cells of two sides, without those that have no speed to compare.

    progress: called with the cells that are compared and all of them, since each may take seconds of resampling. Cells
    of BASE count only if they are of NEW's machine. Raises ReportError if there are none, if the sides did
    different work, or if they have no configuration in common.
    """
    base = _of_one_machine(base, new)
    sides = [[cell for cell in side if not _no_speed(cell[1])] for side in (base, new)]
    for side, cells, name in zip((base, new), sides, ("BASE", "NEW"), strict=True):
        if not cells:
            reasons = dict.fromkeys(_no_speed(record) for _, record in side if record.ok)
            none = f"{name} has no OK cell to compare by speed, {number_of(len(side), 'cell')} in all"
            raise ReportError("; ".join([none, *reasons]))
    result = Comparison(differing=_differing(*sides))
    _require_same_work(result.differing)
    matched = [_by_configuration(side, result.differing) for side in sides]
    for name, side, own in zip(("BASE", "NEW"), sides, matched, strict=True):
        if replaced := len(side) - sum(map(len, own.values())):
            result.notes.append(RERUNS.format(counted(replaced, f"earlier {name} run")))
    common = [key for key in matched[0] if key in matched[1]]
    for name, side, own in (("BASE", base, matched[0]), ("NEW", new, matched[1])):
        if alone := [runs[0][1] for key, runs in own.items() if key not in common]:
            result.notes.append(
                f"{counted(len(alone), 'configuration')} in {name} alone and left out{which(alone, 'seed')}"
            )
        if failed := [record for _, record in side if not record.ok]:
            result.notes.append(f"{counted(len(failed), f'{name} cell')} not OK and left out{which(failed)}")
        for reason in (UNTIMED, EMULATED):
            if some := [record for _, record in side if record.ok and _no_speed(record) == reason]:
                result.notes.append(f"{counted(len(some), f'{name} cell')} left out, because {reason}{which(some)}")
    if not common:
        raise ReportError(NOTHING_IN_COMMON)
    names = _names([(matched[0][key][0][1], matched[1][key][0][1]) for key in common], ["seed", *result.differing])
    for done, (key, name) in enumerate(zip(common, names, strict=True)):
        progress(done, len(common))
        result.changes += _changes(name, matched[0][key], matched[1][key], result.notes)
    result.notes = list(dict.fromkeys(result.notes))  # a file is named once, and not for each metric
    result.notes += _notes_of_cells(
        *([(name, own[key]) for key, name in zip(common, names, strict=True)] for own in matched)
    )
    runs = [[record for key in common for _, record in own[key]] for own in matched]
    if shared := sum(record in runs[1] for record in runs[0]):
        result.notes.append(SHARED.format(counted(shared, "record")))
    if effort := [key for key in result.differing if key in EFFORT or key.startswith("gate.")]:
        result.notes.append(f"the sides differ in how much is measured or checked: {', '.join(effort)}")
    if any(change.runs == (1, 1) for change in result.changes):
        result.notes.append(ONE_RUN)
    orders = {key: _apart(matched[0][key], matched[1][key]) for key in common}
    for order in dict.fromkeys(filter(None, orders.values())):
        apart = [name for key, name in zip(common, names, strict=True) if orders[key] == order]
        result.notes.append(APART.format(*order) + (f": {named(apart)}" if len(common) > 1 else ""))
    return result


def _names(pairs: Sequence[tuple[RunRecord, RunRecord]], ignore: Sequence[str]) -> list[str]:
    """Return the names of cells, each with the engines of BASE and NEW where these are two.

    ignore: options that are no part of a name.
    """
    engines = [[engine_name(record.spec) for record in pair] for pair in pairs]
    names = [engines[0][0]] if len(pairs) == 1 else labels([base for base, _ in pairs], ignore)
    found = []
    for name, (base, new) in zip(names, engines, strict=True):
        rest = f"{name} ".removeprefix(f"{base} ").rstrip()  # with the space, since hstu may begin another name
        found.append(name if base == new else f"{base} -> {new} {rest}".rstrip())
    return found


def _notes_of_cells(*sides: Sequence[tuple[str, Sequence[Cell]]]) -> list[str]:
    """Return the notes of the named cells of BASE and NEW, each once, with the cells that have it.

    Not those on intervals of records: a change has an interval of its own, or a note that says why not.
    """
    records, names = [], []
    for side, cells in zip(("BASE", "NEW"), sides, strict=True):
        for name, runs in cells:
            rows = pooled([record for _, record in runs])
            records += rows
            names += [f"{side} {name}"] * len(rows)
    return [note for note in notes(records, names) if stats.NO_INTERVAL not in note]


def _no_speed(record: RunRecord) -> str:
    """Return why a cell, if it is OK, has no speed to compare; "" if it has one."""
    if not has_speed(record):
        return UNTIMED
    return EMULATED if emulated(record) else ""


def _apart(base: Sequence[Cell], new: Sequence[Cell]) -> tuple[str, str] | None:
    """Return the names of the sides, the earlier one first, if one was measured before the other; None: in turn.

    Of one run a side the order says nothing: another note says that its interval leaves out differences between runs.
    """
    if len(base) == len(new) == 1:
        return None
    starts = [[record.started_at for _, record in side] for side in (base, new)]
    if max(starts[0]) < min(starts[1]):
        return "BASE", "NEW"
    return ("NEW", "BASE") if max(starts[1]) < min(starts[0]) else None


def _of_one_machine(base: Sequence[Cell], new: Sequence[Cell]) -> list[Cell]:
    """Return the cells of `base` that were measured on the machine of `new`. Raises ReportError."""
    before, now = ([machine_of(record.environment) for _, record in side] for side in (base, new))
    if not now:
        return list(base)
    if len(set(now)) > 1:
        raise ReportError(f"NEW was measured on different machines: {'; '.join(dict.fromkeys(now))}{_hint(new)}")
    kept = [cell for cell, machine in zip(base, before, strict=True) if machine in now]
    if not kept:
        raise ReportError(
            f"BASE was measured on {'; '.join(dict.fromkeys(before))} and NEW on {now[0]}: "
            f"times of different machines do not compare; measure BASE on this one{_hint([*base, *new])}"
        )
    return kept


def _hint(cells: Sequence[Cell]) -> str:
    """Return the likely reason why machines differ if they do so in nothing but their cores, else ""."""
    others = {machine_of(record.environment | {"cpu_cores": None}) for _, record in cells}
    return f"; {PARALLEL}" if len(others) == 1 else ""


def _differing(base: Sequence[Cell], new: Sequence[Cell]) -> dict[str, tuple[str, str]]:
    """Return the options that have one value in all cells of a side and another one in all of the other."""
    values: list[dict[str, set[str]]] = []
    for side in (base, new):
        specs = [options_of(record) for _, record in side]
        options = {key for spec in specs for key in spec}
        values.append({key: {shown(spec.get(key, "")) for spec in specs} for key in options})
    keys = sorted((values[0].keys() | values[1].keys()) - {"seed"})
    found = {key: (values[0].get(key, {""}), values[1].get(key, {""})) for key in keys}
    return {k: (min(a), min(b)) for k, (a, b) in found.items() if len(a) == len(b) == 1 and a != b}


def _require_same_work(differing: dict[str, tuple[str, str]]) -> None:
    loads = {f"scenario.{option}" for option, _ in LOADS.values() if option}
    for key, (base, new) in differing.items():
        if key in ("task", "scenario", "retrieval.k", *loads) or key.split(".")[0] == "workload":
            raise ReportError(f"{key} is {base or 'absent'} in BASE and {new or 'absent'} in NEW: not the same work")


def _by_configuration(side: Sequence[Cell], differing: dict[str, tuple[str, str]]) -> dict[str, list[Cell]]:
    """Group cells by all options but the seed and those that differ between the sides, runs by seed.

    Of several runs with one seed the latest counts.
    """
    groups: dict[str, dict[int, Cell]] = {}
    for cell in sorted(side, key=lambda cell: (cell[1].spec.get("seed", 0), cell[1].started_at)):
        spec = {k: shown(v) for k, v in options_of(cell[1]).items() if k != "seed" and k not in differing}
        groups.setdefault(str(sorted(spec.items())), {})[cell[1].spec.get("seed", 0)] = cell
    return {key: list(runs.values()) for key, runs in groups.items()}


def which(records: Sequence[RunRecord], *ignore: str) -> str:
    """Return the names of cells that a note counts, behind a colon, with their status if they are not OK.

    ignore: options that are no part of a name.
    """
    names = labels(records, ignore)
    return f": {named([n if r.ok else f'{n} ({r.status})' for n, r in zip(names, records, strict=True)])}"


def _changes(name: str, base: Sequence[Cell], new: Sequence[Cell], notes: list[str]) -> list[Change]:
    """Return the changes of one cell. notes: takes a line on samples that can't be read or are worth too few."""
    runs = [record for _, record in (*base, *new)]
    wanted = METRICS.get(str(runs[0].spec["scenario"]["name"]), LATENCIES)
    metrics = []
    for metric in wanted:
        if any(metric not in record.metrics for record in runs):
            metric = IN_PLACE_OF.get(metric, metric)
        if all(metric in record.metrics for record in runs):
            metrics.append(metric)
    confidence = 1 - (1 - stats.CONFIDENCE) / max(len(metrics), 1)
    return [_change(name, metric, base, new, confidence, notes) for metric in metrics]


def _change(
    name: str, metric: str, base: Sequence[Cell], new: Sequence[Cell], confidence: float, notes: list[str]
) -> Change:
    values = [np.array([record.metrics[metric] for _, record in side]) for side in (base, new)]
    seeds = [[record.spec.get("seed") for _, record in side] for side in (base, new)]
    if len(base) == len(new) == 1:
        ratio, (low, high) = values[1][0] / values[0][0], (math.nan, math.nan)
        try:
            low, high = _within_runs(metric, base[0][0], new[0][0], seeds[0] == seeds[1], confidence)
        except ReportError as e:
            notes.append(f"{name} lacks an interval: {e}")
    else:
        middle, half = t_interval(np.log(values[0]), np.log(values[1]), seeds[0] == seeds[1], confidence)
        ratio, low, high = math.exp(middle), math.exp(middle - half), math.exp(middle + half)
    means = [math.exp(np.log(side).mean()) for side in values]  # geometric, whose ratio is the change
    return Change(name, metric, means[0], means[1], float(ratio), low, high, (len(base), len(new)))


def t_interval(base: Floats, new: Floats, paired: bool, confidence: float) -> tuple[float, float]:
    """Return the mean of new minus base ([runs], at least three in all) and half the width of its t interval."""
    from scipy.special import stdtrit

    if paired:
        differences = new - base
        free, error = len(differences) - 1, differences.std(ddof=1) / math.sqrt(len(differences))
    else:
        free = len(base) + len(new) - 2
        squares = ((base - base.mean()) ** 2).sum() + ((new - new.mean()) ** 2).sum()
        error = math.sqrt(squares / free * (1 / len(base) + 1 / len(new)))
    return float(new.mean() - base.mean()), float(stdtrit(free, (1 + confidence) / 2) * error)


def _within_runs(metric: str, base: Path, new: Path, paired: bool, confidence: float) -> tuple[float, float]:
    """Return the interval of the ratio of a percentile from the requests of one run a side; NaN of another metric.

    Raises ReportError for samples that can't be read, and for those that are worth too few independent ones: their few
    blocks would be drawn again and again, and the interval would be far too narrow.
    """
    if metric in HIGHER_IS_BETTER:
        return math.nan, math.nan
    tables = [load_samples(folder).sort_values("arrival_s", kind="stable") for folder in (base, new)]
    latencies = [table["latency_ms"].to_numpy() for table in tables]
    blocks = []
    percent = float(metric.rpartition("/p")[2])
    for side, table, values in zip(("BASE", "NEW"), tables, latencies, strict=True):
        groups = np.unique(table["arrival_s"], return_inverse=True)[1]
        worth, needed = stats.independent_samples(values, groups, percent), stats.samples_for_interval(percent)
        if worth < needed:
            enough = stats.requests_for_interval(len(values), worth, percent)
            raise ReportError(
                f"p{percent:g} needs {needed} independent samples, and {len(values)} requests of {side} are worth "
                f"about {worth}; scenario.queries={enough} is about enough"
            )
        blocks.append(math.ceil(len(values) / worth))
    same = paired and np.array_equal(tables[0]["request_id"], tables[1]["request_id"])
    return bootstrap_interval(latencies[0], latencies[1], percent, max(blocks), same, confidence)


def bootstrap_interval(
    base: Floats, new: Floats, percent: float, block: int, paired: bool, confidence: float
) -> tuple[float, float]:
    """Return the interval of the ratio (new over base) of a percentile from resampled blocks of requests.

    base, new: [requests] milliseconds in order of arrival. block: requests in a block. paired: the requests are the
    same on both sides, and so are the blocks that are drawn.
    """
    rng = np.random.default_rng(0)
    ratios = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        chosen = _blocks(rng, len(base), block)
        other = chosen if paired else _blocks(rng, len(new), block)
        ratios[i] = stats.percentile(new[other], percent) / stats.percentile(base[chosen], percent)
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _blocks(rng: np.random.Generator, count: int, block: int) -> npt.NDArray[np.intp]:
    starts = rng.integers(count, size=-(-count // block))
    return ((starts[:, None] + np.arange(block)) % count).ravel()[:count]


def change_text(change: Change) -> str:
    """Return a change as "+3.1% [+1.0, +5.2]", without the brackets if there is no interval."""
    percent = [100 * (value - 1) for value in (change.ratio, change.low, change.high)]
    text = f"{percent[0]:+.1f}%"
    return text if math.isnan(percent[1]) else f"{text} [{percent[1]:+.1f}, {percent[2]:+.1f}]"


def side_text(change: Change) -> tuple[str, str]:
    """Return both values with their unit."""
    unit = " requests/s" if change.metric in HIGHER_IS_BETTER else " ms"
    return f"{figure(change.base)}{unit}", f"{figure(change.new)}{unit}"
