"""The evaluator of `grbench tune` that measures: the overrides of its cells, and losses against the default."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from helpers.cells import write_cell
from helpers.checkout import ROOT

from grbench.config.compose import compose_spec
from grbench.config.jobs import Job
from grbench.execution import records, stats
from grbench.execution.environment import describe_environment
from grbench.execution.kept import engine_key
from grbench.execution.load import BESIDE
from grbench.execution.places import LocalPart, Share
from grbench.execution.records import Status
from grbench.execution.session import CellSession
from grbench.execution.session import Measured as Cell
from grbench.report.frame import load_samples
from grbench.tune import config, limits, live, quality, rates
from grbench.tune.certification import MOST
from grbench.tune.live import LiveEvaluator
from grbench.tune.outcome import Configuration, Outcome, Probe
from grbench.tune.quality import Qualities
from grbench.tune.starts import FIRST_S
from grkernels import fp8

WINDOWS = [Configuration((("model.max_attn_len", value),)) for value in ("0", "64")]
DEFAULT, WINDOW = WINDOWS
FIFTH = " (a fifth of the budget, but at least 45 s; runner.timeout_s=SECONDS gives it more)"
HALF = " (half of the budget, but at least 120 s; runner.timeout_s=SECONDS gives it more)"
RUNS = [(1000, 101), (3000, 102), (3000, 103)]  # requests and seeds of runs that certify
WEIGHTS = ROOT / "experiments" / "weights" / "ml_100k" / "ranker" / "weights.safetensors"
NO_QUALITY = "gate.quality_requests=0"
CELL_S = 1.5  # of the cells of `write_cell`
OFFLINE, SERVER = Probe(None, 512), Probe(100.0, 2000)


class Measured:
    """A session whose cells have been measured: the status and the quality of each window."""

    parts = ()

    def __init__(self, folder: Path, found: Mapping[int, tuple[Status, float, float]]) -> None:
        self._folder, self._found = folder, found

    def has(self, spec: object) -> bool:
        return False

    def measure(self, jobs: Sequence[Job]) -> list[Cell]:
        return [self._cell(job) for job in jobs]

    def _cell(self, job: Job) -> Cell:
        window = job.config[0].ranking_model.max_attn_len
        status, auc, loss = self._found[window]
        folder = self._folder / str(window)
        record = write_cell(folder, status=status)
        if record.ok:
            reference = {"auc_reference": auc, "auc_loss_interval": [loss, loss]}  # as `TaskQuality` has it
            record.gate["quality"] = {"tasks": {"liked": {"auc": auc, "auc_loss": loss, **reference}}}
        return Cell(folder, record, False)


class Repeated(Measured):
    """A session that measures a window again and again."""

    def measure(self, jobs: Sequence[Job]) -> list[Cell]:
        self._folder /= "next"
        return super().measure(jobs)


def evaluator(
    session: object,
    root: Path,
    *words: str,
    auc_loss: bool = False,
    configurations: Sequence[Configuration] = WINDOWS,
    say: Callable[[str], None] = print,
) -> LiveEvaluator:
    bounds = [word for word in words if limits.is_limit(word.partition("=")[0])]
    task = [] if any(word.startswith("task=") for word in words) else ["task=rank"]
    fixed = [*task, "engine=hstu", *(word for word in words if word not in bounds)]
    declared = config.declare([*fixed, *bounds, "space=typed", "engine.cpu_threads=1,2"])
    if auc_loss:
        asked = (*declared.goal.limits, limits.parse("quality.auc_loss", "0.1%"))
        declared = dataclasses.replace(declared, goal=dataclasses.replace(declared.goal, limits=asked))
    scenario = f"scenario={declared.scenario}"
    specs = {
        c: compose_spec([*declared.fixed, *c.words, *([] if scenario in declared.fixed else [scenario])])[0]
        for c in configurations
    }
    qualities = Qualities(declared, specs)
    return LiveEvaluator(cast(CellSession, session), declared, specs, qualities, root, root / "sweep", say)


def test_another_model_is_not_judged_by_its_own_reference_where_the_default_failed(tmp_path: Path) -> None:
    found = {0: (Status.OOM, 0.0, 0.0), 64: (Status.OK, 0.60, 0.0001)}
    measures = evaluator(Measured(tmp_path, found), tmp_path / "none", auc_loss=True)
    assert measures.evaluate(DEFAULT, OFFLINE).status == "OOM"
    outcome = measures.evaluate(WINDOW, OFFLINE)
    assert not outcome.ok and outcome.error == "its loss is unknown: the default configuration failed"
    unlimited = evaluator(Measured(tmp_path / "unlimited", found), tmp_path / "none")
    assert not unlimited.evaluate(DEFAULT, OFFLINE).ok
    figures = unlimited.evaluate(WINDOW, OFFLINE).metrics
    assert figures["quality/auc"] == 0.60 and not any(name.endswith("loss") for name in figures)


def test_probes_beside_each_other_take_the_time_of_the_longest(tmp_path: Path) -> None:
    session = SimpleNamespace(parts=[LocalPart(Share((core,)), 1) for core in (0, 1)])
    two, one = (evaluator(its, tmp_path, "budget=100s") for its in (session, Measured(tmp_path, {})))
    short, long, third = ((WINDOW, Probe(100.0, requests, seed)) for requests, seed in RUNS)
    assert one.share([long, short]) == pytest.approx(one.share([long]) + one.share([short]))
    assert two.share([long, short]) == two.share([long]) == one.share([long])
    assert two.share([long, short, third]) == pytest.approx(2 * two.share([long]))


@pytest.mark.parametrize("budget", ["budget=4cells", "budget=1000s"])
def test_a_budget_is_of_this_call_in_cells_as_in_time(tmp_path: Path, budget: str) -> None:
    """A record of an earlier call costs neither a cell nor its seconds."""

    class Kept(Measured):
        kept = True

        def measure(self, jobs: Sequence[Job]) -> list[Cell]:
            return [cell._replace(kept=self.kept) for cell in super().measure(jobs)]

    session = Kept(tmp_path, {0: (Status.OK, 0.7, 0.0), 64: (Status.OK, 0.7, 0.0)})
    measures = evaluator(session, tmp_path / "none", budget)
    measures.evaluate(DEFAULT, OFFLINE)
    assert measures.left() == pytest.approx(1.0, abs=0.01)
    session.kept = False
    measures.evaluate(WINDOW, OFFLINE)
    assert measures.left() == pytest.approx(0.75 if "cells" in budget else 1.0, abs=0.01)


def test_runs_are_judged_by_the_latencies_in_their_files(tmp_path: Path) -> None:
    for scale in (1, 2):
        write_cell(tmp_path / str(scale), scale=float(scale))
    lines: list[str] = []
    measures = evaluator(Measured(tmp_path, {}), tmp_path / "none", say=lines.append)
    found = [
        Outcome("OK", record.metrics, record.intervals, folder=folder) for folder, record in records.find(tmp_path)
    ]
    both = measures.pool(found)
    latencies = np.concatenate([load_samples(outcome.folder)["latency_ms"] for outcome in found])
    assert both.metrics["latency_ms/p99"] == stats.percentile(latencies, 99.0) and both.metrics["samples"] == 3000
    low, high = both.intervals["latency_ms/p99"]
    assert low < both.metrics["latency_ms/p99"] < high
    own = [outcome.metrics["latency_ms/p99"] for outcome in found]
    assert min(own) < both.metrics["latency_ms/p99"] < max(own)
    (tmp_path / "1" / records.SAMPLES_FILE).write_bytes(b"cut")
    assert measures.pool(found).metrics["latency_ms/p99"] == max(own)
    assert "not readable as parquet" in lines[0] and lines[0].endswith("until then the worst run stands for all")


def test_probes_of_recorded_visits_are_compared_request_by_request(tmp_path: Path) -> None:
    """Cells of several rates have the same latencies but for a scale, so that nothing but the trace is alike."""
    for scale in (1, 2):
        write_cell(tmp_path / str(scale), scale=float(scale))
    lines: list[str] = []
    measures = evaluator(Measured(tmp_path, {}), tmp_path / "none", say=lines.append)
    one, other, lost = (Outcome("OK", folder=tmp_path / name) for name in ("1", "2", "3"))
    assert measures.alike([one, other], 99.0) == 1.0  # no difference
    samples = load_samples(tmp_path / "2")
    samples["latency_ms"] = np.repeat(np.random.default_rng(0).random(150), 10)
    samples.to_parquet(tmp_path / "2" / records.SAMPLES_FILE)
    assert measures.alike([one, other], 99.0) == 1.0  # as it was read
    ranks = [np.argsort(np.argsort(load_samples(tmp_path / name)["latency_ms"], kind="stable")) for name in "12"]
    expected = stats.samples_of_runs([its / 1500 for its in ranks], 90.0) / 3000
    assert measures.alike([one, other], 90.0) == expected < 0.3
    assert measures.alike([one, lost], 90.0) == measures.alike([one, lost], 90.0) == 0.0
    assert len(lines) == 1 and "no such file" in lines[0]
    drawn = evaluator(Measured(tmp_path, {}), tmp_path / "none", "workload=synthetic")
    assert drawn.alike([one, other], 90.0) == 0.0  # another seed draws other events


def test_latencies_are_in_the_order_in_which_requests_were_issued(tmp_path: Path) -> None:
    """Runs are compared request by request, and answers may end in another order."""
    write_cell(tmp_path / "1")
    samples = load_samples(tmp_path / "1")
    samples.sample(frac=1.0, random_state=1).to_parquet(tmp_path / "1" / records.SAMPLES_FILE)
    assert not load_samples(tmp_path / "1")["request_id"].is_monotonic_increasing
    in_order = samples.sort_values("request_id")["latency_ms"]
    assert live.latencies_of(tmp_path / "1").tolist() == in_order.tolist()


@pytest.mark.parametrize("typed, kept", [([], True), (["runner.keep_engine=false"], False)])
def test_a_certifying_run_with_more_requests_takes_the_engine_of_its_seed(
    tmp_path: Path, typed: list[str], kept: bool
) -> None:
    session = Measured(tmp_path, {64: (Status.OK, 0.75, 0.0)})
    measures = evaluator(session, tmp_path / "none", "budget=1000s", *typed)
    sure = Probe(100.0, 10_000, 101)
    longer, other = dataclasses.replace(sure, requests=30_000), dataclasses.replace(sure, requests=30_000, seed=102)
    keys = [engine_key(compose_spec(measures.words(WINDOW, probe))[0]) for probe in (sure, longer, other, SERVER)]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    assert measures.share([(WINDOW, longer)]) == measures.share([(WINDOW, other)])
    measures.evaluate(WINDOW, sure)
    start_s = 1000 * (measures.share([(WINDOW, other)]) - measures.share([(WINDOW, longer)]))
    assert start_s == pytest.approx(FIRST_S - CELL_S if kept else 0.0)


@pytest.mark.parametrize(
    "budget, words",
    [
        ("0cells", "about 44 s: set budget=1min"),
        ("1s", "about 44 s: set budget=1min"),
        ("1cells", "2 cells: set budget=3cells"),
    ],
)
def test_a_budget_without_room_is_answered_with_one_to_type(tmp_path: Path, budget: str, words: str) -> None:
    measures = evaluator(Measured(tmp_path, {}), tmp_path / "none", f"budget={budget}")
    probes = [(WINDOW, Probe(1000.0, 10_000, seed)) for seed in (101, 102)]  # 12 s of a cell beside 10 s of requests
    assert measures.budget_for(probes) == words and measures.share(probes) > 1
    enough = evaluator(Measured(tmp_path, {}), tmp_path / "none", words.rpartition(" ")[2])
    assert enough.share(probes) <= MOST


def test_the_time_left_is_that_of_the_budget_and_of_what_still_certifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certifying run may take as long as all probes of the search."""
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])

    class Timed(Repeated):
        def measure(self, jobs: Sequence[Job]) -> list[Cell]:
            now[0] += CELL_S
            return super().measure(jobs)

    found = dict.fromkeys((0, 64), (Status.OK, 0.75, 0.0))
    runs = [(WINDOW, Probe(100.0, 30_000, seed)) for seed in (101, 102)]  # 300 s each
    for budget, rest_s, with_runs_s in (("20cells", 18 * CELL_S, 600 + 16 * CELL_S), ("1000s", 1000, 1000)):
        measures = evaluator(Timed(tmp_path / budget, found), tmp_path / "none", f"budget={budget}")
        for configuration in WINDOWS:
            measures.evaluate(configuration, OFFLINE)
        assert measures.share([(configuration, OFFLINE)]) > 0  # it says what others like it take
        assert measures.rest_s([]) == pytest.approx(rest_s, abs=8)
        assert measures.rest_s(runs) == pytest.approx(with_runs_s, abs=30)
        measures.evaluate(*runs[0])
        assert measures.rest_s(runs) == pytest.approx(300 + 16 * CELL_S if "cells" in budget else 1000, abs=20)
    short = evaluator(Measured(tmp_path / "short", found), tmp_path / "none", "budget=100s")
    assert short.rest_s(runs) == pytest.approx(600, abs=30)  # a certification that has begun ends


def test_a_probe_that_takes_long_is_announced(tmp_path: Path) -> None:
    lines: list[str] = []
    found = {64: (Status.OK, 0.75, 0.0)}
    measures = evaluator(Repeated(tmp_path, found), tmp_path / "none", "budget=1000s", say=lines.append)
    for probe in (Probe(100.0, 200), Probe(100.0, 10_000, 101)):
        measures.evaluate(WINDOW, probe)
    [line] = lines
    assert line[8:].startswith(f" {WINDOW.name}: certifying at 100 requests/s, 10,000 requests: takes about 1")


@pytest.mark.parametrize(
    "typed, kept, longest_s",
    [
        ([], True, [1800.0, 1800.0, 1800.0, 150.0, 60.0, 150.0]),
        (["runner.keep_engine=false", "runner.timeout_s=70"], False, 6 * [70.0]),
    ],
)
def test_every_cell_keeps_its_engine_and_has_a_part_of_the_budget(
    tmp_path: Path, typed: list[str], kept: bool, longest_s: list[float]
) -> None:
    """Places go by the options of each cell: tests/cli/test_parallel.py has what they do with them."""
    given: list[Job] = []

    class Noting(Repeated):
        def measure(self, jobs: Sequence[Job]) -> list[Cell]:
            given.extend(jobs)
            return super().measure(jobs)

    for budget in ("budget=20cells", "budget=300s"):
        session = Noting(tmp_path / budget, dict.fromkeys((0, 64), (Status.OK, 0.75, 0.0)))
        measures = evaluator(session, tmp_path / "none", budget, *typed)
        for configuration, probe in ((DEFAULT, OFFLINE), (WINDOW, OFFLINE), (WINDOW, SERVER)):
            measures.evaluate(configuration, probe)
    runners = [job.config[1].runner for job in given]
    assert [runner.keep_engine for runner in runners] == 6 * [kept]
    assert [runner.timeout_s for runner in runners] == longest_s


@pytest.mark.parametrize(
    "words, configuration, probe, added",
    [
        (["budget=300s"], WINDOW, OFFLINE, FIFTH),
        (["budget=300s"], WINDOW, SERVER, HALF),
        (["budget=300s"], DEFAULT, OFFLINE, HALF),
        (["budget=300s", "runner.timeout_s=70"], WINDOW, OFFLINE, ""),
        (["budget=20cells"], WINDOW, OFFLINE, ""),
        (["budget=3h"], WINDOW, OFFLINE, ""),  # the default limit is shorter
    ],
)
def test_a_time_limit_that_nobody_typed_says_where_it_comes_from(
    tmp_path: Path, words: list[str], configuration: Configuration, probe: Probe, added: str
) -> None:
    measured = Measured(tmp_path, dict.fromkeys((0, 64), (Status.TIMEOUT, 0.0, 0.0)))
    outcome = evaluator(measured, tmp_path / "none", *words).evaluate(configuration, probe)
    assert outcome.status == "TIMEOUT" and outcome.error == f"what TIMEOUT means here{added}"
    more = "; a longer budget or runner.timeout_s=SECONDS" if added else "; runner.timeout_s=SECONDS"
    assert f" s{added.partition(';')[0]}{')' * bool(added)}{more} gives it more" in outcome.within


def test_damaged_samples_cost_the_times_of_batches_and_a_line_says_so(tmp_path: Path) -> None:
    folder, lines = tmp_path / "0", list[str]()
    record = write_cell(folder, "scenario=offline")
    session = SimpleNamespace(parts=(), has=lambda spec: False, measure=lambda jobs: [Cell(folder, record, False)])
    assert evaluator(session, tmp_path / "none", say=lines.append).evaluate(DEFAULT, OFFLINE).batches and not lines
    (folder / records.SAMPLES_FILE).write_bytes(b"")
    outcome = evaluator(session, tmp_path / "none", say=lines.append).evaluate(DEFAULT, OFFLINE)
    assert outcome.ok and not outcome.batches and outcome.metrics["throughput_rps"] > 0
    [line] = lines
    assert line.startswith(f"{folder}/samples.parquet: not readable as parquet") and "rerun=true" in line


def test_a_cell_with_emulated_products_is_no_answer_of_a_search(tmp_path: Path) -> None:
    for device, status in (("cuda", "OK"), ("cpu", "UNAVAILABLE")):
        folder = tmp_path / device
        record = write_cell(folder, "scenario=offline", actual={"fp8_products": fp8.runs_as(device)})
        cells = [Cell(folder, record, False)]
        session = SimpleNamespace(parts=(), has=lambda spec: False, measure=lambda jobs, cells=cells: cells)
        outcome = evaluator(session, tmp_path / "none").evaluate(DEFAULT, OFFLINE)
        assert (outcome.status, "emulated" in outcome.error) == (status, status != "OK")
        assert ("throughput_rps" in outcome.metrics) is outcome.ok


def test_an_outcome_has_the_cores_of_others_that_its_record_notes(tmp_path: Path) -> None:
    for name, notes, busy in (("noted", [f"{BESIDE} used 1.4 of 2 cores"], 1.5), ("few", ["before this cell"], 0.0)):
        folder = tmp_path / name
        record = write_cell(folder, "scenario=offline")
        record.notes, record.metrics["others/cores_peak"] = notes, 1.5
        cells = [Cell(folder, record, False)]
        session = SimpleNamespace(parts=(), has=lambda spec: False, measure=lambda jobs, cells=cells: cells)
        assert evaluator(session, tmp_path / "none").evaluate(DEFAULT, OFFLINE).busy == busy


def test_a_budget_for_a_first_probe_has_it_end_within_its_time_limit(tmp_path: Path) -> None:
    measures = evaluator(Measured(tmp_path, {}), tmp_path / "none", "budget=60s")
    measures._starts.add(WINDOW, 100.0)
    assert measures.budget_for([(WINDOW, OFFLINE)]) == "about 103 s: set budget=9min"  # a fifth is its limit
    assert measures.budget_for([(WINDOW, SERVER)]).endswith("set budget=3min")
    typed = evaluator(Measured(tmp_path, {}), tmp_path / "none", "budget=60s", "runner.timeout_s=300")
    typed._starts.add(WINDOW, 100.0)
    assert typed.budget_for([(WINDOW, OFFLINE)]).endswith("set budget=3min")


def test_the_loss_of_another_model_is_against_the_default(tmp_path: Path) -> None:
    found = {0: (Status.OK, 0.75, 0.0), 64: (Status.OK, 0.60, 0.0001)}
    measures = evaluator(Measured(tmp_path, found), tmp_path / "none", auc_loss=True)
    assert measures.evaluate(DEFAULT, OFFLINE).metrics["quality/auc_loss"] == 0.0
    outcome = measures.evaluate(WINDOW, OFFLINE)
    assert outcome.ok and outcome.metrics["quality/auc_loss"] == pytest.approx(0.2)


def test_the_loss_of_lists_is_a_limit_by_the_name_of_the_figure(tmp_path: Path) -> None:
    """`quality/loss/hr10` has the end of a figure of which more is better: as a limit it would be a floor.

    Its interval decides, also of later cells, which do not compute the quality again.
    """
    folder = tmp_path / "0"
    write_cell(folder, "scenario=offline")
    first, later = records.load(folder), records.load(folder)
    first.metrics |= {"quality/hr10": 0.1, "quality/loss/hr10": 0.02}
    first.intervals |= {"quality/hr10": [0.08, 0.12], "quality/loss/hr10": [-0.01, 0.04]}
    cells = iter([Cell(folder, record, False) for record in (first, later, first)])
    session = SimpleNamespace(parts=(), has=lambda spec: False, measure=lambda jobs: [next(cells)])
    measures = evaluator(session, tmp_path / "none")
    for probe in (OFFLINE, SERVER):
        outcome = measures.evaluate(DEFAULT, probe)
        assert outcome.metrics["quality/hr10_loss"] == 0.02
        assert not any(name.startswith("quality/loss/") for name in [*outcome.metrics, *outcome.intervals])
        for bound, verdict in (("1%", "broken"), ("3%", "likely kept"), ("4%", "kept")):
            assert limits.parse("quality.hr10_loss", bound).judge(outcome) == verdict
        for bound, verdict in (("0.11", "broken"), ("0.09", "likely kept"), ("0.08", "kept")):
            assert limits.parse("quality.hr10", bound).judge(outcome) == verdict
    window = measures.evaluate(WINDOW, OFFLINE)  # its loss is another one, against the default
    assert window.metrics["quality/hr10_loss"] == 0.0 and "quality/hr10_loss" not in window.intervals
    assert window.intervals["quality/hr10"] == [0.08, 0.12]


@pytest.mark.parametrize(
    "option, asked",
    [
        ("cache.memory_gb=0.02", False),
        ("cache.precision=int8", True),
        ("engine.precision=fp8", True),
        ("workload.max_history=20", True),
    ],
)
def test_quality_is_asked_again_only_where_the_answers_differ(tmp_path: Path, option: str, asked: bool) -> None:
    key, _, value = option.partition("=")
    base, other = Configuration((("cache.policy", "lru"),)), Configuration(((key, value),))
    words = ["cache=lru", f"model.weights={WEIGHTS}", "model.tasks=[rated,liked]"]
    measured = Measured(tmp_path, {0: (Status.OK, 0.75, 0.0)})
    measures = evaluator(measured, tmp_path / "none", *words, auc_loss=True, configurations=[base, other])
    assert NO_QUALITY not in measures.words(base, OFFLINE)
    assert measures.evaluate(base, OFFLINE).ok
    assert NO_QUALITY in measures.words(base, OFFLINE)
    assert (NO_QUALITY not in measures.words(other, OFFLINE)) is asked


RANKER = [f"model.weights={WEIGHTS}"]
GENERATOR = ["task=generate", f"retrieval.weights={WEIGHTS}"]  # no file is read
RECOMMENDER = [*RANKER, *GENERATOR, "task=recommend", "engine=pipeline"]


@pytest.mark.parametrize(
    "words, asked",
    [
        (RANKER, False),
        ([*RANKER, "quality.auc=0.7"], True),
        ([*RANKER, "objective=pareto"], True),
        ([*RANKER, "gate.quality_requests=9"], True),
        ([*RANKER, "engine.precision=bf16"], True),
        ([*RANKER, "engine.precision=bf16", "gate.quality_requests=0"], False),
        ([*RANKER, "engine=onnxruntime", "engine.precision=int8"], True),
        ([*RANKER, "kernel=fp8"], True),
        ([*RANKER, "cache=lru"], False),
        ([*RANKER, "cache=lru", "cache.precision=int8"], True),
        (GENERATOR, False),
        ([*GENERATOR, "quality.hr10=0.01"], True),
        ([*GENERATOR, "engine=vllm", "engine.kv_cache_precision=fp8"], True),
        (RECOMMENDER, False),
        ([*RECOMMENDER, "engine.retrieve.precision=bf16"], True),
    ],
)
def test_quality_is_asked_only_where_it_is_read_or_may_be_lost(tmp_path: Path, words: list[str], asked: bool) -> None:
    """It takes minutes on a CPU. Nothing is cut for a loss: a limit decides."""
    [default] = configurations = [Configuration((("scenario.max_batch", "1"),))]
    measures = evaluator(Measured(tmp_path, {}), tmp_path / "none", *words, configurations=configurations)
    for probe in (OFFLINE, SERVER, dataclasses.replace(SERVER, seed=101)):
        typed = measures.words(default, probe)
        assert (NO_QUALITY not in typed and "gate.quality_requests=0" not in words) is asked
        assert f"gate.allow_loss={quality.LOSSY}" in typed


@pytest.mark.parametrize(
    "words, asked",
    [
        ([], True),
        (["engine.precision=fp32"], False),
        (["engine.device=cpu"], False),
        (["engine=tensorrt"], True),
        (["engine=onnxruntime", "engine.device=cpu"], False),
    ],
)
@pytest.mark.parametrize("gpu", [False, True])
def test_what_auto_is_on_this_device_decides_whether_quality_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], asked: bool, gpu: bool
) -> None:
    monkeypatch.setattr(quality, "visible_gpus", lambda: ["0"] if gpu else [])
    [default] = configurations = [Configuration((("scenario.max_batch", "1"),))]
    measures = evaluator(Measured(tmp_path, {}), tmp_path / "none", *RANKER, *words, configurations=configurations)
    always = "engine=tensorrt" in words  # it has no other device
    assert (NO_QUALITY not in measures.words(default, OFFLINE)) is (always or (asked and gpu))


@pytest.mark.parametrize("asked, seed", [([], 102), (["runner.keep_engine=false"], 0)])
def test_what_is_certified_is_evaluated_once_beyond_the_budget_on_the_engine_that_is_kept(
    tmp_path: Path, asked: list[str], seed: int
) -> None:
    jobs: list[Job] = []

    class Noted(Repeated):
        def measure(self, more: Sequence[Job]) -> list[Cell]:
            jobs.extend(more)
            return super().measure(more)

    default, other = kernels = [Configuration((("kernel", name),)) for name in ("auto", "torch")]
    session = Noted(tmp_path, {0: (Status.OK, 0.75, 0.0)})
    words = [*RANKER, "model.tasks=[rated,liked]", *asked]
    measures = evaluator(session, tmp_path / "none", *words, "budget=1cells", configurations=kernels)
    measures._qualities.learn = lambda *given: None  # type: ignore[method-assign]  # `Measured` has it in each record
    assert measures.evaluate(other, Probe(100.0, 10_000, 102)).ok and NO_QUALITY in jobs[0].overrides
    del measures._qualities.learn
    found = measures.evaluate_quality(other)
    assert found is not None and found.metrics["quality/auc"] == 0.75
    spec = jobs[1].config[0]
    assert (spec.scenario.name, spec.seed, spec.gate.quality_requests > 0) == ("offline", seed, True)
    assert not measures._qualities.due(other) and measures._qualities.due(default)
    none = evaluator(session, tmp_path / "none", *words, "budget=0cells", configurations=kernels)
    assert none.evaluate_quality(default) is None
    words += ["budget=1cells", "gate.quality_requests=0"]
    out = evaluator(session, tmp_path / "none", *words, configurations=kernels)
    assert not out._qualities.due(default) and len(jobs) == 2


def test_the_seconds_of_an_evaluation_are_no_start(tmp_path: Path) -> None:
    """It is announced, and has the time of a whole cell."""
    lines: list[str] = []
    default, other = kernels = [Configuration((("kernel", name),)) for name in ("auto", "torch")]
    words = [*RANKER, "model.tasks=[rated,liked]", "engine.precision=bf16", "budget=300s"]
    session = Measured(tmp_path, {0: (Status.OK, 0.75, 0.0)})
    measures = evaluator(session, tmp_path / "none", *words, configurations=kernels, say=lines.append)
    cell = session.measure

    def evaluated(jobs: Sequence[Job]) -> list[Cell]:
        [(_, record, _)] = found = cell(jobs)
        record.duration_s, record.metrics[live.EVALUATING], record.metrics[live.STARTED] = 100.0, 80.0, 5.0
        return found

    session.measure = evaluated  # type: ignore[method-assign]
    before = measures.share([(other, OFFLINE)])
    measures.evaluate(default, OFFLINE)
    assert "evaluates the weights, once for all loads and batches" in lines[0]
    expected = (100.0 + live.OFFLINE_S) / 300.0
    assert measures.share([(other, OFFLINE)]) == pytest.approx(expected, rel=0.02) and before < expected
    assert measures.share([(default, OFFLINE)]) < 0.1
    _, run, _ = measures._compose(other, OFFLINE)
    assert measures._options(run, other, OFFLINE).runner.timeout_s == 150.0


@pytest.mark.parametrize("limit", [[], ["quality.auc_loss=0.1%"]])
def test_an_evaluation_that_takes_too_long_is_begun_once(tmp_path: Path, limit: list[str]) -> None:
    """Each load would take half of the budget again. A limit needs it all the same."""
    default, other = loads = [Configuration((("scenario.max_batch", size),)) for size in ("1", "4")]
    measured = Measured(tmp_path, {0: (Status.TIMEOUT, 0.0, 0.0)})
    words = [*RANKER, "engine.precision=bf16", "budget=300s", *limit]
    measures = evaluator(measured, tmp_path / "none", *words, configurations=loads)
    found = measures.evaluate(other, OFFLINE)
    assert found.status == "TIMEOUT" and found.error.endswith(HALF)
    assert (NO_QUALITY in measures.words(default, OFFLINE)) is (not limit)
    assert measures._qualities.due(default) is bool(limit)
    assert measures._qualities.why_none(default).startswith("the probe that was to evaluate it took too long; ")


def test_a_window_is_compared_with_the_default_without_a_limit(tmp_path: Path) -> None:
    """Both are evaluated, once each; what answers as the default does needs nothing."""
    kernels = [Configuration((("kernel", name),)) for name in ("auto", "torch")]
    windows = [Configuration((*kernel.values, ("model.max_attn_len", "64"))) for kernel in kernels]
    measured = Measured(tmp_path, {0: (Status.OK, 0.75, 0.0), 64: (Status.OK, 0.60, 0.0)})
    words = [*RANKER, "model.tasks=[rated,liked]"]
    measures = evaluator(measured, tmp_path / "none", *words, configurations=[*kernels, *windows])
    asked = [NO_QUALITY not in measures.words(its, OFFLINE) for its in (*kernels, *windows)]
    assert asked == [True, False, True, True]
    assert measures.evaluate(kernels[0], OFFLINE).ok
    assert measures.evaluate(windows[0], OFFLINE).metrics["quality/auc_loss"] == pytest.approx(0.2)
    assert NO_QUALITY in measures.words(kernels[0], SERVER) and NO_QUALITY in measures.words(windows[0], SERVER)
    known = measures._qualities
    assert known.against_default(windows[0]) == {}  # no cell has resamples
    drawn = np.linspace(0.70, 0.80, 1001)
    for window, share in ((0, 1.0), (64, 0.8)):
        resamples = pd.DataFrame({"auc": share * drawn, "ne": drawn / share})
        resamples.to_parquet(tmp_path / str(window) / records.RESAMPLES_FILE)
    ends = known.against_default(windows[0])
    assert ends["quality/auc_loss"] == pytest.approx([0.2, 0.2]) and ends["quality/ne_loss"] == pytest.approx(
        [0.25, 0.25]
    )
    assert known.against_default(kernels[0]) == {}  # its own reference has them


@pytest.mark.parametrize(
    "words, probed, stops, certified",
    [
        (["latency_ms.p99=20", "latency_ms.p99.9=300"], 300.0, True, 20.0),
        (["latency_ms.p99=20"], 20.0, True, 20.0),
        ([], 80.0, True, 80.0),
        (["latency_limit_ms=30", "latency_ms.p90=300"], 30.0, False, 30.0),
        (["latency_limit_ms=30", "latency_ms.p99=300", "goodput_rps=5"], 30.0, False, 30.0),
        (["latency_ms.p99=20", "scenario=trace_replay"], 20.0, False, 20.0),
    ],
)
def test_a_probe_is_stopped_by_the_widest_limit_of_the_search(
    tmp_path: Path, words: list[str], probed: float, stops: bool, certified: float
) -> None:
    measures = evaluator(Measured(tmp_path, {}), tmp_path / "none", *words)

    def spec(probe: Probe) -> Any:
        return compose_spec(measures.words(DEFAULT, probe))[0]

    server, sure = spec(SERVER), spec(dataclasses.replace(SERVER, seed=101))
    assert spec(OFFLINE).latency_limit_ms == server.latency_limit_ms == probed  # they share an engine
    assert getattr(server.scenario, "stop_hopeless", False) is stops
    assert sure.latency_limit_ms == certified and not getattr(sure.scenario, "stop_hopeless", False)


def keep(folder: Path, words: list[str], status: Status = Status.OK, **metrics: float) -> None:
    """Write the record of an earlier cell that this code on this machine would make again."""
    record, spec = write_cell(folder, status=status), compose_spec(words)[0]
    record.spec, record.files, record.spec_hash = spec.to_dict(), spec.file_contents(), spec.hash
    record.environment = describe_environment(spec.packages)
    record.gate["measured"] = {"passed": True}
    record.metrics.update(metrics)
    records.save(record, folder)


@pytest.mark.parametrize("read", [["quality.auc_loss=0.1%"], ["objective=pareto"]])
def test_records_without_quality_are_taken_over_only_where_it_is_not_read(tmp_path: Path, read: list[str]) -> None:
    """All count once one that answers the same has it."""
    default, other = kernels = [Configuration((("kernel", name),)) for name in ("auto", "torch")]
    words = [f"model.weights={WEIGHTS}", "model.tasks=[rated,liked]"]
    first = evaluator(Measured(tmp_path, {}), tmp_path, *words, configurations=kernels)
    sure = Probe(100.0, 12_000, 101)
    for name, probe in (("1", SERVER), ("2", sure)):
        keep(tmp_path / name, first.words(other, probe))

    def known(*more: str) -> list[int]:
        measures = evaluator(Measured(tmp_path, {}), tmp_path, *words, *more, configurations=kernels)
        return [len(measures.known(other)), len(measures.certifying(other))]

    assert known() == [1, 1] and known(*read) == [0, 0]
    later = evaluator(Measured(tmp_path, {}), tmp_path, *words, *read, configurations=kernels)
    figures = {"quality/auc": 0.7, "quality/loss/auc": 0.0}
    keep(tmp_path / "3", later.words(default, SERVER), **figures)
    keep(tmp_path / "4", later.words(other, SERVER), **figures)
    assert known() == [2, 1]  # those with quality too
    measures = evaluator(Measured(tmp_path, {}), tmp_path, *words, *read, configurations=kernels)
    assert len(measures.known(default)) == 1
    assert [len(measures.known(other)), len(measures.certifying(other))] == [2, 1]
    assert NO_QUALITY in measures.words(other, SERVER)


def test_a_record_counts_if_a_later_configuration_that_answers_the_same_has_the_quality(tmp_path: Path) -> None:
    """A search evaluates the first of them that it asks, which need not be the first of the space."""
    one, four = loads = [Configuration((("scenario.max_batch", size),)) for size in ("1", "4")]
    words = [*RANKER, "model.tasks=[rated,liked]", "engine.precision=bf16"]
    first = evaluator(Measured(tmp_path, {}), tmp_path, *words, configurations=loads)
    evaluated = first.words(four, OFFLINE)
    keep(tmp_path / "1", evaluated, **{"quality/auc": 0.7})
    keep(tmp_path / "2", [*first.words(one, OFFLINE), NO_QUALITY])
    later = evaluator(Measured(tmp_path, {}), tmp_path, *words, configurations=loads)
    [(probe, outcome)] = later.known(one)
    assert probe == OFFLINE and outcome.metrics["quality/auc"] == 0.7 and NO_QUALITY not in evaluated


@pytest.mark.parametrize("words", [["engine.precision=bf16"], ["objective=pareto"]])
def test_quality_of_another_number_of_requests_is_evaluated_again(tmp_path: Path, words: list[str]) -> None:
    """Its users are others, and their number decides the interval."""
    few, words = ["gate.quality_requests=100"], [*RANKER, "model.tasks=[rated,liked]", *words]
    [default] = configurations = [Configuration((("scenario.max_batch", "1"),))]
    first = evaluator(Measured(tmp_path, {}), tmp_path, *words, *few, configurations=configurations)
    keep(tmp_path / "cell", first.words(default, OFFLINE), **{"quality/auc": 0.7})
    for more, same in ((few, True), ([], False), (["gate.quality_requests=0"], False)):
        later = evaluator(Measured(tmp_path, {}), tmp_path, *words, *more, configurations=configurations)
        assert len(later.known(default)) == (same or NO_QUALITY in more)
        assert later.quality(default) == ({"quality/auc": 0.7} if same else {})
        assert (NO_QUALITY in later.words(default, OFFLINE)) is (same or NO_QUALITY in more)


@pytest.mark.parametrize("typed", [[], ["scenario.max_wait_ms=4"]])
def test_offline_probes_of_earlier_searches_are_taken_over(tmp_path: Path, typed: list[str]) -> None:
    """The default of the longest wait of a batch differs between the scenarios."""
    first = evaluator(Measured(tmp_path, {}), tmp_path, *typed)
    keep(tmp_path / "cell", first.words(DEFAULT, OFFLINE))
    later = evaluator(Measured(tmp_path, {}), tmp_path, *typed)
    assert [probe for probe, _ in later.known(DEFAULT)] == [OFFLINE] and not later.known(WINDOW)


@pytest.mark.parametrize("certifies", [False, True])
def test_a_rate_that_was_stopped_under_a_tighter_limit_is_open(tmp_path: Path, certifies: bool) -> None:
    first = evaluator(Measured(tmp_path, {}), tmp_path, "latency_ms.p99=20")
    probe = Probe(100.0, 12_000, 101) if certifies else SERVER
    keep(tmp_path / "cell", [*first.words(DEFAULT, probe), "scenario.stop_hopeless=true"], Status.STOPPED)
    same, wider = (evaluator(Measured(tmp_path, {}), tmp_path, f"latency_ms.p99={bound}") for bound in (20, 300))
    found, gone = (its.certifying(DEFAULT) if certifies else its.known(DEFAULT) for its in (same, wider))
    assert [outcome.status for _, outcome in found] == ["STOPPED"] and gone == []


@pytest.mark.parametrize("rate, known", [(100, True), (200, False)])
def test_a_search_at_a_rate_takes_over_probes_at_this_rate_alone(tmp_path: Path, rate: int, known: bool) -> None:
    first = evaluator(Measured(tmp_path, {}), tmp_path)
    at = rates.rate_of(rates.step_below(100))
    for probe in (Probe(at, 12_000), Probe(at, 12_000, 101)):
        keep(tmp_path / f"seed {probe.seed}", first.words(DEFAULT, probe))
    later = evaluator(Measured(tmp_path, {}), tmp_path, "objective=latency", f"rate={rate}")
    assert [len(later.known(DEFAULT)), len(later.certifying(DEFAULT))] == [int(known), int(known)]


def test_a_run_with_fewer_answers_compared_certifies_nothing(tmp_path: Path) -> None:
    first = evaluator(Measured(tmp_path, {}), tmp_path, "gate.measured=8")
    keep(tmp_path / "cell", first.words(DEFAULT, Probe(100.0, 12_000, 101)))
    for words, found in (([], 0), (["gate.measured=8"], 1)):
        assert len(evaluator(Measured(tmp_path, {}), tmp_path, *words).certifying(DEFAULT)) == found


@pytest.mark.parametrize("bound, valid", [(20, 1.0), (300, 1.0), (10, None)])
def test_a_run_that_certified_under_another_limit_is_not_measured_again(
    tmp_path: Path, bound: int, valid: float | None
) -> None:
    first = evaluator(Measured(tmp_path, {}), tmp_path, "latency_ms.p99=20")
    sure = Probe(100.0, 12_000, 101)
    folder = tmp_path / "cell"
    keep(folder, first.words(DEFAULT, sure), loadgen_valid=1.0)

    measures = evaluator(Measured(tmp_path, {}), tmp_path, f"latency_ms.p99={bound}", "budget=0cells")
    assert measures.known(DEFAULT) == []  # the search does not see the seeds that judge it
    assert [probe for probe, _ in measures.certifying(DEFAULT)] == [sure] and measures.certifying(WINDOW) == []
    shorter = dataclasses.replace(sure, requests=10_000)
    assert measures.share([(DEFAULT, sure), (DEFAULT, shorter)]) == 0.0
    outcome = measures.evaluate(DEFAULT, shorter)  # `Measured` would fail, as it has no cell
    assert outcome.kept and outcome.folder == folder and outcome.metrics.get("loadgen_valid") == valid
    for other in ({"requests": 13_000}, {"seed": 102}, {"rate": 103.0}):
        assert measures.share([(DEFAULT, dataclasses.replace(sure, **other))]) > 1
    assert measures.share([(WINDOW, sure)]) > 1


def test_pages_of_vllm_in_8_bits_have_other_answers() -> None:
    """The load plays no part."""
    words = ([], ["scenario.max_batch=3"], ["engine.kv_cache_precision=int8"], ["engine.kv_cache_precision=fp8"])
    usual, other_load, *eight = (quality.alike(compose_spec(["engine=vllm", *its])[0]) for its in words)
    assert usual == other_load and len({usual, *eight}) == 3
