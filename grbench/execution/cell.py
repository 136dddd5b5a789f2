"""The measurement of one cell: build, check, warm up, drive the scenario, check again."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from grbench import scenarios, workloads
from grbench.config.schema import RunSpec
from grbench.execution import engines, measure
from grbench.execution.clock import at_most_every, remaining
from grbench.execution.energy import metered
from grbench.execution.gpu import sample_gpu
from grbench.execution.heap import leave_out
from grbench.execution.kept import Built, KeptEngine
from grbench.execution.load import MEASURING
from grbench.execution.ranks import gpus_of, notes_of
from grbench.execution.records import RESAMPLES_FILE, SAMPLES_FILE, Outcome
from grbench.execution.retrieval import build_retrieval
from grbench.gate import gate_for, quality
from grbench.gate.accuracy import DataSet
from grbench.gate.base import Gate
from grbench.gate.measured import MeasuredAnswers
from grbench.gate.rank import coarsest
from grbench.quality.references import FOLDER, References
from grbench.scenarios import Measurement
from grbench.scenarios.config import is_accuracy, issued, largest_batch
from grbench.scenarios.growth import HopelessError
from grbench.workloads.item_map import check_items
from grbench.workloads.trace import Trace
from grengines.api import Engine, Ranker, Request, Retrieval, Tier
from grengines.cache.config import PagedCacheConfig
from grengines.numerics import IncorrectError
from grkernels import tuning

Report = Callable[[dict[str, Any]], None]


@dataclass
class Cell:
    """One cell and its outcome. The steps fill it one after another, so one that fails leaves the earlier figures."""

    spec: RunSpec
    folder: Path
    outcome: Outcome
    report: Report  # takes one message for the parent process
    _step: tuple[str, float] = ("", 0.0)  # the step that runs, and when it began
    _quality: quality.QualityFigures | None = None
    _most: int = 0  # requests of a batch that the engine is prepared and checked for

    def run(self, kept: KeptEngine | None = None) -> None:
        """Take every step. Raises what a step raises.

        kept: may have the engine of an earlier cell, and keeps this one's. None: the engine is closed at the end.
        """
        # A kept engine may get a load with more requests.
        self._most = self.spec.scenario.max_batch if kept is not None else largest_batch(self.spec.scenario)
        with contextlib.ExitStack() as unless_kept:
            built = self._build(unless_kept) if kept is None else kept.of(self.spec, lambda: self._build(unless_kept))
            engine, trace = built.engine, built.trace
            if built.cells:
                engine.reset_cache()
            self.outcome.actual, self.outcome.metrics["engine_start_s"] = engine.actual(), built.start_s
            self.outcome.metrics |= facts_of(trace)
            self._begin("check", "checking against the fp32 reference")
            if (gate := built.gate) is None:
                built = self._with_gate(built)
                gate = built.gate
                assert gate is not None
            with self._figures_of_failure():
                self._check(engine, gate)
                self._check_quality(built)
                data = DataSet.of(self.spec, trace) if is_accuracy(self.spec.scenario) else None
                requests = data.requests if data else trace.requests
                self._make(requests)
                self._warm_up(engine, requests)
                answers = MeasuredAnswers(gate.form, self.spec.gate.measured, self.spec.seed)
                try:
                    measurement = self._measure(engine, requests, answers)
                except HopelessError as e:
                    # The rest of the load generator's schedule, unanswered, is shorter than another start.
                    if kept is not None and e.left_s < built.start_s and e.finish(e.left_s + built.start_s):
                        kept.keep(self.spec, built)
                        unless_kept.pop_all()
                    raise
                measurement.metrics |= measure.memory(self.outcome.actual["device"], built.gate_mib)
                measurement.metrics["batch_size/prepared"] = float(self._most)
                if built.cells:
                    measurement.notes.append(
                        f"the engine and its process had measured {built.cells} other loads before, and was not built "
                        "again: host memory is the peak of all of them"
                    )
                self._summarise(measurement, requests, built.retrieval, data)
                self._check_measured(gate, answers)
                self._check_again(engine, gate)
            self._write(measurement)
            if kept is not None:
                kept.keep(self.spec, built)
                unless_kept.pop_all()
            else:
                self._begin("", "closing the engine")

    def _begin(self, step: str, text: str = "") -> None:
        """Begin a step, and note the seconds of the one before.

        text: what the progress line says. The parent then has the outcome so far, should this process end within the
        step.
        """
        before, begun = self._step
        now = time.perf_counter()
        if before:
            name = f"step_s/{before}"
            self.outcome.metrics[name] = self.outcome.metrics.get(name, 0.0) + now - begun
        self._step = step, now
        if text:
            self.report({"so_far": dataclasses.asdict(self.outcome)})
            self._say(text)

    def _say(self, text: str) -> None:
        self.report({"stage": text})

    def _load(self) -> Trace:
        self._begin("load", "loading the workload")

        trace = workloads.build(self.spec.workload, self.spec.seed, self.spec.latency_limit_ms)
        for owner in (self.spec.model, self.spec.retrieval):
            if weights := getattr(owner, "weights", None):
                check_items(trace.events, Path(weights))
        self.outcome.metrics |= facts_of(trace)
        return trace

    def _retrieval(self, trace: Trace) -> Retrieval | None:
        if self.spec.retrieval is None:
            return None
        self._begin("semantic_ids", "making semantic IDs")
        return build_retrieval(self.spec.retrieval, self.spec.workload, trace.events, self.spec.seed, self._say)

    def _build(self, unless_kept: contextlib.ExitStack) -> Built:
        """Load the trace, then build and prepare the engine. unless_kept: closes the engine at its end."""
        trace = self._load()
        retrieval = self._retrieval(trace)
        spec, begun = self._prepared, time.perf_counter()
        fewer = f" for batches of {self._most}, all that are issued" if spec != self.spec else ""
        self._begin("start", f"building the engine{fewer}")
        engine = engines.build(spec, trace.catalogue, retrieval, self._say)
        unless_kept.callback(engine.close)
        engine.prepare(trace.requests.some(engines.MOST_PREPARED), spec.scenario.max_batch)
        start_s = time.perf_counter() - begun
        self.outcome.metrics["engine_start_s"] = start_s
        self.outcome.actual = engine.actual()
        return Built(trace, retrieval, engine, start_s)

    @property
    def _prepared(self) -> RunSpec:
        """The cell as the engine is prepared and checked for it."""
        return dataclasses.replace(self.spec, scenario=dataclasses.replace(self.spec.scenario, max_batch=self._most))

    def _with_gate(self, built: Built) -> Built:
        """Return the engine with the gate of its answers."""
        device = self.outcome.actual["device"]
        before = measure.gpu_allocated_mib(device)
        gate = gate_for(self.spec, built.trace, built.retrieval, self.outcome.actual)
        return dataclasses.replace(built, gate=gate, gate_mib=measure.gpu_allocated_mib(device) - before)

    @contextlib.contextmanager
    def _figures_of_failure(self) -> Iterator[None]:
        """Keep the figures of a check that fails: they replace those of the check that passed before.

        Those of the measurement go: a wrong engine gets no number.
        """
        try:
            yield
        except IncorrectError as e:
            if e.result is not None:
                self.outcome.gate = e.result.to_dict()
            self.outcome.gate["passed"] = False
            self.outcome.ungated = {}
            raise

    def _check(self, engine: Engine, gate: Gate) -> None:
        """Check the engine and, if there is a cache, what each tier of it serves."""
        max_batch = self._most
        self.outcome.gate = gate.check(engine, max_batch).to_dict()
        if self.spec.cache.name != "none":
            self.outcome.gate["error_again"] = gate.check(engine, max_batch).error
            engine.reset_cache(keep=Tier.HOST)
            self.outcome.gate["error_from_host"] = gate.check(engine, max_batch).error
            if isinstance(self.spec.cache, PagedCacheConfig) and self.spec.cache.storage_gb:
                engine.reset_cache(keep=Tier.STORAGE)
                self.outcome.gate["error_from_storage"] = gate.check(engine, max_batch).error

    def _check_quality(self, built: Built) -> None:
        """Compute the quality of trained weights. A precision that loses too much ends the cell."""
        actual, engine, trace = self.outcome.actual, built.engine, built.trace
        references = References(self.folder.parent / FOLDER, self.outcome.code)
        found: tuple[quality.Quality | quality.ListQuality | None, quality.QualityFigures] | None

        def watching(what: str) -> Callable[..., None]:
            title = f"measuring quality{what}"
            if self._step[0] == "quality":
                self._say(title)
            else:
                self._begin("quality", title)
            return at_most_every(5.0, lambda done, total: self._say(f"{title}, {done:,} of {total:,} requests"))

        if self.spec.task == "rank":
            ranker, precision, device = cast(Ranker, engine), coarsest(actual), actual["device"]
            found = quality.measure(self._prepared, trace, ranker, precision, device, references, watching)
        else:
            found = quality.measure_lists(self._prepared, trace, engine, built.retrieval, actual, references, watching)
        if found is None:
            return
        beside, self._quality = found
        if beside is not None:
            self.outcome.gate["quality" if self.spec.task == "rank" else "lists"] = beside.to_dict()
            beside.check(self.spec.gate.allow_loss)

    def _make(self, requests: Sequence[Request]) -> None:
        """Make the requests that will be issued, so that none is made while latencies are taken."""
        count = min(issued(self.spec.scenario) or len(requests), len(requests))

        begun = time.monotonic()

        def say(done: int) -> None:
            rest = remaining(time.monotonic() - begun, done, count)
            shorter = "workload.max_requests makes a shorter trace"
            self._say(f"making requests, {done:,} of {count:,}{f', {rest} left' if rest else ''}; {shorter}")

        self._begin("load", "making requests")
        progress = at_most_every(5.0, say)
        for k in range(count):
            requests[k]
            progress(k)

    def _warm_up(self, engine: Engine, requests: Sequence[Request]) -> None:
        """Run full, half and quarter batches in turn, so that first-time costs of the common sizes are not measured."""
        self._begin("warm_up", "warming up")
        size = self._most
        for i in range(self.spec.warmup_batches):
            start = (i * size) % len(requests)
            getattr(engine, self.spec.task)(requests[start : start + max(size >> (i % 3), 1)])
        engine.reset_cache()

    def _measure(self, engine: Engine, requests: Sequence[Request], answers: MeasuredAnswers) -> Measurement:
        self._begin("measure", MEASURING)
        compiled, device = len(tuning.compiled()), self.outcome.actual["device"]
        measure.gpu_allocated_mib(device)  # the peak of the gate is past
        allocations = measure.gpu_allocations(device)
        leave_out()
        with metered(self._device(), gpus=gpus_of(self.spec.engine)) as energy:
            measurement = scenarios.run_scenario(
                self.spec.scenario,
                engine,
                requests,
                task=self.spec.task,
                latency_limit_ms=self.spec.latency_limit_ms,
                seed=self.spec.seed,
                folder=self.folder / "loadgen",
                progress=at_most_every(0.5, lambda answered: self.report({"answered": answered})),
                watch=answers.watch,
            )
        measurement.metrics |= energy.metrics(len(measurement.samples["request_id"]))
        if device == "cuda":
            measurement.metrics |= sample_gpu()
        if more := measure.gpu_allocations(device) - allocations:
            measurement.notes.append(
                f"PyTorch asked the GPU {more} times for memory while latencies were taken, which made some longer; "
                f"raise warmup_batches={self.spec.warmup_batches}"
            )
        if late := tuning.compiled()[compiled:]:
            measurement.notes.append(
                f"{len(late)} kernels were compiled while latencies were taken, which made some longer "
                f"({', '.join(sorted(set(late)))}); raise warmup_batches={self.spec.warmup_batches}"
            )
        return measurement

    def _device(self) -> str | None:
        """Return the device whose energy the answers take; None for a server's, which this machine can't read."""
        actual = self.outcome.actual
        stages = (actual, actual.get("retrieve", {}), actual.get("rank", {}))
        return None if any("server" in stage for stage in stages) else actual["device"]

    def _check_again(self, engine: Engine, gate: Gate) -> None:
        """Check once more: after all that load a stale buffer or a corrupted state shows."""
        self._begin("compare", "checking against the fp32 reference again")
        self.outcome.gate["error_after"] = gate.check(engine, self._most).error
        self.outcome.actual = engine.actual()  # by now it has used every launch configuration that it needs

    def _check_measured(self, gate: Gate, answers: MeasuredAnswers) -> None:
        """Compare a sample of the measured answers with the reference."""
        self._begin("compare", "comparing measured answers with the fp32 reference")
        result = answers.compare(gate)
        self.outcome.gate["measured"] = result.to_dict()
        if not result.passed:
            raise IncorrectError(result.words)

    def _summarise(
        self,
        measurement: Measurement,
        requests: Sequence[Request],
        retrieval: Retrieval | None,
        data: DataSet | None,
    ) -> None:
        """Compute the figures. They count once all checks have passed."""
        self._begin("figures", "computing the figures")
        summary = measure.summarise(measurement, self.spec, requests, retrieval.ids.sizes if retrieval else ())
        summary.notes = [*measurement.notes, *summary.notes]
        for figures in (self._quality, data.figures(measurement.logged) if data else None):
            if figures is not None:
                summary.metrics |= figures.metrics
                summary.intervals |= figures.intervals
                summary.notes += figures.notes
        self.outcome.ungated = dataclasses.asdict(summary)

    def _write(self, measurement: Measurement) -> None:
        """Add the figures to those that count, and write the files."""
        outcome, figures = self.outcome, self.outcome.ungated
        outcome.metrics |= figures["metrics"]
        outcome.intervals = figures["intervals"]
        outcome.notes = [*outcome.actual.get("notes", []), *notes_of(outcome.actual), *figures["notes"]]
        outcome.ungated = {}
        self._begin("write", "writing")
        measure.write_samples(measurement.samples, self.folder / SAMPLES_FILE)
        if self._quality is not None and self._quality.resamples:
            measure.write_samples(self._quality.resamples, self.folder / RESAMPLES_FILE)
        self._begin("")


def facts_of(trace: Trace) -> dict[str, float]:
    """Return the figures of a trace as metrics."""
    return {f"workload/{name}": float(value) for name, value in trace.facts().items()}
