"""`grbench overhead`: the latency that the harness itself adds, and what its checks take.

An engine that does nothing runs through the whole measuring path (LoadGen, batcher, checks of answers, sample rows). It
alternates with the configured engine in one process. Its p50 is the overhead, and its share is relative to the
configured engine's p50. LoadGen's own p50 of that engine is printed beside it: it also has the way from LoadGen to the
first timestamp, and the check, the sample row and the response after the last one.

Every answer is checked between batches, which lowers the throughput. To see by how much, the engine that does nothing
also answers requests offline, with and without the checks in turn. The processor time of the quickest round counts,
since other processes can only add to it.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grbench.config.arguments import Arguments, CommandError
from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError, RunSpec
from grbench.execution.records import one_line
from grbench.scenarios.config import OfflineConfig, ScenarioConfig
from grengines.api import Engine, RankResult, Request, Tier, UnavailableError

if TYPE_CHECKING:
    from grbench.gate.form import Form
    from grbench.workloads.trace import Trace

OFFLINE = OfflineConfig(max_batch=32, queries=32 * 512)


class NullEngine:
    """Engine that answers at once, with zeros. It passes no gate, so no record reports it."""

    def __init__(self, tasks: int) -> None:
        self._tasks = tasks
        self._zeros = np.zeros((0, tasks), np.float32)

    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        pass

    def rank(self, requests: Sequence[Request]) -> RankResult:
        counts = [len(r.candidates) for r in requests]
        if max(counts) > len(self._zeros):
            self._zeros = np.zeros((max(counts), self._tasks), np.float32)
        return RankResult(
            scores=[self._zeros[:count] for count in counts],
            batch_ms=0.0,
            transfer_ms=0.0,
            compute_ms=0.0,
            tokens=len(requests),
            padded_tokens=len(requests),
        )

    def actual(self) -> dict[str, Any]:
        return {"engine": "null"}

    def reset_cache(self, keep: Tier = Tier.NONE) -> None:
        pass

    def close(self) -> None:
        pass


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = "Measure the latency that the harness itself adds, its share of an engine's p50, and what its checks take."
    examples = ["overhead", "overhead model=dlrm_v3 workload=synthetic_long --repeats 3"]
    parser = Arguments(
        "overhead", about, examples, "overrides as in `grbench`, after engine=hstu scenario=single_stream"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each engine (default: %(default)s)")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 done, 1 the engine cannot run, 2 the configuration is wrong, 130 Ctrl-C."""
    args = parser().parse_intermixed_args(words)
    words = ["engine=hstu", "scenario=single_stream", *args.overrides]
    spec, _ = compose_spec(words, args.config_dir, refuse_unread=True)
    if spec.task != "rank":
        raise ConfigError(f"task={spec.task}: the overhead is measured with engines that rank; allowed: rank")
    if args.repeats < 1:
        raise ConfigError(f"--repeats {args.repeats}: allowed is >= 1")
    from grengines.numerics import IncorrectError  # imports torch: --help does not

    try:
        compare(spec, args.repeats)
    except (ValueError, UnavailableError, IncorrectError) as e:
        raise CommandError(one_line(e, most=1000), code=1) from e
    return 0


def compare(spec: RunSpec, repeats: int) -> None:
    """Measure both engines `repeats` times each, and print p50 in microseconds, the share, and what checks take.

    Raises ValueError for unusable data, UnavailableError or IncorrectError.
    """
    from grbench import workloads
    from grbench.execution import engines
    from grbench.gate import gate_for

    trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
    with contextlib.closing(engines.build(spec, trace.catalogue)) as engine:
        engine.prepare(trace.requests.some(engines.MOST_PREPARED), spec.scenario.max_batch)
        gate = gate_for(spec, trace, None, engine.actual())
        gate.check(engine, spec.scenario.max_batch)
        _measure(spec, trace, engine, gate.form, repeats)


def _measure(spec: RunSpec, trace: Trace, engine: Engine, form: Form, repeats: int) -> None:
    from grbench.gate.measured import MeasuredAnswers
    from grbench.scenarios import Measurement, run_scenario
    from grbench.scenarios.batcher import unwatched

    null = NullEngine(len(spec.ranking_model.tasks))

    def run(scenario: ScenarioConfig, runs: Engine, seed: int, checks: bool = True) -> Measurement:
        runs.reset_cache()
        watch = MeasuredAnswers(form, spec.gate.measured, spec.seed).watch if checks else unwatched
        limit = spec.latency_limit_ms
        with tempfile.TemporaryDirectory() as folder:
            return run_scenario(
                scenario, runs, trace.requests, latency_limit_ms=limit, seed=seed, folder=Path(folder), watch=watch
            )

    p50s: dict[str, list[float]] = {"null": [], spec.engine.name: []}  # milliseconds
    loadgens: list[float] = []  # its own p50s of the engine that does nothing
    offline_us: dict[bool, list[float]] = {False: [], True: []}  # processor time of an answer, without and with checks
    for seed in range(spec.seed, spec.seed + repeats):
        for name, runs in (("null", null), (spec.engine.name, engine)):
            measurement = run(spec.scenario, runs, seed)
            p50s[name].append(float(np.median(measurement.samples["latency_ms"])))
            if runs is null and (own := measurement.metrics.get("loadgen_latency_ms/p50")) is not None:
                loadgens.append(own)
        for checks, times in offline_us.items():
            begun = time.process_time()
            run(OFFLINE, null, seed, checks)
            times.append((time.process_time() - begun) * 1e6 / OFFLINE.queries)
    added, real = (float(np.median(v)) for v in p50s.values())
    for name, values in p50s.items():
        rounds = " ".join(f"{v * 1e3:.1f}" for v in values)
        print(f"{name:>8}: p50 {np.median(values) * 1e3:.1f} us   (rounds: {rounds})")
    print(f"overhead: {added * 1e3:.1f} us, {added / real:.1%} of {spec.engine.name} on {spec.model.name}")
    if loadgens:
        print(f"  LoadGen: {np.median(loadgens) * 1e3:.1f} us at p50, with the check, the sample row and the response")
    without, checked = (min(times) for times in offline_us.values())
    print(
        f"  checks: {checked - without:.2f} us an answer, between batches   (offline, null, batches of "
        f"{OFFLINE.max_batch}: {without:.2f} us an answer without them, {checked:.2f} with them)"
    )
