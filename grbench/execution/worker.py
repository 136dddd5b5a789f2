"""The worker: one fresh process for one cell. Only workers touch engines and devices.

    python -m grbench.execution.worker JOB.json

It reads the cell from the job file and reports on file descriptor `report_fd`, one JSON object a line:
{"stage": ...}, {"answered": n}, and at the end {"outcome": {...}}. What it prints goes to the cell's log.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grbench.config.schema import RunSpec, spec_from_json
from grbench.execution.records import SAMPLES_FILE, Status, one_line


@dataclass
class Outcome:
    """What a worker has to say of its cell; the parent turns it into a RunRecord."""

    status: Status = Status.ERROR
    error: str | None = None
    actual: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Report = Callable[[dict[str, Any]], None]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    channel = os.fdopen(job["report_fd"], "w", buffering=1)

    def report(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    if limit := job["memory_limit_bytes"]:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    outcome = Outcome()
    try:
        run(spec_from_json(job["spec"]), Path(job["folder"]), outcome, report)
        outcome.status = Status.OK
    except BaseException as e:
        outcome.status, outcome.error = classify(e)
        with contextlib.suppress(OSError):  # the log's disk may be full: the outcome still goes out
            traceback.print_exc()
    report({"outcome": asdict(outcome)})
    channel.close()
    os._exit(0)  # a load generator's thread may be waiting for answers that won't come


def run(spec: RunSpec, folder: Path, outcome: Outcome, report: Report) -> None:
    """Measure one cell: build, gate, warm up, drive the scenario, gate again. Fills `outcome` as it goes."""
    report({"stage": "loading the workload"})
    from grbench import workloads

    trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
    outcome.metrics |= {f"workload/{name}": float(value) for name, value in trace.facts().items()}

    from grengines import registry

    retrieval = None
    if spec.retrieval is not None:
        from grbench.execution.retrieval import build_retrieval

        report({"stage": "making semantic IDs"})
        retrieval = build_retrieval(
            spec.retrieval, spec.workload, trace, spec.seed, lambda text: report({"stage": text})
        )
    report({"stage": "building the engine"})
    begun = time.perf_counter()
    engine = registry.build(
        spec.engine,
        spec.model,
        spec.kernel,
        trace.catalogue,
        spec.seed,
        spec.cache,
        task=spec.task,
        retrieval=retrieval,
    )
    try:
        engine.prepare(trace.requests, spec.scenario.max_batch)
        outcome.metrics["engine_start_s"] = time.perf_counter() - begun
        outcome.actual = engine.actual()
        _gate_and_measure(spec, folder, engine, trace, retrieval, outcome, report)
    finally:
        engine.close()


def _gate_and_measure(
    spec: RunSpec, folder: Path, engine: Any, trace: Any, retrieval: Any, outcome: Outcome, report: Report
) -> None:
    from grbench.execution import measure
    from grbench.execution.gpu import sample_gpu
    from grbench.gate import gate_for, quality
    from grbench.scenarios import run_scenario
    from grengines.numerics import IncorrectError
    from grkernels import tuning

    report({"stage": "checking against the fp32 reference"})
    gate = gate_for(spec, trace, retrieval, outcome.actual)
    try:
        outcome.gate = gate.check(engine, spec.scenario.max_batch).to_dict()
        if spec.cache.name != "none":  # what the cache serves must be as right as what it stored, from either tier
            outcome.gate["error_again"] = gate.check(engine, spec.scenario.max_batch).error
            engine.reset_cache(keep_host=True)
            outcome.gate["error_from_host"] = gate.check(engine, spec.scenario.max_batch).error
        if spec.task == "rank":
            found = quality.measure(spec, trace, engine, outcome.actual["precision"], outcome.actual["device"])
            if found is not None:
                outcome.gate["quality"] = found.to_dict()
                found.check(spec.gate.allow_loss)
        report({"stage": "warming up"})
        warm_up(engine, trace.requests, spec)
        engine.reset_cache()
        report({"stage": "measuring"})
        told, compiled = time.monotonic(), len(tuning.compiled())

        def progress(answered: int) -> None:
            nonlocal told
            if time.monotonic() - told > 0.5:
                told = time.monotonic()
                report({"answered": answered})

        measurement = run_scenario(
            spec.scenario,
            engine,
            trace.requests,
            task=spec.task,
            latency_limit_ms=spec.latency_limit_ms,
            seed=spec.seed,
            folder=folder / "loadgen",
            progress=progress,
        )
        late = tuning.compiled()[compiled:]
        power = sample_gpu() if outcome.actual["device"] == "cuda" else {}
        # Once more, after all that load: a stale buffer or a corrupted state shows now.
        outcome.gate["error_after"] = gate.check(engine, spec.scenario.max_batch).error
        outcome.actual = engine.actual()  # by now it has used every launch configuration that it needs
    except IncorrectError as e:
        if e.result is not None:
            outcome.gate = e.result.to_dict()
        raise
    report({"stage": "writing"})
    summary = measure.summarise(measurement, spec, trace.requests, retrieval.ids.sizes if retrieval else ())
    outcome.metrics |= summary.metrics | power | measure.memory(outcome.actual["device"])
    outcome.intervals = summary.intervals
    outcome.notes = outcome.actual.get("notes", []) + measurement.notes + summary.notes
    if late:
        outcome.notes.append(
            f"{len(late)} kernels were compiled while latencies were taken, which are longer for it "
            f"({', '.join(sorted(set(late)))}); raise warmup_batches={spec.warmup_batches}"
        )
    measure.write_samples(measurement.samples, folder / SAMPLES_FILE)


def warm_up(engine: Any, requests: list[Any], spec: RunSpec) -> None:
    """Run full, half and quarter batches in turn, so that first-time costs of the common sizes are not measured."""
    size = spec.scenario.max_batch
    for i in range(spec.warmup_batches):
        start = (i * size) % len(requests)
        getattr(engine, spec.task)(requests[start : start + max(size >> (i % 3), 1)])


def classify(error: BaseException) -> tuple[Status, str]:
    """The status that an exception means, and one line about it."""
    from grengines.api import UnavailableError
    from grengines.numerics import IncorrectError

    line = one_line(error, most=5000)
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        return Status.DISK_FULL, f"no space left while the cell ran: {line}; free some and run it again"
    if any(out_of_memory(e) for e in chain):
        return Status.OOM, f"memory ran out: {textwrap.shorten(line, 160)}; try a smaller batch, history or model"
    if isinstance(error, UnavailableError):
        return Status.UNAVAILABLE, line
    if isinstance(error, IncorrectError):
        return Status.INCORRECT, line
    if isinstance(error, ValueError):  # bad data or options: the message says all, the type adds nothing
        return Status.ERROR, line
    return Status.ERROR, f"{type(error).__name__}: {line}"


def out_of_memory(error: BaseException) -> bool:
    """Whether the host's or the device's memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, OSError | RuntimeError) and (
        "can't allocate memory" in text or "Cannot allocate memory" in text or "std::bad_alloc" in text
    )


if __name__ == "__main__":
    main()
