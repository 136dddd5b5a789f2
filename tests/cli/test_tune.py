"""`grbench tune`: refusals before anything runs, and one small search from end to end."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.beside import until
from helpers.command import Grbench
from helpers.forks import fork_command, fork_places
from helpers.searches import SEARCH, TINY
from helpers.serving import wait_until

from grbench import deployment
from grbench.execution import place, records, session
from grbench.execution.records import Status
from grbench.tune import certification


@pytest.mark.parametrize(
    "words, message",
    [
        *(
            ([f"latency_ms.{name}=3"], "=3: records have no such figure; allowed: latency_ms.p50, latency_ms.p90, ")
            for name in ("p98", "p9.9.9", "median")
        ),
        (["queue_ms.p99=3"], "queue_ms.p99=3: records have no such figure; allowed: queue_ms.p50, queue_ms.p90"),
        *(([f"{key}=3"], f"{key}=3: name the figure too") for key in ("latency_ms.", "quality.", "limits.")),
        (["latency_limit_ms=fast"], "latency_limit_ms=fast: it is no finite number"),
        *(
            (["engine=hstu", word], f"{word}: a search has one value of it; give one")
            for word in ("seed=1,2", "latency_limit_ms=20,40", "runner.timeout_s=5,60", "budget=1min,2min")
        ),
        (["latency_ms.p99=fast"], "latency_ms.p99=fast: it is no finite number"),
        (["latency_limit_ms=80%"], "latency_limit_ms=80%: it is no finite number"),
        (["quality.auc_loss=little"], "quality.auc_loss=little: it is no finite number, and no share such as 0.1%"),
        (["latency_ms.p99=0"], "latency_ms.p99=0: nothing keeps it"),
        (["limits.cache/hit_rate=2"], "limits.cache/hit_rate=2: it is a share of at most 1; allowed are such as 0.7"),
        (["latency_ms.p99=80", "limits.latency_ms.p99=3"], "two limits, 80 and 3; give one"),
        (
            ["budget=3min", "engine=hstu", "budget=5min"],
            "budget=3min budget=5min: a search has one value of budget; give",
        ),
        (
            ["latency_limit_ms=50", "latency_ms.p99=200"],
            "latency_limit_ms=50 and latency_ms.p99=200: two limits of p99; leave one out",
        ),
        (["quality.auc_loss=0.1%"], "quality is known only with trained weights and labels; give model.weights=FILE"),
        *(
            ([f"{key}={value}"], f"{key}={value}: it is no finite number")
            for key in ("latency_ms.p99", "quality.auc_loss", "limits.cache/hit_rate", "throughput_rps")
            for value in ("nan", "inf", "-nan%")
        ),
        (["quality.auc_los=0.1%"], "quality.auc_los=0.1%: task=rank has no such figure of quality; nearest: auc_loss;"),
        (["quality.hr10_loss=1%"], "quality.hr10_loss=1%: task=rank has no such figure of quality; nearest: ne_loss;"),
        (["task=generate", "quality.auc=0.7"], "task=generate has no such figure of quality; allowed: hr5, hr5_new"),
        (["quality.auc=2"], "quality.auc=2: it is a share of at most 1"),
        (["quality.rated/auc_loss=101%"], "quality.rated/auc_loss=101%: it is a share of at most 1"),
        (["objective=latency"], "it needs the load, rate=REQUESTS_A_SECOND"),
        (
            ["objective=latency", "rate=50", "throughput_rps=100"],
            "no more requests are answered than arrive; raise rate",
        ),
        (["rate=50"], "only objective=latency takes it"),
        (["budget=3"], "budget=3: allowed are a time or a number of cells, such as 90s"),
        (["objective=speed"], "objective=speed: allowed is one of throughput, latency, cost, pareto"),
        (["scenario=offline"], "scenario=offline: the search needs one with a rate; allowed: server, trace_replay"),
        (
            ["scenario.target_qps=50"],
            "the search sets scenario.target_qps for each probe; give instead: python -m grbench tune "
            "objective=latency rate=50",
        ),
        (
            ["engine=hstu,aoti", "scenario.queries=500"],
            "scenario.queries=500: the search sets scenario.queries for each probe; give instead: "
            "python -m grbench tune engine=hstu,aoti probe_s=20",
        ),
        (["scenario.mode=accuracy"], "scenario.mode=accuracy: the search measures performance; leave it out"),
        (["space=rank_tpu"], "space=rank_tpu: no such option; nearest: rank_gpu; allowed:"),
        (["engine=hstu,foo", "space=typed"], "engine=foo: no such option; allowed: "),
        *(
            (
                [f"scenario.max_bach={values}"],
                "tune: scenario.max_bach: no such key; nearest: scenario.max_batch; known",
            )
            for values in ("4", "4,8")
        ),
        (
            ["space=typed", "engine=onnxruntime", "engine.cuda_graphs=true,false"],
            "tune: engine.cuda_graphs: engine=onnxruntime has no cuda_graphs; set engine=",
        ),
        (["latency.p99=3"], "latency.p99=3: no such limit; nearest: latency_ms.p99"),
        (["gpu_memory.reserved=3,4"], "gpu_memory.reserved=3,4: no such limit; nearest: gpu_memory_mib.reserved"),
        (["p99=80"], "p99=80: no such limit; nearest: latency_ms.p99"),
        (
            ["budgt=3min"],
            "tune: budgt: no such key; nearest: budget; known keys: budget, cache, certify_runs, engine, ",
        ),
        (
            ["runner.output_root=/o ${z}"],
            """there is no z; for the text itself type 'runner.output_root="/o \\${z}"'""",
        ),
        (
            ["engine=hstu,aoti", "workload=csv", "workload.path=/d${x}/r.csv"],
            """tune: workload.path=/d${x}/r.csv: ${ refers to another option: there is no x; for the text itself """,
        ),
        (["limit.latency=3"], "tune: limit: no such key; nearest: limits; known keys: "),
        (["latency_limit=3"], "tune: latency_limit: no such key; nearest: latency_limit_ms; known"),
        (
            ["retrieval.beam_width=3"],
            "tune: retrieval.beam_width=3: task=rank searches for no items; set task=generate",
        ),
        (
            ["engine=hstu", "cache=none,lru", "cache.onload_share=0.5,0.6"],
            "tune: cache.onload_share=0.5: it is not read with cache.host_gb=0.0; set cache.host_gb too, or leave it",
        ),
        (
            ["engine=hstu", "engine.precision=fp32,fp7"],
            "tune: engine.precision=fp7: nearest: fp8; allowed is one of auto",
        ),
        (
            ["space=typed", "cache.onload_share=interval(0,1)"],
            "cache.onload_share=interval(0,1): an interval has no list of values; allowed are cache.onload_share=VALUE",
        ),
        (["engine=hstu", "scenario.max_batch=0,4"], "tune: scenario.max_batch=0: allowed is int >= 1 and <= 65536"),
        (["engine=hstu", "workload=csv", "workload.path=none.csv"], "tune: workload.path=none.csv: no such file"),
        (["space=typed", "engine=vllm,hf", "task=rank"], "the space is empty: none of 2 combinations can run here"),
    ],
)
def test_a_wrong_declaration_is_one_line(grbench_here: Grbench, words: list[str], message: str) -> None:
    done = grbench_here("tune", *words)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("grbench tune: ") and message in line


@pytest.mark.usefixtures("forked_workers")
def test_a_small_search_writes_its_cells_its_page_and_a_deployment(grbench_here: Grbench, tmp_path: Path) -> None:
    words = ["tune", *TINY, "scenario.max_batch=4", "engine.cpu_threads=1,2", "latency_ms.p50=60000", "certify_runs=0"]
    words += ["objective=latency", "rate=400", "probe_s=1"]
    done = grbench_here(*words, "limits.latency_ms.p99=60000", "budget=2cells")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Take cpu_threads=")
    [folder] = (tmp_path / "outputs" / "tune").iterdir()
    loaded = deployment.load(folder / "best.yaml")
    assert loaded.task == "rank" and loaded.limits["latency_ms.p99"] == 60000
    assert loaded.strategies[0].certified is None  # nothing certified it
    loaded.specs()
    facts = json.loads((folder / "tune.json").read_text())
    assert len(facts["trials"]) == 2 and facts["certified"] is False
    assert facts["charts"][0]["key"] == "pareto" and len(facts["pareto"]) >= 1
    assert len(json.loads((folder / "cells.json").read_text())) == 2
    page = (folder / "tune.html").read_text()
    assert "plotly" in page and "Pareto front" in (folder / "tune.md").read_text()
    assert "figure_coordinates" in page and '"parcoords"' in page and '"label":"cpu_threads"' in page
    text = (folder / "best.yaml").read_text()
    assert yaml.safe_load(text)["version"] == 1
    comment = "# The strategy is not certified, one run with the search's own seed: certify_runs=0 asks for no others."
    assert text.splitlines()[1] == comment

    again = grbench_here(*words, "limits.latency_ms.p99=50000", "budget=0cells")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("Take cpu_threads=")
    [new] = [path for path in (tmp_path / "outputs" / "tune").iterdir() if path != folder]
    assert not (new / "cells.json").exists()  # the records of the first search answer
    taken = f"takes over 2 probes of 2 configurations from {folder.relative_to(tmp_path)}, at no cost "
    assert taken in again.stderr and "takes over" not in done.stderr
    first, second = done.stderr.splitlines()[:2]
    assert first.endswith("budget of this call: 2 cells") and second == "searched: engine.cpu_threads=1,2"
    assert f"\nserve it: grbench serve deployment={new.relative_to(tmp_path)}/best.yaml\n" in again.stderr
    for most, lost in (200_000, ["page"]), (300, ["deployment", "page"]):  # a limit of a file's size is a full disk
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            full = grbench_here(*words, "limits.latency_ms.p99=50000", "budget=0cells")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert full.returncode == 2 and full.stdout == again.stdout
        lines = [line for line in full.stderr.splitlines() if "could not be written" in line]
        assert [re.sub(r".*: the (\w+) could.*", r"\1", line) for line in lines] == lost
        assert "File too large; free space there, then give the same command again" in lines[0]
        assert ("serve it" in full.stderr) == ("deployment" not in lost)
    fresh = grbench_here(*words, "limits.latency_ms.p99=50000", "budget=0cells", "rerun=true")
    assert fresh.returncode == 1 and "no record answers" in fresh.stderr and "takes over" not in fresh.stderr


@pytest.mark.usefixtures("forked_workers")
def test_a_deployment_of_ones_own_groups_is_found_from_another_folder(
    grbench_here: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file names the folder of the groups, and the path of the data that only a group has."""
    (tmp_path / "own" / "workload").mkdir(parents=True)
    of = "defaults: [/schema/workload/csv@_here_, _self_]\nname: mine\npath: log.csv\nnum_candidates: 4\n"
    (tmp_path / "own" / "workload" / "mine.yaml").write_text(of)
    rows = [f"{user},{item},{item * 5000}" for user in (1, 2) for item in range(30)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    words = [word for word in TINY if not word.startswith("workload")]
    words += ["scenario.max_batch=4", "latency_ms.p50=60000", "certify_runs=0", "probe_s=1", "budget=1cells"]
    words += ["objective=latency", "rate=400", "space=typed", "workload=mine"]
    done = grbench_here("tune", "--config-dir", "own", *words)
    assert done.returncode == 0, done.stderr
    [file] = (tmp_path / "outputs" / "tune").glob("*/best.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = deployment.load(file)
    assert loaded.config_dir == str(tmp_path / "own")
    [spec] = loaded.specs(file).values()
    assert (spec.workload.name, spec.workload.path) == ("mine", str(tmp_path / "log.csv"))


@pytest.mark.usefixtures("forked_workers")
def test_a_certified_answer_is_certified_under_another_limit_without_measuring(
    grbench_here: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certification, "CERTIFIED", 400)
    words = ["tune", *TINY, "scenario.max_batch=4", "engine.cpu_threads=1,2", "certify_runs=1", "probe_s=1"]
    words += ["objective=latency", "rate=400"]
    done = grbench_here(*words, "latency_ms.p50=60000", "budget=8cells")
    assert done.returncode == 0 and "(certified: 1 run" in done.stdout, done.stderr
    count = len(list(records.find(tmp_path)))
    again = grbench_here(*words, "latency_ms.p50=50000", "budget=0cells")
    assert again.returncode == 0 and "(certified: 1 run" in again.stdout, again.stderr
    assert len(list(records.find(tmp_path))) == count


@pytest.mark.usefixtures("forked_workers")
def test_a_certified_answer_has_the_quality_of_trained_weights(
    grbench_here: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cell evaluates it: of bf16 the first probe, and of fp32 one after the certificate, on its engine."""
    starts = np.random.default_rng(0).integers(24, size=60)
    walks = [" ".join(map(str, [f"u{user}", *((start + np.arange(9)) % 24)])) for user, start in enumerate(starts)]
    (tmp_path / "walks.txt").write_text("\n".join(walks))
    small = ["model.layers=1", "model.embedding_dim=16", "model.tasks=[rated]", "workload=csv", "tracking=none"]
    small += ["workload.path=walks.txt", "workload.max_history=12", "workload.num_candidates=6"]
    train = ["training.epochs=1", "training.batch=8", "held_out=60", "out=ranker"]
    assert (done := grbench_here("train", *small, *train)).returncode == 0, done.stderr
    monkeypatch.setattr(certification, "CERTIFIED", 400)
    words = [*small, "model.weights=ranker/weights.safetensors", "engine=hstu", "kernel=torch", "space=typed"]
    words += ["scenario.max_batch=2,4", "probe_s=1", "objective=latency", "rate=400", "cache=none"]
    for precision, runs in (("fp32", 1), ("bf16", 0)):
        its = [
            "tune",
            *words,
            f"engine.precision={precision}",
            f"certify_runs={runs}",
            f"runner.output_root={precision}",
        ]
        done = grbench_here(*its, f"budget={1 + 2 * runs}cells")
        assert done.returncode == 0 and ("(certified: 1 run" in done.stdout) is bool(runs), done.stderr
        said = r"\. (Its AUC is .* against the same model in fp32 it loses .* of the AUC of rated)"
        known = re.search(said, done.stdout)
        found = [record for _, record in records.find(tmp_path / precision)]
        [evaluated] = [record for record in found if "step_s/quality" in record.metrics]
        assert (evaluated.spec["scenario"]["name"] == "offline") is bool(runs)
        assert evaluated.spec["seed"] == 101 * runs and ("step_s/start" in evaluated.metrics) is not bool(runs)
        again = grbench_here(*its, "budget=0cells")
        assert known is not None and known[1] in again.stdout, again.stderr
        assert len(list(records.find(tmp_path / precision))) == len(found)
        for file in (tmp_path / precision / "tune").glob("*/best.yaml"):
            assert known[1] in file.read_text().replace("\n# ", " ")
            certified = deployment.load(file).strategies[0].certified
            assert not runs or (certified and {"auc", "auc_loss_pct", "ne_loss_pct"} <= certified.quality.keys())


def measured(root: Path) -> list[str]:
    """Return the specification of every record that was measured to its end, in order of time."""
    found = [(record.started_at, record.spec_hash) for _, record in records.find(root) if record.ok]
    return [spec for _, spec in sorted(found)]


def test_an_interrupted_search_goes_on_without_measuring_again(
    grbench_here: Grbench, forked_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["tune", *SEARCH, "objective=latency", "rate=400", "budget=2cells"]
    run, cells = session.run_cell, 0

    def interrupted_later(*given: Any, **options: Any) -> Any:
        nonlocal cells
        cells += 1
        if cells == 2:
            raise KeyboardInterrupt
        return run(*given, **options)

    monkeypatch.setattr(session, "run_cell", interrupted_later)
    cut = grbench_here(*words)
    assert cut.returncode == 130, cut.stderr
    assert "interrupted; the same command goes on from here, with its whole budget again" in cut.stderr
    assert re.search(r"requests/s: latency_ms\.p99 [\d.]+.*: kept", cut.stderr)  # nothing is limited
    assert cut.stdout.startswith("Take cpu_threads=") and "not certified" in cut.stdout
    [first] = measured(tmp_path)

    monkeypatch.setattr(session, "run_cell", run)
    whole = grbench_here(*words)
    assert whole.returncode == 0, whole.stderr
    assert len(measured(tmp_path)) == 2 and measured(tmp_path).count(first) == 1
    newest = max((tmp_path / "outputs" / "tune").glob("*/tune.json"))
    assert len(json.loads(newest.read_text())["trials"]) == 2  # the interrupted one's is among them


def test_a_search_that_is_killed_goes_on_without_measuring_again(
    grbench_here: Grbench, forked_workers: None, tmp_path: Path
) -> None:
    words = ["tune", *SEARCH, "objective=latency", "rate=400", "budget=2cells"]
    command = fork_command(tmp_path, *words)
    try:
        until(lambda: len(list(tmp_path.rglob("mlperf_log_detail.txt"))) == 2, command)  # the second cell has begun
        os.kill(command.pid, signal.SIGKILL)
        assert command.wait(60) == -signal.SIGKILL
    finally:
        command.kill()
    [first] = measured(tmp_path)
    assert not list(tmp_path.rglob("tune.json"))

    whole = grbench_here(*words)
    assert whole.returncode == 0 and "takes over 1 probe of 1 configuration from " in whole.stderr, whole.stderr
    assert len(measured(tmp_path)) == 2 and measured(tmp_path).count(first) == 1
    [facts] = tmp_path.rglob("tune.json")
    assert len(json.loads(facts.read_text())["trials"]) == 2


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core holds one place")
def test_a_search_on_two_places_measures_beside_each_other_and_goes_on(
    grbench_here: Grbench, forked_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first cell of a place does not begin before the other place has one."""
    fork_places(monkeypatch)
    measure, begun = place.measure, tmp_path / "begun"
    begun.mkdir()

    def together(lines: Iterable[str], say: place.Say) -> None:
        def given() -> Iterator[str]:
            for line in lines:
                (begun / str(os.getpid())).touch()
                wait_until(lambda: len(list(begun.iterdir())) > 1)
                yield line

        measure(given(), say)

    monkeypatch.setattr(place, "measure", together)
    words = ["tune", *SEARCH, "objective=latency", "rate=400", "limits.latency_ms.p99=60000", "runner.parallel=2"]
    done = grbench_here(*words, "budget=2cells")
    assert done.returncode == 0, done.stderr
    found = [record for _, record in records.find(tmp_path)]
    beside = [record.environment["beside"] for record in found]
    assert len(found) == 2 and all(record.ok for record in found)
    assert [its["cells"] for its in beside] == [1, 1]
    assert not set(beside[0]["cores"]) & set(beside[1]["cores"])

    again = grbench_here(*words, "budget=0cells")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[0] == done.stdout.splitlines()[0]
    assert len(list(records.find(tmp_path))) == 2, "the records of the first search answer"
    other = grbench_here(*words[:-1], "budget=0cells")
    assert other.returncode == 1 and "no record answers" in other.stderr  # a place has fewer cores

    grbench_here("tune", *SEARCH, "limits.latency_ms.p99=60000", "runner.parallel=2", "budget=3cells")
    new = sorted((r for _, r in records.find(tmp_path)), key=lambda record: record.started_at)[2:]
    *offline, at_a_rate = sorted(new, key=lambda record: record.spec["scenario"]["name"])  # a place may start late
    assert [r.spec["scenario"]["name"] for r in (*offline, at_a_rate)] == ["offline", "offline", "server"]
    cores = {record.spec["engine"]["cpu_threads"]: record.environment["beside"]["cores"] for record in offline}
    assert cores[at_a_rate.spec["engine"]["cpu_threads"]] == at_a_rate.environment["beside"]["cores"]
    assert any("was not built again" in note for note in at_a_rate.notes), "the engine of its offline probe"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core holds one place")
def test_a_search_on_two_places_that_is_interrupted_keeps_both_records(tmp_path: Path) -> None:
    words = ["tune", *SEARCH, "objective=latency", "rate=20", "limits.latency_ms.p99=60000", "runner.parallel=2"]
    command = fork_command(tmp_path, *words, "budget=2cells", forked_places=True)
    try:
        until(lambda: len(list(tmp_path.rglob("mlperf_log_detail.txt"))) == 2, command)
        os.kill(command.pid, signal.SIGINT)
        assert command.wait(60) == 130
        said = (tmp_path / "err.txt").read_text()
        assert "interrupted; the same command goes on from here" in said and "Traceback" not in said
        assert [record.status for _, record in records.find(tmp_path)] == 2 * [Status.INTERRUPTED]
    finally:
        command.kill()


def test_a_limit_that_nobody_keeps_is_one_line_with_the_nearest_point(
    grbench_here: Grbench, forked_workers: None, tmp_path: Path
) -> None:
    done = grbench_here("tune", *SEARCH, "objective=latency", "rate=400", "latency_ms.p50=0.001", "budget=1cells")
    assert done.returncode == 1 and done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith(
        "grbench tune: latency_ms.p50 <= 0.001: no configuration that was measured keeps it; nearest"
    )
    assert "beyond it" in line
    assert not list(tmp_path.rglob("best.yaml"))


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(
    "words, message",
    [
        ("budget=1s", "budget=1s: too small for one cell of about 13 s; nearest: budget=5min"),
        (
            "budget=60s objective=latency rate=1",
            "budget=60s: too small for one cell of about 1012 s; nearest: budget=135min",
        ),
        ("budget=0cells", "budget=0cells: no record answers, and a first answer takes about 8 cells"),
    ],
)
def test_a_budget_without_room_for_a_cell_is_one_line(grbench_here: Grbench, words: str, message: str) -> None:
    done = grbench_here("tune", *SEARCH, *words.split())
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1]


def test_a_space_of_one_configuration_is_counted_as_one(grbench_here: Grbench) -> None:
    done = grbench_here("tune", *TINY, "space=typed", "scenario.max_batch=4", "budget=0cells")
    assert "; 1 configuration; budget of this call: 0 cells\n" in done.stderr
