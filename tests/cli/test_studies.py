"""The studies of experiments/README.md: each command composes or explains itself, and each program runs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import beauty
from helpers.cells import write_cell
from helpers.checkout import ROOT
from helpers.command import Grbench
from helpers.forks import fork_places, fork_ranks

from grbench import cli, workloads
from grbench.cachesim import config as cachesim
from grbench.config.compose import compose_jobs, compose_spec
from grbench.config.schema import RunnerConfig
from grbench.execution import records, results
from grbench.kernelbench import config as kernelbench
from grbench.report import group_cells
from grbench.report.frame import read_cells
from grbench.report.tradeoffs import tradeoffs
from grbench.tune.outcome import Configuration
from grbench.tune.replay import Grid, Run
from grbench.tune.trial import Batching
from grengines.api import UnavailableError
from grengines.tensorrt import library

EXPERIMENTS = ROOT / "experiments"
COMMANDS = re.findall(r"^\| `(python [^`]+)`", (EXPERIMENTS / "README.md").read_text(), re.MULTILINE)
PROGRAMS = sorted(path.stem for path in EXPERIMENTS.glob("*.py") if path.stem not in ("common", "library_servers"))
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a program of experiments/ as running it does."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module


def job(words: list[str]) -> Any:
    """The one job of a command line of grbench."""
    if words[0] == "cachesim":
        cachesim.register_schemas()
        return compose_jobs("cachesim", cachesim.to_config, words[1:])[0]
    if words[0] == "kernels":
        kernelbench.register_schemas()
        return compose_jobs("kernelbench", kernelbench.to_config, words[1:])[0]
    return compose_spec(words)[0]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m grbench ")])
def test_every_value_of_a_study_composes_into_another_job(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    beauty.stand_ins(tmp_path)
    words = shlex.split(command)[3:]
    study = yaml.safe_load((EXPERIMENTS / "study" / f"{words[-1].removeprefix('study=')}.yaml").read_text())
    assert study["hydra"]["mode"] == "MULTIRUN"
    values = {key: str(swept).split(",") for key, swept in study["hydra"]["sweeper"]["params"].items()}
    first = {key: each[0] for key, each in values.items()}
    chosen = [first, *(first | {key: value} for key, each in values.items() for value in each[1:])]
    found = [job([*words, "hydra.mode=RUN", *(f"{key}={value}" for key, value in one.items())]) for one in chosen]
    assert len(found) > 1
    assert all(one not in found[i + 1 :] for i, one in enumerate(found))


def test_the_study_of_quality_has_every_choice_that_its_folder_names() -> None:
    study = yaml.safe_load((EXPERIMENTS / "study" / "quality.yaml").read_text())
    points = study["hydra"]["sweeper"]["params"]["study/quality@_global_"].replace(" ", "").split(",")
    assert sorted(points) == sorted(path.stem for path in (EXPERIMENTS / "study" / "quality").glob("*.yaml"))


class BeganError(Exception):
    """A program began to work."""


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python experiments/")])
def test_every_program_knows_the_arguments_of_its_command(
    command: str, program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "ranker").mkdir(parents=True)
    (tmp_path / "outputs" / "ranker" / "weights.safetensors").touch()  # an earlier command writes it

    def begin(*_: object, **__: object) -> None:
        raise BeganError

    path, *words = shlex.split(command)[1:]
    module = program(Path(path).stem)
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert f"python {path}" in capsys.readouterr().out
    common = program("common")
    for target, name in (
        (common, "Rows"),
        (workloads, "build"),
        (subprocess, "Popen"),
        (common, "need_gpu"),
    ):
        monkeypatch.setattr(target, name, begin)
    with pytest.raises(BeganError):
        module.main(words)


def test_the_table_of_make_bench_has_the_hit_rate_beside_the_latency(grbench_forked: Grbench, tmp_path: Path) -> None:
    """A small run of what it runs, with the native engine instead of vLLM, which takes half a minute to start."""
    small = ["workload.max_requests=200", "scenario.queries=20", "warmup_batches=1", "gate.requests=2",
             "gate.measured=1", "gate.quality_requests=64", "engine@engine.retrieve=hstu", "tracking=none"]  # fmt: skip
    made = subprocess.run(
        ["make", "-n", "--no-print-directory", "bench", "GPU=0"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    command = made.stdout.splitlines()[-1].partition(" -m grbench ")[2].split()
    assert command == ["study=first_run"]
    done = grbench_forked(*command, *small)
    assert done.returncode == 0, done.stderr
    heads, _, *rows = done.stdout.splitlines()
    cells = dict(zip(("offline", "server"), rows[:2], strict=True))
    assert all(row.split()[:2] == [name, "OK"] for name, row in cells.items())
    column = slice(heads.index("HR@10") - 1, heads.index("HR@10") + len("HR@10"))  # figures end below their heading
    found = [float(row[column]) for row in rows[:2]]
    assert found[0] == found[1] > 0
    latency = heads.index("p50 ms") + len("p50 ms")
    assert float(cells["server"][:latency].split()[-1]) > 0


def test_more_and_fewer_candidates_of_trained_models_are_compared(
    program: Any, grbench_forked: Grbench, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainings of quality_gpu.py and then the study of candidates, both small. A second call trains nothing."""
    starts = np.random.default_rng(0).integers(300, size=150)
    lines = [" ".join(map(str, [u, *((s + np.arange(6 + u % 9)) % 300)])) for u, s in enumerate(starts)]
    (tmp_path / "amazon_beauty.txt").write_text("\n".join(lines))
    module, began = program("quality_gpu"), list[list[str]]()

    def trained(words: list[str], **_: Any) -> Any:
        began.append(words[4:])
        return SimpleNamespace(returncode=cli.main(words[3:]))

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=trained))  # in this process, which has imported it
    small = [*(f"model.{name}=16" for name in ("embedding_dim", "qk_dim", "v_dim")), "model.layers=1", "model.heads=1"]
    words = [*small, "training.epochs=1", "training.batch=32", "held_out=32", "--parallel", "1", "--only", "beauty"]
    words += ["--data", str(tmp_path), "--kinds", "items,ids,rank", "--out", str(tmp_path / "outputs" / "quality")]
    for _ in range(2):
        assert module.main(words) == 0
        assert len(began) == 3, capsys.readouterr()

    load = ["workload.path=amazon_beauty.txt", "scenario.queries=20", "warmup_batches=1", "gate.measured=1"]
    done = grbench_forked("study=gpu_candidates", *small, *load, "retrieval.k=60,20", "tracking=none")
    assert done.returncode == 0, done.stderr
    cells = read_cells([tmp_path / "outputs" / "studies"])
    [found] = tradeoffs([row for group in group_cells(cells) for row in group.rows])
    assert found.axis.title == "Candidates scored" and found.text(found.base) == "60"
    assert [found.text(point) for point in found.points] == ["20", "60"]
    for point in found.points:
        hits = point.quality("hr10").value * 150  # of all users
        assert hits == pytest.approx(round(hits)) and len(point.servers) == 1

    def is_kept() -> list[bool]:
        folders = (Path(word[4:]) for each in began for word in each if word.startswith("out="))
        return [bool(module.earlier_results(*one)) for one in zip(folders, began, strict=True)]

    assert is_kept() == [True] * 3
    vectors = tmp_path / "outputs" / "quality" / "beauty-items-0" / "weights.safetensors"
    content = vectors.read_bytes()
    vectors.write_bytes(content + b" ")
    assert is_kept() == [True, False, True]  # the second is of semantic IDs that the vectors make
    vectors.write_bytes(content)
    file = vectors.with_name("results.json")
    earlier = file.read_text()
    made = json.loads(earlier)
    file.write_text(json.dumps(made | {"environment": made["environment"] | {"git_sha": "of another commit"}}))
    assert is_kept() == [False, True, True]
    file.write_text(earlier)
    (tmp_path / "amazon_beauty.txt").write_text("\n".join(lines[1:]))
    assert is_kept() == [False] * 3
    assert module.main([*words, "--kinds", "items"]) == 0 and len(began) == 4


def test_every_study_and_program_has_a_command() -> None:
    studies = {path.stem for path in (EXPERIMENTS / "study").glob("*.yaml")}
    assert {found for command in COMMANDS for found in re.findall(r"study=(\w+)", command)} == studies
    assert {found for command in COMMANDS for found in re.findall(r"experiments/(\w+)\.py", command)} == set(PROGRAMS)


def rows_of(module: ModuleType, out: Path, capsys: Capture, *words: str) -> list[dict[str, Any]]:
    """The rows that a program writes, all of them in the table that it prints."""
    torch.set_num_threads(1)
    module.main([*words, "--out", str(out)])
    printed = capsys.readouterr().out
    data = results.load(out / results.RESULTS_FILE)
    assert data["command"].startswith(f"python experiments/{module.__name__}.py {shlex.join(words)}")
    done = [row for row in data["rows"] if row.get("status", "OK") == "OK"]
    assert sum(line.startswith("| ") for line in printed.splitlines()) == len(done) + 2
    rows: list[dict[str, Any]] = data["rows"]
    return rows


def test_engines_are_gated_and_compared(program: Any, tmp_path: Path, capsys: Capture) -> None:
    cases = ["engine=hstu kernel=torch", "engine=hstu kernel=torch engine.precision=bf16", "engine=hstu kernel=cutlass"]
    words = [word for case in cases for word in ("--case", case)]
    sizes = ["--histories", "40", "--candidates", "8", "--batches", "1", "2", "--rounds", "2"]
    rows = rows_of(program("engines"), tmp_path, capsys, "model=hstu_tiny", *words, *sizes)
    done = [row for row in rows if "p50_ms" in row]
    assert [(row["case"], row["batch"]) for row in done] == [(case, batch) for batch in (1, 2) for case in cases[:2]]
    assert all(row["error"] <= row["allowed"] and len(row["samples_ms"]) == 2 for row in done)
    assert [row["times_as_fast"] for row in done if row["case"] == cases[0]] == [1.0, 1.0]
    [refused] = [row for row in rows if row["case"] == cases[2]]
    assert refused["status"] == "UNAVAILABLE" and refused["reason"]


def test_the_hosts_time_has_its_parts(program: Any, tmp_path: Path, capsys: Capture) -> None:
    sizes = ["--history", "64", "--longest", "80", "--rounds", "2"]
    rows = rows_of(program("host_time"), tmp_path, capsys, "kernel=torch", *sizes)
    assert [(row["case"], row["batch"]) for row in rows] == [
        *((f"{known} of 64 cached", batch) for batch in (8, 1) for known in (64, 62)),
        *(("whole histories", batch) for batch in (16, 1, 1)),
    ]
    parts = [[row[f"{part}_us"] for part in ("states", "pack", "places", "copy", "launch", "result")] for row in rows]
    assert all(min(times) > 0 for times in parts[:4])
    assert all(times[0] == times[2] == 0 and min(times[1], *times[3:]) > 0 for times in parts[4:])
    assert all(sum(times) < row["outside_us"] for times, row in zip(parts, rows, strict=True))
    assert all(row["in_row_us"] > 0 for row in rows)  # on a CPU nothing is computed meanwhile


def test_hits_are_timed_in_the_state_of_their_case(program: Any, tmp_path: Path, capsys: Capture) -> None:
    sizes = ["--history", "64", "--candidates", "8", "--batches", "1", "--rounds", "1"]
    rows = rows_of(program("user_cache"), tmp_path, capsys, "model=hstu_tiny", "kernel=torch", *sizes)
    assert [row["cached"] for row in rows][1:6] == [
        "nothing cached",
        "32 of 64 on the device",
        "64 of 64 on the device",
        "on the host, all copied before the first layer",
        "on the host, all loaded layer by layer",
    ]
    assert all(row["error"] <= row["allowed"] for row in rows)
    assert [bool(row["copied_ms"]) for row in rows][:5] == [False] * 5  # the copies of the last one are a prefetch's
    assert rows[5]["copied_ms"] > 0


def test_replays_are_counted_by_what_they_found_and_claimed(program: Any) -> None:
    """Three searches of 20 configurations, of which one claims 2% too much and one certifies nothing."""
    after_3 = (0.04, 0.06, 0.05)  # regrets after 15% of 20 cells
    certified = [(0.01, 1.02), (0.09, 1.0), (None, None)]  # their regrets at the end, and what they claim of the truth
    runs = [
        Run([1.0, 0.5, early, *[0.0] * 5], [], 8, final, claim)
        for early, (final, claim) in zip(after_3, certified, strict=True)
    ]
    assert program("tune_regret").columns(runs, 20, 0.4) == {
        "5%": 1.0, "10%": 0.5, "15%": pytest.approx(0.05), "20%": 0.0, "30%": 0.0, "40%": 0.0,
        "15% within 5%": "2 of 3", "certified": "2 of 3", "final": pytest.approx(0.05), "final within 5%": "1 of 2",
        "false_feasible": 1, "highest_claim": 1.02,
    }  # fmt: skip
    assert list(program("tune_regret").columns(runs, 20, 0.1))[:3] == ["5%", "10%", "certified"]


def test_a_grid_and_its_replays_are_kept_with_their_charts(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("GRBENCH_GIT_SHA", "a" * 40)
    cells = tmp_path / "cells"
    cells.mkdir()
    for batch, wait in itertools.product((4, 8, 16), (0, 2)):
        words = [f"scenario.max_batch={batch}", f"scenario.max_wait_ms={wait}", "scenario.in_flight=1"]
        status = records.Status.OOM if batch == 16 and wait == 0 else records.Status.OK
        changes: dict[str, Any] = {"status": status, "scale": 1 / batch, "overrides": [*words, "study=tune_grid"]}
        write_cell(cells / f"{batch}-{wait}", "scenario.name=offline", *words, **changes)
    few = ["--seeds", "1", "--most", "1", "--places", "1"]
    first, again, reports = tmp_path / "first", tmp_path / "again", tmp_path / "reports"
    rows = rows_of(program("tune_regret"), first, capsys, "--grid", str(cells), *few)
    assert len(rows) > 1 and all(0 <= row["40%"] <= 1 for row in rows)
    assert any(row["certified"] == "1 of 1" for row in rows)
    assert (first / "regret.html").read_text().count('id="figure_') == 2
    kept = results.load(first / "grid" / results.RESULTS_FILE)
    assert kept["environment"]["cpu"] == "Some CPU"  # of the cells, and not of the replays
    assert [row["status"] for row in kept["rows"]].count("OOM") == 1 and len(kept["rows"]) == 6

    def page_of(name: str, source: Path) -> str:
        (reports / name).mkdir(parents=True)
        (reports / name / "notes.md").write_text(f"# The {name} of a search\n")
        assert cli.main(["reports", name, "--root", str(reports), "--keep", str(source)]) == 0
        assert cli.main(["reports", name, "--root", str(reports), "--check"]) == 0
        return (reports / name / "README.md").read_text()

    page = page_of("grid", first / "grid")
    assert "each configuration, by `python -m grbench study=tune_grid`." in page
    assert "### Best rate within latency_ms.p99=80\n\n| requests/s, by max_batch | 4 | 8 | 16 |\n" in page
    assert "- OOM: what OOM means here (" in page and "`make reports` draws `figures/grid_flips.png`." in page
    again_rows = rows_of(program("tune_regret"), again, capsys, "--grid", str(reports / "grid/records/grid"), *few)
    assert again_rows == rows
    assert not (again / "grid").exists()  # it is kept where it was read
    page = page_of("regret", again)
    assert "`make reports` draws `figures/regret_flips.png` and `figures/regret_regret.png`." in page
    assert "| grbench |" in page and "### Best rate within latency_ms.p99=80" in page
    figures = [path for path in reports.rglob("figures/*") if path.read_bytes().startswith(b"\x89PNG")]
    assert sorted(path.name for path in figures) == ["grid_flips.png", "regret_flips.png", "regret_regret.png"]
    file = reports / "regret" / "records" / "regret" / results.RESULTS_FILE
    file.write_text(file.read_text().replace('"series"', '"lines"'))
    assert cli.main(["reports", "regret", "--root", str(reports)]) == 2
    assert "results.json: charts: not those of a program in experiments/" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program("tune_regret").main(["--grid", str(first), *few])
    assert "results.json: no grid, as 'batches' is missing" in capsys.readouterr().err


def test_the_lines_of_a_grid_are_named_by_the_options_that_differ(program: Any) -> None:
    keys = ("engine", "kernel", "engine.precision", "engine.cuda_graphs", "scenario.max_batch")
    combinations = itertools.product(["hstu"], ["triton", "auto"], ["bf16", "fp16"], ["true", "false"], ["4", "8"])
    grid = Grid(
        {}, {}, {Configuration(tuple(zip(keys, its, strict=True))): Batching(int(its[-1])) for its in combinations}
    )
    found = program("tune_regret").best_by_batch(grid, dict.fromkeys(grid.batching, 1.0))
    assert list(found)[:2] == ["triton bf16 cuda_graphs=true", "triton bf16 cuda_graphs=false"]
    assert "kernel=auto fp16 cuda_graphs=false" in found and len(found) == 8


def test_a_grid_is_of_one_commit(program: Any, tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        program("tune_regret").main(["--grid", str(tmp_path)])
    assert "no grid of offline cells; run python -m grbench study=tune_grid first" in capsys.readouterr().err
    for batch, commit in ((4, "a" * 40), (8, "b" * 40)):
        words = ["scenario.name=offline", f"scenario.max_batch={batch}"]
        write_cell(tmp_path / str(batch), *words, environment={"git_sha": commit, "cpu": "Some CPU", "gpus": []})
    with pytest.raises(SystemExit):
        program("tune_regret").main(["--grid", str(tmp_path)])
    assert f"cells of commit {'a' * 12}, Some CPU, no GPU and of commit {'b' * 12}" in capsys.readouterr().err


def test_hits_are_timed_in_each_tier(program: Any, tmp_path: Path, capsys: Capture) -> None:
    sizes = ["--histories", "64", "--candidates", "8", "--rounds", "1"]
    rows = rows_of(program("storage_tier"), tmp_path, capsys, "model=hstu_tiny", "kernel=torch", *sizes)
    assert [(row["state"], row["cached_tokens"], row["from_disk"]) for row in rows] == [
        ("computed again", 0, 0),
        ("on the device", 64, 0),
        ("on the host", 64, 0),
        ("on the disk", 64, 64),
    ]
    assert all(row["error"] <= row["allowed"] for row in rows)
    assert rows[2]["loaded_ms"] > 0 < rows[3]["loaded_ms"] and rows[3]["predicted_ms"] > 0
    assert rows[3]["states_mb"] == pytest.approx(64 * 2**10 / 1e6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its ranks are forks, which can't use CUDA after this process")
def test_one_request_is_timed_on_one_and_two_ranks(
    program: Any, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fork_ranks(monkeypatch)
    sizes = ["--histories", "40", "--candidates", "8", "--rounds", "1"]
    rows = rows_of(program("tensor_parallel"), tmp_path, capsys, "model=hstu_tiny", "kernel=torch", *sizes)
    assert [row["case"] for row in rows] == [case.name for case in program("tensor_parallel").CASES]
    assert all(row["error"] <= row["allowed"] and row["p50_ms"] > 0 for row in rows)
    assert all(row["predicted_device_ms"] > 0 for row in rows)
    rows = rows_of(program("tensor_parallel"), tmp_path, capsys, "model=hstu_tiny", *sizes, "--graphs", "--predict")
    assert [row["case"] for row in rows] == [
        "one GPU, no cache", "two GPUs, no cache", "one GPU, hit", "two GPUs, hit"
    ]  # fmt: skip


def test_two_gpus_are_predicted_with_what_a_run_on_them_took(program: Any, tmp_path: Path, capsys: Capture) -> None:
    rows = rows_of(
        program("tensor_parallel"), tmp_path, capsys, "--histories", "4096", "16384", "--graphs", "--predict"
    )
    ms = {(row["model"], row["history"], row["case"]): row["predicted_ms"] for row in rows}
    measured = {("one GPU", "no cache"): 1.90, ("two GPUs", "no cache"): 2.73, ("two GPUs", "hit"): 1.61}
    for (gpus, kind), value in measured.items():
        assert ms["wide_heads", 4096, f"{gpus}, {kind}"] == pytest.approx(value, rel=0.02)
    assert 1 < ms["hstu_0p2b", 16384, "one GPU, no cache"] / ms["hstu_0p2b", 16384, "two GPUs, no cache"] < 1.5
    one, two = rows[-2:]
    assert one["model"] == two["model"] == "decoder_1p7b" and one["predicted_ms"] > two["predicted_fast_link_ms"]


def test_visits_of_a_search_are_timed(program: Any, tmp_path: Path, capsys: Capture) -> None:
    engine = ["engine=hstu", "model=hstu_tiny", "kernel=torch", "retrieval.beam_width=10"]
    sizes = ["--items", "200", "--codes", "8", "--history", "8", "--new", "0", "2", "--batches", "1", "--rounds", "1"]
    rows = rows_of(program("retrieval_visits"), tmp_path, capsys, *engine, *sizes)
    assert [row["visit"] for row in rows] == ["first", "returns with 0 new items", "returns with 2 new items"]
    assert all(row["error"] <= row["allowed"] for row in rows)


def test_the_hosts_part_of_searches_in_vllm_is_timed(program: Any, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("vllm")
    sizes = ["--history", "40", "--batch", "2", "--batches", "3", "--rounds", "1"]
    rows = rows_of(program("host_time_vllm"), tmp_path, capsys, *sizes)
    assert [row["case"] for row in rows] == ["new users", "the same users"]
    for row in rows:
        parts = [row[f"{part}_ms"] for part in ("prompt", "admit", "schedule", "launch", "update")]
        assert min(parts) > 0 and sum(parts) < row["wall_ms"]
        assert row["per_s"] == pytest.approx(2e3 / row["wall_ms"])


def test_searches_of_a_decoder_are_timed_over_each_vocabulary(program: Any, tmp_path: Path, capsys: Capture) -> None:
    engine = ["engine=hf", "model=decoder_tiny", "model.vocabulary=null,500", "retrieval.beam_width=10"]
    sizes = ["--items", "200", "--codes", "8", "--history", "8", "--batches", "1", "2", "--rounds", "1"]
    rows = rows_of(program("retrieval_visits"), tmp_path, capsys, *engine, *sizes)
    assert [row["softmax over"] for row in rows] == ["codes"] * 4 + [500] * 4
    assert all(row["error"] <= row["allowed"] for row in rows)


def test_precisions_are_compared_with_a_trained_model(program: Any, tmp_path: Path, capsys: Capture) -> None:
    small = ["workload.max_requests=96", "gate.quality_requests=32"]
    workload = ["workload.max_requests=96", "workload.max_history=128", "model.tasks=[rated,liked]"]
    options = ["held_out=32", "training.epochs=1", "tracking=none", f"out={tmp_path}", f"output_root={tmp_path}"]
    assert cli.main(["train", *workload, *options]) == 0
    assert "epoch 1: loss 0." in capsys.readouterr().err
    weights = tmp_path / "weights.safetensors"
    case = ["--case", "engine=hstu kernel=torch engine.precision=bf16"]
    rows = rows_of(program("precisions"), tmp_path, capsys, f"model.weights={weights}", *small, *case)
    assert [row["task"] for row in rows] == ["rated", "liked"]
    assert all(0 < row["auc"] < 1 and abs(row["auc_loss"]) < 0.1 for row in rows)
    rows = rows_of(program("precisions"), tmp_path, capsys, f"model.weights={weights}", *small, "--rounded")
    first = [row for row in rows if row["task"] == "rated"]
    assert [row["case"].removeprefix("rounded: ") for row in first] == [
        "bf16", "bf16, attention in fp8", "products in fp8", "products and attention in fp8"
    ]  # fmt: skip
    # A loss may be 0 by chance. Its interval has no width, and no candidate another place, if nothing is rounded.
    widths = [row["ne_loss_high"] - row["ne_loss_low"] for row in first]  # 0.0003, 0.0015, 0.0084 and 0.0056
    assert 1e-4 < widths[0] < 8e-4 < widths[1] < 2.5e-3 < min(widths[2:]) <= max(widths[2:]) < 0.03
    overlaps = [row["top_k_overlap"] for row in first]  # 0.994, 0.962, 0.919 and 0.912
    assert 1 > overlaps[0] > overlaps[1] > max(overlaps[2:]) and min(overlaps[2:]) > 0.8
    assert all(abs(row["ne_loss"]) < 0.02 for row in rows) and first[0]["gate"] == "passes"
    assert {row["gate"] for row in rows[4:]} == {"INCORRECT unless gate.allow_loss names it"}
    with pytest.raises(SystemExit):
        program("precisions").main([])
    assert "model.weights=FILE is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program("precisions").main(["--rounded", *case])
    assert "argument --case: not allowed with argument --rounded" in capsys.readouterr().err


def test_a_ranker_is_compared_with_one_like_sasrec(program: Any, tmp_path: Path, capsys: Capture) -> None:
    """Few requests and two epochs: which is better says nothing, but each learns, and the figures fit each other."""
    small = ["workload.max_requests=240", "held_out=40", "training.epochs=2", "training.batch=8"]
    rows = rows_of(program("rankers"), tmp_path, capsys, *small, "--seeds", "2")
    rankers = ["HSTU", "like SASRec", "popularity", "item_mean", "not_yet"]
    assert [(row["task"], row["ranker"]) for row in rows] == [(t, r) for t in ("rated", "liked") for r in rankers]
    for row in rows:
        assert row["low"] <= row["AUC"] <= row["high"] and row["lowest_seed"] <= row["AUC"] <= row["highest_seed"]
    for own, *others in (rows[:5], rows[5:]):
        assert all(row["difference"] == pytest.approx(own["AUC"] - row["AUC"]) for row in others)
        assert all(row["difference_low"] <= row["difference"] <= row["difference_high"] for row in others)
        assert own["parameters"] / others[0]["parameters"] == pytest.approx(1, abs=0.3)
        assert own["lowest_seed"] < own["highest_seed"] and others[0]["lowest_seed"] < others[0]["highest_seed"]


def test_the_score_of_one_like_sasrec_is_a_product_with_the_last_row(program: Any) -> None:
    """Padding and the other requests of a batch do not change it."""
    module = program("rankers")
    module.training.register_schemas()
    config = compose_jobs(
        "train", module.training.to_config, [*module.RECIPE, "workload.max_requests=150", "held_out=20"]
    )[0]
    decoder = compose_jobs("train", module.training.to_config, module.SASREC)[0]
    trace = workloads.build(config.workload, 0, latency_limit_ms=1.0)
    task = module.SasRecTask(config, decoder, trace, torch.device("cpu"))
    with torch.no_grad():
        task.model.maps[1] *= 2  # the second task differs
        alone, beside = task.logits([140]), task.logits([3, 140, 77])
        first, count = len(trace.requests[3].candidates), len(trace.requests[140].candidates)
        torch.testing.assert_close(alone, beside[first : first + count])
        request = trace.requests[140]
        tokens = torch.from_numpy(request.history_items[-decoder.model.max_positions :])[None]
        row = task.model.network.hidden(tokens)[0, -1]
        vectors = task.model.network.table(0)[torch.from_numpy(request.candidates)]
    torch.testing.assert_close(alone, torch.stack([vectors @ row, vectors @ (2 * row)], 1), rtol=1e-4, atol=1e-5)


def test_a_retriever_is_compared_with_one_like_sasrec(
    program: Any, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few users say nothing of the models: the validation chooses, and the figures of the test fit each other."""
    log = tmp_path / "log.txt"
    log.write_text("\n".join(f"u{u} " + " ".join(f"i{(u + n) % 30}" for n in range(12)) for u in range(40)))
    module = program("retrievers")
    monkeypatch.setattr(module, "BOTH", [*module.BOTH[1:], "workload=csv", f"workload.path={log}", "training.epochs=2"])
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(1))
    rows = rows_of(module, tmp_path / "out", capsys, "--trials", "2", "--seeds", "2")
    tried, judged = rows[:4], rows[4:]
    assert [row["model"] for row in tried] == [module.HSTU, module.LIKE_SASREC] * 2
    for row in judged:
        best = max((r for r in tried if r["model"] == row["model"]), key=lambda r: r["valid_ndcg10"])
        assert row["trial"] == best["trial"]
        assert row["low"] <= row["test"] <= row["high"] and row["lowest_seed"] <= row["test"] <= row["highest_seed"]
    for own, other in zip(judged[::2], judged[1::2], strict=True):
        assert other["difference"] == pytest.approx(own["test"] - other["test"])
        assert other["difference_low"] <= other["difference"] <= other["difference_high"]
    monkeypatch.setattr(module.loop, "train", None)  # every training is kept
    assert rows_of(module, tmp_path / "out", capsys, "--trials", "2", "--seeds", "2") == rows


def test_resamples_draw_the_same_users_and_each_models_seeds(program: Any) -> None:
    """With equal seeds only the users vary, and equal models do not differ; with other seeds the interval is wider."""
    module, rng = program("retrievers"), np.random.default_rng(0)
    first, second = ({"test": {"hr10": (rng.random(300) < share).astype(float)}} for share in (0.1, 0.3))
    one, same = (module.over_seeds([first] * 3, number)["hr10"] for number in range(2))
    assert np.array_equal(one.drawn, same.drawn)
    mixed = module.over_seeds([first, second], 0)["hr10"]
    assert mixed.value == pytest.approx(np.mean([first["test"]["hr10"], second["test"]["hr10"]]))
    assert mixed.high - mixed.low > 2 * (one.high - one.low)


def test_the_wall_time_of_a_sweep_is_predicted(program: Any, tmp_path: Path, capsys: Capture) -> None:
    module = program("parallel_sweep")
    [row] = rows_of(module, tmp_path, capsys, "--places", "2", "--predict", "10")
    assert row["cells"] == 8 and row["share"] == pytest.approx(43 / 83)
    slower = module.predicted(8, 2, 10.0)["slower_at_most"]
    assert (3 + 4 * 10 * slower) / 83 == pytest.approx(0.52)


def test_rows_of_items_are_looked_up(program: Any, tmp_path: Path, capsys: Capture) -> None:
    sizes = ["--rows", "2000", "--width", "8", "--tokens", "100", "--warmup", "20", "--lookups", "5"]
    rows = rows_of(program("item_cache"), tmp_path, capsys, *sizes, "--zipf", "1", "--budget", "5", "25")
    assert [row["budget_%"] for row in rows] == [5, 25]
    assert rows[0]["token_hits_%"] < rows[1]["token_hits_%"]
    assert rows[0]["moved_mb"] > rows[1]["moved_mb"] > 0


def test_a_table_over_devices_is_looked_up(program: Any, tmp_path: Path, capsys: Capture) -> None:
    module = program("sharded_table")
    sizes = ["--rows", "999", "--width", "8", "--tokens", "40", "60", "--warmup", "1", "--rounds", "2", "--burst", "2"]
    rows = rows_of(module, tmp_path / "run", capsys, *sizes, "--zipf", "0", "1")
    done = [row for row in rows if "status" not in row]
    expected = {
        case.name for case in module.CASES if importlib.util.find_spec("fbgemm_gpu") or "FBGEMM" not in case.name
    }
    assert {row["case"] for row in done} == expected and len(done) == 4 * len(expected)
    assert all(row["us_high"] >= row["us"] >= row["us_low"] > 0 and row["predicted_us"] > 0 for row in done)
    assert all(row["status"] == "UNAVAILABLE" and "fbgemm_gpu" in row["reason"] for row in rows if "status" in row)
    planned = rows_of(module, tmp_path / "plan", capsys, *sizes, "--predict", "--zipf", "0", "1")
    assert len(planned) == 4 * len(module.CASES)
    assert min(row["distinct"] for row in planned if row["zipf"] == 0) > max(
        row["distinct"] for row in planned if row["zipf"] == 1 and row["tokens"] == 40
    )


def test_a_lookup_of_other_rows_is_no_result(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = program("sharded_table")
    monkeypatch.setattr(module.Parts, "gather", lambda self, rows: self.parts[0][rows % self.length])
    sizes = ["--rows", "999", "--width", "8", "--tokens", "40", "--warmup", "1", "--rounds", "1", "--zipf", "0"]
    module.main([*sizes, "--cases", "two GPUs, loads", "--out", str(tmp_path)])
    [row] = results.load(tmp_path / results.RESULTS_FILE)["rows"]
    assert row["status"] == "INCORRECT" and "rows of the lookup differ from the table" in row["reason"]


def test_the_share_that_is_hidden_has_an_interval_or_no_figure(program: Any) -> None:
    module, even = program("sharded_table"), [10.0] * 30
    for both, share in ((20.0, 0.0), (11.0, 100.0), (15.5, 50.0)):  # of 10 lookups, the first has nothing before it
        row = module.hidden([even, even, [both] * 30], 10)
        assert [row[name] for name in ("hidden_%", "hidden_low", "hidden_high")] == pytest.approx([share] * 3)
    row = module.hidden([even, even, [11.0, 20.0] * 15], 10)
    assert (
        row["hidden_%"] is None and row["hidden_low"] == pytest.approx(0) and row["hidden_high"] == pytest.approx(100)
    )


def test_numbers_of_rows_outlive_fp32(program: Any) -> None:
    module = program("sharded_table")
    for first in (0, 31_000, (1 << 28) - (1 << 16)):  # fp16 with the bits of 31745 is no number
        table = module.numbered(torch.empty(1 << 16, 4, dtype=torch.float16), first)
        assert torch.equal(table.float().half().view(torch.int16), table.view(torch.int16))
        assert len(table.view(torch.int32)[:, 0].unique()) == len(table)


def test_launches_are_timed(program: Any, tmp_path: Path, capsys: Capture) -> None:
    rows = rows_of(program("launches"), tmp_path, capsys, "--calls", "2")
    assert [row["call"] for row in rows][:3] == ["x + x", "linear", "layer_norm"]
    assert all(row["host_us"] > 0 for row in rows)


@pytest.mark.skipif(library.missing("tensorrt_rtx") is not None, reason=library.missing("tensorrt_rtx") or "")
def test_plans_are_built_and_weighed(program: Any, tmp_path: Path, capsys: Capture) -> None:
    one = ["--targets", "8.9", "--precisions", "fp16", "--rounds", "1"]
    [row] = rows_of(program("tensorrt_plans"), tmp_path, capsys, "model=hstu_tiny", "model.layers=1", *one)
    assert row["build_s"] > 0 and row["size_mb"] > 1


def test_tuning_covers_every_family_once_and_all_shapes_of_attention(program: Any, capsys: Capture) -> None:
    from grbench.kernelbench.config import select
    from grkernels.registry import FAMILIES

    module = program("tune_kernels")
    assert module.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    *compiling, tuning = [shlex.split(line.replace("'", "\\'"))[3:] for line in lines]
    assert len(compiling) == len(FAMILIES) + len(module.SHAPES["hstu_attention"]) - 1
    found: dict[str, list[str]] = {}
    kernelbench.register_schemas()
    for words in compiling:
        [config] = compose_jobs("kernelbench", kernelbench.to_config, words)
        assert config.tune
        for family in select(config):
            found.setdefault(family.name, []).extend(family.shapes)
    [config] = compose_jobs("kernelbench", kernelbench.to_config, tuning)
    assert {family.name: sorted(family.shapes) for family in select(config)} == {
        name: sorted(set(shapes)) for name, shapes in found.items()
    }


def test_a_wrong_override_is_one_line(program: Any, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        program("engines").main(["model=nope", "--case", "engine=hstu"])
    assert ended.value.code == 2
    assert "error: model=nope: no such option; allowed: " in capsys.readouterr().err.splitlines()[-1]


def test_results_are_written_after_every_row(program: Any, tmp_path: Path, capsys: Capture) -> None:
    common = program("common")
    args = common.parser("about").parse_args(["--out", str(tmp_path)])
    rows = common.Rows(args, "experiments/x.py", ["a b"])
    rows.add(a=1)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == [{"a": 1}]
    rows.fail(MemoryError("full"), a=2)
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["command"] == "python experiments/x.py 'a b'"
    assert data["rows"][1]["status"] == "OOM"


@pytest.mark.parametrize("more", [1.05, 1.0], ids=["5% more is found", "nothing is found"])
def test_the_proof_of_compare_counts_its_claims(
    more: float, program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Give it cells of which the first and the second side differ by turns, and the third is slower."""
    module = program("compare_proof")
    more_layers = module.LAYERS["more"]

    def measure(trials: Any, runner: RunnerConfig) -> None:
        for trial, side, spec, folder in itertools.chain(*trials.waiting):
            by_turns = 1 + 0.002 * (-1) ** spec.seed * (side != "base")  # of a start, in all trials
            rate = (100 + spec.seed) * by_turns / (more if spec.model.layers == more_layers else 1)
            changed = [f"model.layers={spec.model.layers}", f"seed={spec.seed}"]
            metrics = {"throughput_rps": rate, "samples": 2000.0, "duration_s": 3.0}
            record = write_cell(folder, "scenario=offline", *changed, metrics=metrics)
            trials.measured[trial][side].append((folder, record))

    monkeypatch.setattr(module.Trials, "measure", measure)
    words = ["--trials", "4", "--runs", "5", "--out", str(tmp_path / "out"), f"runner.output_root={tmp_path}"]
    if more > 1:
        module.main(words)
    else:
        with pytest.raises(SystemExit, match="1"):
            module.main(words)
    said = capsys.readouterr().out
    assert "equal work: a difference is claimed in 0 of 4" in said
    assert f"5% more work: found in {4 if more > 1 else 0} of 4" in said
    starts = statistics.stdev(math.log(1 + 0.002 * (-1) ** seed) for seed in range(5)) / math.sqrt(2)
    assert f"of the same engines, from trial to trial: 0.00%; between their starts: {starts:.2%};" in said
    [change] = re.findall(r"the additional layer changed throughput_rps by (\S+)% \[", said)
    assert float(change) / 100 == pytest.approx(1 / more - 1, abs=0.001)


def test_the_proof_of_compare_keeps_its_engines_and_goes_on_from_its_records(
    program: Any, forked_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Two trials of two runs. Then the three cells of one seed are measured again."""
    module = program("compare_proof")
    monkeypatch.chdir(tmp_path)
    fork_places(monkeypatch)
    model = ["embedding_dim=16", "heads=1", "qk_dim=16", "v_dim=16"]
    load = ["scenario.queries=32", "scenario.max_batch=4", "workload.visits=8", "warmup_batches=1"]
    history = ["workload.min_history=16", "workload.max_history=16", "workload.num_candidates=4"]
    device = ["engine.device=cpu", "engine.cpu_threads=1", "engine.cuda_graphs=false"]
    words = ["--trials", "2", "--runs", "2", *device, *(f"model.{word}" for word in model), *load, *history]
    root = tmp_path / "outputs" / "compare_proof"

    def measured() -> tuple[dict[str, Any], Any]:
        """Return the records and what was said. Two runs prove nothing: the exit code is that of the claims."""
        code: Any = 0
        try:
            module.main(words)
        except SystemExit as e:
            code = e.code
        said = capsys.readouterr()
        [(wrong, found)] = re.findall(r"claimed in (\d+) of 2; 5% more work: found in (\d+) of 2", said.out)
        assert code == int(int(wrong) > 2 * module.ALLOWED or int(found) < 2 * module.NEEDED)
        return {str(folder.relative_to(root)): record for folder, record in records.find(root)}, said

    def kept_from_before(record: Any) -> bool:
        return any("had measured 1 other loads before" in note for note in record.notes)

    first, said = measured()
    orders = [("base", "equal", "more"), ("equal", "more", "base"), ("more", "base", "equal")]
    cells = [f"{trial}/{side}/{seed}" for seed in (0, 1) for trial in (0, 1) for side in orders[trial + seed]]
    written = sorted(cells, key=lambda cell: (root / cell / "record.json").stat().st_mtime_ns)
    assert written == cells and first.keys() == set(cells)
    assert {cell for cell, record in first.items() if kept_from_before(record)} == {*cells[3:6], *cells[9:]}
    assert "12 cells; a run answers 32 requests in " in said.out
    assert "all trials share 2 starts of each side" in said.out
    assert "have a record" not in said.err
    (root / "1" / "equal" / "1" / "record.json").unlink()
    again, said = measured()
    assert "9 of 12 cells have a record" in said.err
    assert again.keys() == {*cells, "1/base/1.1", "1/more/1.1"}


@pytest.mark.parametrize(
    "answer, said",
    [
        (b"HTTP/1.1 400 Bad Request\r\ncontent-length: 4\r\n\r\nwhy?", "answered HTTP/1.1 400 Bad Request: why?"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"parameters":{"queue_ms":1.0}}', "no engine_ms, as with continuous batching"),
    ],
)
def test_an_answer_without_the_times_of_the_engine_ends_the_front_end(program: Any, answer: bytes, said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        program("front_end").parameters_of(answer)


@pytest.mark.parametrize("library", ["fastapi", "kserve", "mlserver"])
def test_the_front_end_is_measured_beside_a_library(
    program: Any, tmp_path: Path, capsys: Capture, library: str
) -> None:
    pytest.importorskip(library)
    words = ["--rounds", "2", "--candidates", "8", f"{library}={sys.executable}"]
    rows = rows_of(program("server_libraries"), tmp_path, capsys, *words)
    expected = [(name, form) for name in ("grbench", library) for form in ("JSON", "binary")]
    assert [(row["library"], row["form"]) for row in rows] == [one for one in expected if one != ("mlserver", "binary")]
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in rows)


def test_a_library_without_a_server_is_one_line(program: Any, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        program("server_libraries").main(["triton=python"])
    assert "triton: allowed are grbench, fastapi, kserve, mlserver" in capsys.readouterr().err


@pytest.mark.parametrize("body", [b"{}", b"no JSON", b'{"outputs": [{"shape": [8, 3]}]}'])
def test_an_answer_without_all_scores_is_wrong(program: Any, body: bytes) -> None:
    checked = program("server_libraries").checked
    assert checked(lambda: body, 9)() == body
    assert checked(lambda: b'{"outputs": [{"shape": [9, 3]}]}' + bytes(108), 9)() == b""


@pytest.mark.parametrize("name", ["front_end", "overload"])
def test_a_program_without_its_server_is_one_line(program: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(program("common"), "WAIT_S", 0.0)
    for url, line in (
        ("http://127.0.0.1:9", "nothing listens there .*; start one: python -m grbench serve"),
        ("foo", "--url foo: allowed is http://HOST:PORT"),
    ):
        done = _exit_of(program(name).main, ["--url", url])
        assert done[0] == 2 and re.search(line, done[1].splitlines()[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "name, words", [("attention_trees", ["a", "b"]), ("tune_kernels", []), ("item_cache", ["--device", "cuda"])]
)
def test_a_program_without_its_gpu_is_one_line(program: Any, name: str, words: list[str]) -> None:
    code, said = _exit_of(program(name).main, words)
    assert code == 2 and "PyTorch finds no GPU, and this program needs one" in said.splitlines()[-1]


def test_what_a_machine_lacks_ends_a_program_in_one_line(program: Any) -> None:
    def lacking() -> None:
        raise UnavailableError("engine tensorrt: no GPU; use another")

    code, said = _exit_of(program("common").run, lacking)
    assert (
        code == 2 and said.splitlines()[-1].endswith(": engine tensorrt: no GPU; use another") and "Trace" not in said
    )
    assert all("    common.run(main)" in (EXPERIMENTS / f"{name}.py").read_text() for name in PROGRAMS)


def _exit_of(call: Any, argument: Any) -> tuple[int, str]:
    """The exit code of a call, and what it wrote to standard error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        call(argument)
    return int(ended.value.code or 0), said.getvalue()
