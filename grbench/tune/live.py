"""The evaluator that measures: every probe is an ordinary cell of a sweep, with a record."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grbench.config.compose import compose_spec
from grbench.config.jobs import Job
from grbench.config.schema import RunConfig, RunSpec
from grbench.execution import records
from grbench.execution.clock import SILENCE_S
from grbench.execution.earlier import environment_difference
from grbench.execution.environment import describe_environment
from grbench.execution.load import BESIDE
from grbench.execution.records import RunRecord, Status
from grbench.execution.session import CellSession
from grbench.report.work import EMULATED, emulated
from grbench.tune import certification, rates
from grbench.tune.certification import MOST
from grbench.tune.config import RATES, Declared
from grbench.tune.outcome import UNJUDGED, BudgetSpentError, Configuration, Outcome, Probe, Wanted
from grbench.tune.probes import OFFLINE
from grbench.tune.quality import Qualities
from grbench.tune.starts import FIRST_S, Starts
from grbench.tune.worth import pooled, worst, worth_of_a_request
from grbench.workloads.config import RecordedConfig

BATCHING = ("max_batch", "max_wait_ms", "in_flight", "order")  # options that every scenario has
AGAIN_S, OFFLINE_S = 3.0, 3.0  # of a cell beside its measurement with a kept engine, until measured; of an offline one
CELL_SHARE, SHORTEST_S = 0.5, 120.0  # time limit of a cell: a share of the time budget, and at least this
# The same of an offline probe, which is most of all the start of an engine. A certification needs two further starts.
# The default has the time of a cell: it is the likeliest to run, and on a fresh machine it compiles what others share.
FIRST_SHARE, FIRST_SHORTEST_S = 0.2, 45.0
# Of a time budget: a start may take longer than those before, and what is nearly certified is not given up.
GRACE = 0.05
KNOWN_FAILURES = (Status.OOM, Status.INCORRECT, Status.UNAVAILABLE, Status.STOPPED)  # as good as a measurement
PROBED_ANSWERS = 32  # of a probe that are compared with the reference; a run that certifies compares gate.measured
VALID = "loadgen_valid"  # metric: LoadGen's verdict by the limit of the cell
STARTED = "step_s/start"  # metric of a cell that built its engine
PEAK = "others/cores_peak"  # metric: cores that other processes used at a time at most
EVALUATING = "step_s/quality"  # metric of a cell that evaluated trained weights
Engine = tuple[Configuration, int]  # what probes of one engine have in common: configuration and seed


class LiveEvaluator:
    """Measures cells through a session, and knows the records that lie under its output root."""

    def __init__(
        self,
        session: CellSession,
        declared: Declared,
        specs: Mapping[Configuration, RunSpec],
        qualities: Qualities,
        root: Path | None,
        sweep: Path,
        say: Callable[[str], None],
    ) -> None:
        """specs: of each configuration, a cell of the server scenario. qualities: of them; they learn from each cell.

        root: of earlier records; None: take none. sweep: folder of the cells. say: a line.
        """
        self._say = say
        self.places = max(len(session.parts), 1)
        self._machine = session.parts[0].machine if session.parts else {}
        self.grace = 0.0 if declared.budget.cells is not None else GRACE
        self._session, self._declared, self._specs, self._sweep = session, declared, specs, sweep
        self._qualities = qualities
        self._begun = time.monotonic()
        self._cells = 0
        self._overheads: list[float] = []
        self._again: list[float] = []  # those of kept engines
        self._search_s: list[float] = []  # of cells that do not certify
        self._starts = Starts(specs)
        self._warm: set[Engine] = set()  # engines that are kept
        self._evaluations: list[float] = []  # seconds of those of trained weights
        self._measured: dict[tuple[Configuration, Probe], Outcome] = {}
        self._alike: dict[tuple[tuple[Path | None, ...], float], float] = {}  # by the folders and the percentile
        self._earlier = _by_strategy(root)
        self._usable: dict[Configuration, list[tuple[Path, RunRecord]]] = {}  # earlier records that count here
        self._certifying: dict[Configuration, list[tuple[Probe, Outcome]]] = {}  # earlier runs that certify
        limits = declared.goal.limits
        self._goodput = any(limit.metric == "goodput_rps" for limit in limits)
        self._bounds_ms = {limit.metric: limit.bound for limit in limits if limit.metric.startswith("latency_ms/")}
        self._widest_ms = max(self._bounds_ms.values(), default=0.0)

    # Budget

    @property
    def _total(self) -> float:
        budget = self._declared.budget
        return float(budget.cells) if budget.cells is not None else float(budget.seconds or 0.0)

    @property
    def used(self) -> float:
        """Seconds or cells that the search has taken."""
        return float(self._cells) if self._declared.budget.cells is not None else time.monotonic() - self._begun

    @property
    def cell_s(self) -> float:
        """Seconds of a cell beside its measurement."""
        return statistics.median(self._overheads) if self._overheads else FIRST_S

    @property
    def _again_s(self) -> float:
        """Seconds of a cell with a kept engine beside its measurement."""
        return statistics.median(self._again) if self._again else AGAIN_S

    def share(self, wanted: Sequence[Wanted]) -> float:
        if not (wanted := self._not_earlier(wanted)):
            return 0.0
        cost = float(len(wanted)) if self._declared.budget.cells is not None else self._seconds(wanted)
        return cost / self._total if self._total else float("inf")

    def saving(self, configuration: Configuration) -> float:
        if self._declared.budget.cells is not None or (configuration, 0) not in self._warm:
            return 0.0
        return max(self._starts.expected_s(configuration) - self._again_s, 0.0) / self._total

    def _seconds(self, wanted: Sequence[Wanted]) -> float:
        """Return the seconds that probes take beside each other, one after another with the engines that are kept."""
        warm, total = self._warm, 0.0
        for i in range(0, len(wanted), self.places):
            beside = wanted[i : i + self.places]
            total += max(
                (self._again_s if (configuration, probe.seed) in warm else self._start_s(configuration))
                + (probe.requests / probe.rate if probe.rate else OFFLINE_S)
                + self._evaluation_s(configuration, probe)
                for configuration, probe in beside
            )
            warm = self._kept(beside)
        return total

    def _evaluation_s(self, configuration: Configuration, probe: Probe) -> float:
        """Return the seconds in which the cell of a probe evaluates trained weights; 0 until one was measured."""
        evaluates = self._evaluations and self._qualities.evaluates(configuration, probe)
        return statistics.median(self._evaluations) if evaluates else 0.0

    def _start_s(self, configuration: Configuration) -> float:
        return max(self._starts.expected_s(configuration), self._again_s)

    def _kept(self, wanted: Sequence[Wanted]) -> set[Engine]:
        """Return the engines that probes leave to the next ones: another seed is another engine (`kept.engine_key`)."""
        keep = self._declared.fixed_value("runner.keep_engine") != "false"
        return {(configuration, probe.seed) for configuration, probe in wanted if keep}

    def _not_earlier(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        """Return the probes that no earlier run that certifies answers."""
        return [its for its in wanted if self._earlier_certifying(*its) is None]

    def budget_for(self, wanted: Sequence[Wanted]) -> str:
        wanted = self._not_earlier(wanted)
        if self._declared.budget.cells:  # 0cells may become either
            count = len(wanted)
            return f"{count} cells: set budget={max(self._cells + count, math.ceil(count / MOST))}cells"
        seconds, used = self._seconds(wanted), self.used if self._declared.budget.cells is None else 0.0
        least = max(used + seconds, seconds / MOST)
        if any(self._is_first(*its) for its in wanted):  # beside all that this budget had room for, and no TIMEOUT
            in_time = 0.0 if self._timeout_typed else seconds / FIRST_SHARE
            least = max(least, (self._declared.budget.seconds or 0.0) + seconds, in_time)
        minutes = math.ceil(least / 60)
        return f"about {seconds:.0f} s: set budget={minutes}min"

    def left(self) -> float:
        return 1 - self.used / self._total if self._total else 0.0

    def rest_s(self, certifying: Sequence[Wanted]) -> float:
        """Return the seconds until the budget ends, or these runs that are still to certify if they pass it."""
        runs = [its for its in self._not_earlier(certifying) if its not in self._measured]
        runs_s, budget = self._seconds(runs), self._declared.budget
        if budget.cells is None:
            return max((budget.seconds or 0.0) - self.used, runs_s)
        usual_s = statistics.fmean(self._search_s) if self._search_s else FIRST_S + self._declared.goal.probe_s
        return max(budget.cells - self._cells - len(runs), 0) * usual_s / self.places + runs_s

    # Measuring

    def together(self, wanted: Sequence[Wanted]) -> None:
        if self.places > 1:
            self._measure(wanted)

    def evaluate(self, configuration: Configuration, probe: Probe) -> Outcome:
        if self._qualities.loss_unknown(configuration):
            return Outcome(UNJUDGED, error="its loss is unknown: the default configuration failed")
        self._measure([(configuration, probe)])
        return self._measured[configuration, probe]

    def pool(self, outcomes: Sequence[Outcome]) -> Outcome:
        """Return what runs show together; the worst, and a line that says why, where the samples of one are damaged."""
        found = self._latencies(outcomes, "the worst run stands for all")
        return pooled(outcomes, found) if found else worst(outcomes)

    def alike(self, probes: Sequence[Outcome], percent: float) -> float:
        """Return the independent samples that a request is worth; 0 for drawn events, which another seed changes."""
        if not isinstance(next(iter(self._specs.values())).workload, RecordedConfig):
            return 0.0
        key = (tuple(outcome.folder for outcome in probes), percent)
        if key not in self._alike:  # a plan asks for it at each of many rates
            found = self._latencies(probes, "certifying runs are planned without it")
            self._alike[key] = worth_of_a_request(found, percent) if found else 0.0
        return self._alike[key]

    def _latencies(self, outcomes: Sequence[Outcome], otherwise: str) -> list[npt.NDArray[np.float64]]:
        """Return `latencies_of` each; [] if samples are damaged, after a line that says what is done otherwise."""
        from grbench.report.frame import ReportError

        try:
            return [latencies_of(outcome.folder) for outcome in outcomes]
        except ReportError as e:
            self._say(f"{e}; until then {otherwise}")
            return []

    def _measure(self, wanted: Sequence[Wanted]) -> None:
        """Measure the probes that were not yet measured, beside each other. Raises BudgetSpentError."""
        for key in wanted:
            if (found := self._earlier_certifying(*key)) is not None:
                self._measured.setdefault(key, found)
        unknown = self._qualities.loss_unknown
        new = [key for key in dict.fromkeys(wanted) if key not in self._measured and not unknown(key[0])]
        jobs = []
        for number, (configuration, probe) in enumerate(new, len(self._measured)):
            spec, run, words = self._compose(configuration, probe)
            job = Job((spec, self._options(run, configuration, probe)), self._sweep / str(number), words)
            # A certification that has begun ends: the search has seen to it that there is room.
            if self.left() <= 0 and not (probe.seed or probe.quality) and not self._session.has(job):
                raise BudgetSpentError
            if not self._session.has(job):
                self._announce(configuration, probe)
            jobs.append(job)
        begun = time.monotonic()
        cells = self._session.measure(jobs)
        longest = max((record.duration_s for _, record, kept in cells if not kept), default=0.0)
        after = time.monotonic() - begun - longest  # for figures and tracking, once no cell runs
        for key, job, (folder, record, kept) in zip(new, jobs, cells, strict=True):
            seconds = 0.0 if kept else record.duration_s + after
            self._measured[key] = outcome = self._outcome(key[0], folder, record, kept, seconds)
            if record.status is Status.TIMEOUT:
                limit_s = job.config[1].runner.timeout_s
                part, more = self._part_of_budget(*key, limit_s), "runner.timeout_s=SECONDS gives it more"
                outcome.error += f" ({part}; {more})" if part else ""
                outcome.within = f"{limit_s:g} s" + (f" ({part}); a longer budget or {more}" if part else f"; {more}")
                if self._is_first(*key):  # what the default compiles others find
                    self._starts.add(key[0], record.duration_s)
                self._qualities.give_up(*key)
            if not kept:
                self._cells += 1
                if not key[1].seed:
                    self._search_s.append(seconds)
                if record.ok:
                    tracked = after if self._cells > 1 else 0.0  # the first cell also imports what draws figures
                    self._overheads.append(_beside(record) + tracked)
                    if EVALUATING in record.metrics:
                        self._evaluations.append(record.metrics[EVALUATING])
                    if STARTED in record.metrics:
                        self._starts.add(key[0], self._overheads[-1])
                    else:
                        self._again.append(self._overheads[-1])
        if any(not kept for *_, kept in cells):
            ended = zip(new, cells, strict=True)
            self._warm = self._kept([key for key, (_, record, kept) in ended if record.ok and not kept])

    def _announce(self, configuration: Configuration, probe: Probe) -> None:
        """Say which probe begins, if it takes so long that one wonders."""
        if self._qualities.evaluates(configuration, probe):
            now = time.strftime("%H:%M:%S")
            self._say(f"{now} {configuration.name}: evaluates the weights, once for all loads and batches")
        elif (seconds := self._seconds([(configuration, probe)])) > SILENCE_S:
            load = "offline" if probe.rate is None else f"{probe.rate:g} requests/s"
            what = f"{'certifying at ' if probe.seed else ''}{load}, {probe.requests:,} requests"
            self._say(f"{time.strftime('%H:%M:%S')} {configuration.name}: {what}: takes about {seconds:.0f} s")

    def known(self, configuration: Configuration) -> Sequence[tuple[Probe, Outcome]]:
        if self._qualities.loss_unknown(configuration):  # for now: the default configuration may still be measured
            return []
        found: list[tuple[Probe, Outcome]] = []
        for folder, record in self._usable_records(configuration):
            scenario = record.spec["scenario"]
            if record.spec["seed"] != self._specs[configuration].seed:
                continue
            if scenario["name"] == "offline" and scenario["queries"] >= OFFLINE:
                probe = Probe(None, scenario["queries"])
            elif scenario["name"] == self._declared.scenario:
                rate = scenario[RATES[self._declared.scenario].rpartition(".")[2]]
                probe = Probe(rate, scenario["queries"])
                if not self._asked_for(probe):
                    continue
            else:
                continue
            limit_ms = record.spec["latency_limit_ms"]
            if self._goodput and limit_ms != self._limit_ms(configuration, probe):
                continue  # it counts answers within this limit
            if record.status is Status.STOPPED and limit_ms < self._widest_ms:
                continue
            if record.ok and STARTED in record.metrics:
                self._starts.add(configuration, _beside(record))
            if self._qualities.lacking(configuration, record):
                continue
            found.append((probe, self._outcome(configuration, folder, record, True, 0.0)))
        return sorted(found, key=lambda pair: (pair[0].rate is not None, pair[0].requests))

    def _asked_for(self, probe: Probe) -> bool:
        """Return True if a probe is at the rate of the goal, or if the search finds the rates itself."""
        rate = self._declared.goal.rate
        return rate is None or probe.rate is None or rates.step_of(probe.rate) == rates.step_below(rate)

    def _usable_records(self, configuration: Configuration) -> list[tuple[Path, RunRecord]]:
        """Return the earlier records of a configuration that this code on such a machine would make again."""
        if not self._usable:  # those of all, because one that lacks quality may come before one that has it
            self._usable = {its: self._find_usable(its) for its in self._specs}
            for its, found in self._usable.items():
                for folder, record in found:
                    self._qualities.learn(its, folder, record)
                    self._evaluations += [record.metrics[EVALUATING]] if EVALUATING in record.metrics else []
        return self._usable[configuration]

    def _find_usable(self, configuration: Configuration) -> list[tuple[Path, RunRecord]]:
        spec = self._specs[configuration]
        values, files = spec.to_dict(), spec.file_contents()
        offline = values | {"scenario": {**values["scenario"], "name": "offline"}}
        earlier = [its for one in (values, offline) for its in self._earlier.get(_strategy(one, files), [])]
        here = describe_environment(spec.packages) | self._machine if earlier else {}
        return [
            (folder, record)
            for folder, record in earlier
            if (record.ok or record.status in KNOWN_FAILURES)
            and record.spec["scenario"].get("mode") != "accuracy"  # its arrivals are LoadGen's for another purpose
            and not environment_difference(record.environment, here)
        ]

    def certifying(self, configuration: Configuration) -> Sequence[tuple[Probe, Outcome]]:
        if self._qualities.loss_unknown(configuration):
            return []
        if configuration not in self._certifying:
            self._certifying[configuration] = list(self._find_certifying(configuration))
        return self._certifying[configuration]

    def _find_certifying(self, configuration: Configuration) -> Iterator[tuple[Probe, Outcome]]:
        """Yield earlier runs that certify.

        Their limit may be another one, because their latencies are judged anew. LoadGen's verdict VALID holds for a
        wider limit, too; otherwise it is not known.
        """
        for folder, record in self._usable_records(configuration):
            scenario, judged_ms = record.spec["scenario"], record.spec["latency_limit_ms"]
            seed = record.spec["seed"] - self._specs[configuration].seed
            if seed < certification.SEED or scenario["name"] != self._declared.scenario:
                continue
            rate = scenario[RATES[self._declared.scenario].rpartition(".")[2]]
            probe = Probe(rate, scenario["queries"], seed)
            limit_ms = self._limit_ms(configuration, probe)
            if probe.requests < certification.CERTIFIED or not self._asked_for(probe):
                continue
            if self._goodput and judged_ms != limit_ms:
                continue  # it counts answers within this limit
            if record.spec["gate"]["measured"] < self._specs[configuration].gate.measured:
                continue  # fewer of its answers were compared with the reference
            if record.status is Status.STOPPED and judged_ms < self._widest_ms:
                continue
            if self._qualities.lacking(configuration, record):
                continue
            outcome = self._outcome(configuration, folder, record, True, 0.0)
            if judged_ms > limit_ms or (judged_ms < limit_ms and not outcome.metrics.get(VALID)):
                outcome.metrics = {name: value for name, value in outcome.metrics.items() if name != VALID}
            yield probe, outcome

    def _earlier_certifying(self, configuration: Configuration, probe: Probe) -> Outcome | None:
        """Return the outcome of an earlier run that certifies, of as many requests at least; None: there is none."""
        for its, outcome in self.certifying(configuration) if probe.seed else ():
            same = its.seed == probe.seed and f"{its.rate:g}" == f"{probe.rate:g}"
            if outcome.ok and same and its.requests >= probe.requests:
                return outcome
        return None

    def quality(self, configuration: Configuration) -> Mapping[str, float]:
        return self._qualities.metrics(configuration)

    def evaluate_quality(self, configuration: Configuration) -> Outcome | None:
        """Evaluate trained weights, on an engine that is kept if there is one. None: the budget asks for no cell."""
        if not self._total:
            return None
        seed = next((seed for kept, seed in self._warm if kept == configuration), 0)
        return self.evaluate(configuration, Probe(None, OFFLINE, seed, quality=True))

    def words(self, configuration: Configuration, probe: Probe) -> list[str]:
        """Return the overrides of a probe's cell."""
        declared = self._declared
        words = [word for word in declared.fixed if word.partition("=")[0] not in ("scenario", "seed")]
        words += configuration.words
        scenario = "offline" if probe.rate is None else declared.scenario
        words += [f"scenario={scenario}", f"scenario.queries={probe.requests}"]
        if probe.rate is not None:
            words.append(f"{RATES[declared.scenario]}={probe.rate:g}")
            # A run that certifies is whole, however it ends. The rate of a trace changes by itself. A queue is hopeless
            # if it is beyond every limit.
            stops = declared.scenario == "server" and self._limit_ms(configuration, probe) >= self._widest_ms
            if stops and not probe.seed:
                words.append("scenario.stop_hopeless=true")
        if not probe.seed and declared.fixed_value("gate.measured") is None:
            words.append(f"gate.measured={PROBED_ANSWERS}")
        if seed := int(declared.fixed_value("seed") or 0) + probe.seed:
            words.append(f"seed={seed}")
        if (limit_ms := self._limit_ms(configuration, probe)) != self._specs[configuration].latency_limit_ms:
            words.append(f"latency_limit_ms={limit_ms!r}")
        return words + self._qualities.words(configuration, probe)

    def _limit_ms(self, configuration: Configuration, probe: Probe) -> float:
        """Return `latency_limit_ms` of a probe's cell: the widest limit; of a run that certifies, what LoadGen judges.

        A typed one is kept.
        """
        bound = self._bounds_ms.get("latency_ms/p99") if probe.seed else self._widest_ms
        typed = self._declared.fixed_value("latency_limit_ms") is not None
        return bound if bound and not typed else self._specs[configuration].latency_limit_ms

    def _compose(self, configuration: Configuration, probe: Probe) -> tuple[RunSpec, RunConfig, tuple[str, ...]]:
        words = self.words(configuration, probe)
        spec, run = compose_spec(words, self._declared.config_dir)
        return spec, run, tuple(words)

    def _is_first(self, configuration: Configuration, probe: Probe) -> bool:
        """Return True for an offline probe of another configuration than the default, if it is most of all a start."""
        evaluates = self._qualities.evaluates(configuration, probe)
        return probe.rate is None and configuration != next(iter(self._specs)) and not evaluates

    def _options(self, run: RunConfig, configuration: Configuration, probe: Probe) -> RunConfig:
        """Return the options with a kept engine, and a time limit of a part of the budget, unless they are typed."""
        runner, seconds = run.runner, self._declared.budget.seconds
        if self._declared.fixed_value("runner.keep_engine") is None:
            runner = dataclasses.replace(runner, keep_engine=True)
        if seconds is not None and not self._timeout_typed:
            first = self._is_first(configuration, probe)
            share, least = (FIRST_SHARE, FIRST_SHORTEST_S) if first else (CELL_SHARE, SHORTEST_S)
            if probe.seed:  # a run that certifies is as long as it has to be
                least = max(least, 2 * self._seconds([(configuration, probe)]))
            limit = max(min(share * seconds, runner.timeout_s), least)
            runner = dataclasses.replace(runner, timeout_s=limit)
        return dataclasses.replace(run, runner=runner)

    @property
    def _timeout_typed(self) -> bool:
        return self._declared.fixed_value("runner.timeout_s") is not None

    def _part_of_budget(self, configuration: Configuration, probe: Probe, limit_s: float) -> str:
        """Return which part of the budget the time limit of a probe is, in words; "": none."""
        first, seconds = self._is_first(configuration, probe), self._declared.budget.seconds
        if seconds is None or self._timeout_typed or limit_s < (FIRST_SHARE if first else CELL_SHARE) * seconds:
            return ""
        part, least = ("a fifth", FIRST_SHORTEST_S) if first else ("half", SHORTEST_S)
        return f"{part} of the budget, but at least {least:g} s"

    def _outcome(
        self, configuration: Configuration, folder: Path, record: RunRecord, kept: bool, seconds: float
    ) -> Outcome:
        self._qualities.learn(configuration, folder, record)
        if record.ok and emulated(record):
            return Outcome(str(Status.UNAVAILABLE), error=EMULATED, seconds=seconds, kept=kept, folder=folder)
        rest = {name: value for name, value in record.metrics.items() if not name.startswith("quality/")}
        intervals = {name: ends for name, ends in record.intervals.items() if not name.startswith("quality/")}
        return Outcome(
            status=str(record.status),
            metrics={**rest, **self.quality(configuration)} if record.ok else {},
            intervals=intervals | self._qualities.intervals(configuration),
            error=record.error or "",
            batches=self._batches(folder) if record.ok and record.spec["scenario"]["name"] == "offline" else (),
            seconds=seconds,
            kept=kept,
            folder=folder,
            busy=max((record.metrics.get(PEAK, 0.0) for note in record.notes if note.startswith(BESIDE)), default=0.0),
        )

    def _batches(self, folder: Path) -> list[tuple[int, float]]:
        """Return `batches_of` a cell; none where its samples are damaged, and a line that says so."""
        from grbench.report.frame import ReportError

        try:
            return batches_of(folder)
        except ReportError as e:
            self._say(f"{e}; until then the search does without the times of its batches")
            return []


def _beside(record: RunRecord) -> float:
    """Return the seconds of a cell beside its measurement and the evaluation of its weights."""
    return max(record.duration_s - sum(record.metrics.get(name, 0.0) for name in ("duration_s", EVALUATING)), 0.0)


def batches_of(folder: Path) -> list[tuple[int, float]]:
    """Return the size and the seconds of each batch of a cell; none for an engine that batches by itself.

    Raises ReportError for samples that can't be read.
    """
    from grbench.report.frame import load_samples

    columns = ["batch_index", "batch_size", "batch_ms", "transfer_ms", "compute_ms"]
    by_index: dict[int, tuple[int, float]] = {}
    packed = 0.0
    for index, size, *parts in load_samples(folder)[columns].itertuples(index=False):
        by_index[int(index)] = (int(size), sum(parts) / 1e3)
        packed += parts[0]
    return list(by_index.values()) if packed else []


def latencies_of(folder: Path | None) -> npt.NDArray[np.float64]:
    """Return the milliseconds of each request of a cell, in the order in which they were issued.

    The samples are in the order of answers. Raises ReportError for samples that can't be read.
    """
    from grbench.report.frame import load_samples

    assert folder is not None  # every outcome of a cell has one
    return load_samples(folder).sort_values("arrival_s", kind="stable")["latency_ms"].to_numpy(np.float64)


def _strategy(spec: dict[str, Any], files: Mapping[str, str]) -> str:
    """Return a key that is equal for cells of one configuration under any load, seed and limit; offline has its own.

    Offline all requests are there at once, so that the time that a batch waits for more plays no part.
    """
    values = json.loads(json.dumps(spec))
    for key in ("latency_limit_ms", "seed", "gate"):
        values.pop(key, None)
    scenario = values.pop("scenario")
    batching = {key: scenario.get(key) for key in BATCHING}
    if scenario.get("name") == "offline":
        batching["max_wait_ms"] = "offline"
    return json.dumps([values, batching, dict(files)], sort_keys=True)


def _by_strategy(root: Path | None) -> dict[str, list[tuple[Path, RunRecord]]]:
    found: dict[str, list[tuple[Path, RunRecord]]] = {}
    for folder, record in records.find(root) if root is not None and root.is_dir() else ():
        if record.status is not Status.INTERRUPTED:
            try:
                key = _strategy(record.spec, record.files)
            except (KeyError, TypeError):
                continue  # a record of other options
            found.setdefault(key, []).append((folder, record))
    return found
