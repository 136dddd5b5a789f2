"""`grbench tune`: refusals before anything runs, and one small search from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.command import Grbench

from grbench import deployment

TINY = (
    *("model.layers=1", "workload=synthetic", "workload.users=20", "workload.items=100", "workload.visits=400"),
    *("workload.max_history=16", "workload.num_candidates=4", "warmup_batches=1", "gate.requests=2", "gate.measured=8"),
    *("tracking=none", "engine=hstu", "kernel=torch", "scenario.max_wait_ms=0"),
)


@pytest.mark.parametrize(
    "words, message",
    [
        (["latency_ms.p98=3"], "records have no such percentile; allowed: latency_ms.p50"),
        (["latency_ms.p99=fast"], "latency_ms.p99=fast: a limit is a number or a share such as 0.1%"),
        (["latency_ms.p99=0"], "latency_ms.p99=0: nothing keeps it"),
        (["latency_ms.p99=80", "limits.latency_ms.p99=3"], "two limits, 80 and 3; give one"),
        (["quality.auc_loss=0.1%"], "quality is known only with trained weights and labels; give model.weights=FILE"),
        (["objective=latency"], "it needs the load, rate=REQUESTS_A_SECOND"),
        (
            ["objective=latency", "rate=50", "throughput_rps=100"],
            "no more requests are answered than arrive; raise rate",
        ),
        (["rate=50"], "only objective=latency takes it"),
        (["budget=3"], "budget=3: allowed are a time or a number of cells, such as 90s"),
        (["objective=speed"], "objective=speed: allowed is one of throughput, latency, cost, pareto"),
        (["scenario=offline"], "scenario=offline: the search needs one with a rate; allowed: server, trace_replay"),
        (["scenario.target_qps=50"], "the search sets scenario.target_qps; leave it out"),
        (["space=rank_tpu"], "space=rank_tpu: no such option; allowed:"),
        (["engine=hstu,foo", "space=typed"], "engine=foo: no such option; allowed: "),
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
    words += ["objective=latency", "rate=100", "probe_s=1"]
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
    assert len(json.loads((folder / "cells.json").read_text())) == 2
    assert "plotly" in (folder / "tune.html").read_text() and "Pareto front" in (folder / "tune.md").read_text()
    assert yaml.safe_load((folder / "best.yaml").read_text())["version"] == 1

    again = grbench_here(*words, "limits.latency_ms.p99=50000", "budget=0cells")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("Take cpu_threads=")
    [new] = [path for path in (tmp_path / "outputs" / "tune").iterdir() if path != folder]
    assert not (new / "cells.json").exists()  # the records of the first search answer
