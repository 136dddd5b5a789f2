"""`grbench train` and `grbench evaluate`: a small model is trained, run, evaluated and refused for other data."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import Grbench
from helpers.mlflow_store import new_database
from mlflow import MlflowClient

from grbench.execution import watch
from grbench.gate import quality
from grbench.quality import evaluate
from grbench.signals import Stopped
from grbench.training import loop
from grbench.training.rank import RankTask
from grengines.hstu.engine import HSTUEngine
from grkernels import fp8

MODEL = ["model.layers=1", "model.embedding_dim=16", "model.heads=1", "model.qk_dim=16", "model.v_dim=16",
         "model.max_positions=48", "model.scaling_seqlen=48"]  # fmt: skip
WORKLOAD = ["workload=csv", "workload.path=walks.txt", "workload.max_history=12"]
QUIET = ["tracking=none"]


def walks(folder: Path, users: int = 60, items: int = 24) -> None:
    """Users who walk around a ring of items."""
    starts = np.random.default_rng(0).integers(items, size=users)
    lines = [" ".join(map(str, [f"u{u}", *((s + np.arange(9)) % items)])) for u, s in enumerate(starts)]
    (folder / "walks.txt").write_text("\n".join(lines))


def test_a_generator_is_trained_run_and_evaluated(grbench_here: Grbench, tmp_path: Path) -> None:
    walks(tmp_path)
    train = ["task=generate", "retrieval.levels=2", "retrieval.beam_width=12", *MODEL, *WORKLOAD, "training.epochs=10",
             "training.batch=8", "training.rate=0.01", "training.dropout=0"]  # fmt: skip
    client = MlflowClient(new_database(tmp_path / "outputs"))
    done = grbench_here("train", *train, "out=model")
    assert done.returncode == 0, done.stderr
    runs = client.search_runs([client.get_experiment_by_name("grbench-train").experiment_id], "tags.role = 'cell'")
    assert [run.info.run_name for run in runs] == ["generate csv hstu_tiny seed 0"]
    assert runs[0].data.metrics["test/hr10"] > 0.8 and runs[0].data.params["training.epochs"] == "10"
    assert "epoch 1: loss" in done.stderr and "validation: ndcg10 0." in done.stderr
    results = json.loads((tmp_path / "model" / "results.json").read_text())
    assert results["test"]["hr10"] > 0.8 and len(results["rows"]) == results["test"]["epochs"]
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert files == {"weights.safetensors", "weights.items.csv", "semantic_ids.safetensors", "results.json"}
    run = done.stdout.partition("python -m grbench ")[2].splitlines()[0].split()
    assert (
        run[:2] == ["engine=hstu", "task=generate"] and "retrieval.semantic_ids=model/semantic_ids.safetensors" in run
    )

    found = grbench_here("evaluate", *run, "engine.precision=bf16", "kernel=torch", "--out", "found", "--users", "50")
    assert found.returncode == 0, found.stderr
    [row] = json.loads((tmp_path / "found" / "results.json").read_text())["rows"]
    assert row["users"] == 50 and row["metrics"]["quality/hr10"] > 0.8
    low, high = row["intervals"]["quality/hr10"]
    assert low <= row["metrics"]["quality/hr10"] <= high
    assert abs(row["metrics"]["quality/loss/hr10"]) < 0.1 and "quality/popularity/hr10" in row["metrics"]
    assert "against fp32, with 97.5% confidence" in found.stdout and "| popularity |" in found.stdout

    refused = grbench_here("evaluate", *[w for w in run if "semantic_ids" not in w])
    assert refused.returncode == 2
    assert "trained with other semantic IDs; set retrieval.semantic_ids" in refused.stderr


def test_the_words_of_a_training_evaluate_what_it_trained(grbench_here: Grbench, tmp_path: Path) -> None:
    walks(tmp_path)
    words = [*MODEL, *WORKLOAD, "workload.num_candidates=6", "training.batch=8", "held_out=60", "training.epochs=1"]
    missing = grbench_here("evaluate", *words)
    assert missing.returncode == 2 and "model.weights=null: random weights have no quality" in missing.stderr
    places = {}
    for more in (["seed=1"], ["task=generate", "retrieval.levels=2", "seed=1"], ["out=mine"]):
        done = grbench_here("train", *words, *more, *QUIET)
        assert done.returncode == 0, done.stderr
        found = grbench_here("evaluate", *words, *more)
        assert found.returncode == 0, found.stderr
        task, part = ("generate", "retrieval") if "task=generate" in more else ("rank", "model")
        [line] = re.findall(rf"task={task}, {part}\.weights=(\S+), trained at 20", found.stderr)
        assert ("mine" in line) == ("out=mine" in more) and (tmp_path / line).is_file()
        places[line] = more
        assert ("hr10" in found.stdout) == (task == "generate") and ("auc" in found.stdout) == (task == "rank")
    assert len(places) == 3
    for more, message in (
        (["seed=2"], "model.weights=null: random weights have no quality"),  # nothing was trained with it
        (["out=mine", "seed=1"], "out=mine: its training has seed=0; give its words, or name another folder"),
        (["out=mien"], "out=mien: no training with task=rank lies there; `grbench train task=rank out=mien`"),
        (["out=mine", "task=generate"], "out=mine: no training with task=generate lies there; `grbench train task=gen"),
        (["out=mine", "training.rate=0.5"], "out=mine: its training has training.rate=0.002; give its words"),
    ):
        refused = grbench_here("evaluate", *words, *more)
        assert refused.returncode == 2 and message in refused.stderr


def test_a_training_does_not_overwrite_the_weights_of_another(grbench_here: Grbench, tmp_path: Path) -> None:
    walks(tmp_path)
    words = ["train", *MODEL, *WORKLOAD, "workload.num_candidates=6", "training.batch=8", "held_out=60", *QUIET]
    first = grbench_here(*words, "training.epochs=1", "out=mine")
    assert first.returncode == 0, first.stderr
    file = tmp_path / "mine" / "weights.safetensors"
    made = file.stat().st_mtime_ns
    refused = grbench_here(*words, "training.epochs=2", "model.heads=2", "out=mine")
    assert refused.returncode == 2 and file.stat().st_mtime_ns == made
    assert refused.stderr.splitlines()[-1] == (
        "grbench train: mine/weights.safetensors: of a training with model.heads=1 and not 2, training.epochs=1 and "
        "not 2; set another out=FOLDER, or remove the file to train anew"
    )
    again = grbench_here(*words, "training.epochs=1", "out=mine")
    assert again.returncode == 0 and file.stat().st_mtime_ns > made  # the same training makes the same weights
    (tmp_path / "mine" / "results.json").unlink()
    refused = grbench_here(*words, "training.epochs=1", "out=mine")
    assert refused.returncode == 2 and "weights without the results.json of their training" in refused.stderr


def test_a_training_cut_short_ends_with_the_minutes_that_it_needs(
    grbench_here: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks(tmp_path)
    words = ["train", *MODEL, *WORKLOAD, "workload.num_candidates=6", "training.batch=8", "held_out=60", *QUIET]
    loss, now = RankTask.loss, [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(task: RankTask, batch: list[int]) -> torch.Tensor:
        now[0] += 3.1  # longer than the minutes
        return loss(task, batch)

    monkeypatch.setattr(RankTask, "loss", slow)
    done = grbench_here(*words, "training.minutes=0.05", "out=mine")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"mine/weights\.safetensors: these weights are NOT useful yet: only 1 of the \d+ steps of an epoch "
        r"were trained; set training\.minutes=[\d.]+ or more and another out=FOLDER",
        done.stderr.splitlines()[-1],
    )


def test_a_training_that_is_stopped_says_what_is_kept(
    grbench_here: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks(tmp_path)
    words = ["train", *MODEL, *WORKLOAD, "workload.num_candidates=6", "training.batch=8", "held_out=60", *QUIET]
    words.append("training.epochs=3")
    loss, stop_at, steps = RankTask.loss, [2], [0]

    def stopped(task: RankTask, batch: list[int]) -> torch.Tensor:
        steps[0] += 1
        if steps[0] == stop_at[0]:
            raise Stopped(signal.SIGINT)
        return loss(task, batch)

    monkeypatch.setattr(RankTask, "loss", stopped)
    monkeypatch.setattr(loop, "SAVE_S", 0.0)
    done = grbench_here(*words, "out=mine")
    assert done.returncode == 130 and not list((tmp_path / "mine").glob("*.*"))
    assert "nothing of this training is kept; the same command begins it again" in done.stderr
    stop_at[0] = -(-int(re.search(r"(\d+) examples", done.stderr)[1]) // 8) + 1  # the first step of the second epoch
    for out, how in ((["out=mine"], "the same command goes on"), ([], "the same command with out=outputs/")):
        steps[0] = 0
        done = grbench_here(*words, *out)
        assert done.returncode == 130 and "checkpoint.pt keeps the finished epochs" in done.stderr
        assert how in done.stderr
    steps[0], stop_at[0] = 0, -1
    done = grbench_here(*words, "out=mine")
    assert done.returncode == 0 and "going on from" in done.stderr and "epoch 1:" not in done.stderr


def test_an_evaluation_shows_how_far_it_is_and_a_stop_keeps_what_is_done(
    grbench_here: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the second of two configurations, whose figures are lost."""
    walks(tmp_path)
    small = [*MODEL, *WORKLOAD, "workload.num_candidates=6", "model.tasks=[rated]"]
    done = grbench_here("train", *small, "training.epochs=1", "training.batch=8", "held_out=60", *QUIET, "out=ranker")
    assert done.returncode == 0, done.stderr
    rank = HSTUEngine.rank

    def stopped(engine: HSTUEngine, requests: Any) -> Any:
        if engine._precision == "fp16":
            raise Stopped(signal.SIGTERM)
        return rank(engine, requests)

    monkeypatch.setattr(HSTUEngine, "rank", stopped)
    monkeypatch.setattr(watch, "SILENCE_S", 0.0)
    words = ["engine=hstu", *small, "model.weights=ranker/weights.safetensors", "gate.quality_requests=20"]
    sweep = ["-m", "engine.precision=bf16,fp16", "scenario.max_batch=4"]
    done = grbench_here("evaluate", *words, *sweep, "--out", "found")
    assert done.returncode == 128 + signal.SIGTERM
    for line in ("answers: 20 of 20, ", "answers of the same model in fp32: 20 of 20, "):
        assert f"engine.precision=bf16: {line}" in done.stderr
    assert "interrupted with 1 of 2 configurations done; the rest is lost, and the same" in done.stderr
    assert "| engine.precision=bf16 |" in done.stdout and "fp16" not in done.stdout
    [row] = json.loads((tmp_path / "found" / "results.json").read_text())["rows"]
    assert row["precision"] == "bf16"


def pipeline_of(grbench_here: Grbench, folder: Path) -> list[str]:
    """Train both models of a pipeline in the folder. Return the words that run it."""
    walks(folder, items=60)
    small = [*MODEL, *WORKLOAD, "workload.num_candidates=6", "model.tasks=[rated]", "retrieval.levels=1"]
    for task in ("generate", "rank"):
        words = [f"task={task}", "training.epochs=6", "training.batch=8", "training.rate=0.01", "held_out=60"]
        done = grbench_here("train", *small, *words, *QUIET, f"out={task}")
        assert done.returncode == 0, done.stderr
    trained = ["retrieval.weights=generate/weights.safetensors", "model.weights=rank/weights.safetensors"]
    engines = ["engine=pipeline", "engine@engine.retrieve=hstu", "kernel=torch"]
    return [*engines, *small, *trained, "gate.quality_requests=40", "retrieval.beam_width=60"]


@pytest.mark.parametrize("wrong", ["", "zeros", "scales"])
def test_lists_in_eight_bits_have_the_hit_rate_of_fp32(
    grbench_here: Grbench, grbench_forked: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """A fault that begins behind the check of the scores is found by HR@10: the cell has no speed.

    Scores that are all equal leave the order of the retriever, whose HR@10 is far above the ranker's here.
    """
    begun: list[bool] = []
    measure, rank, product = quality.measure_lists, HSTUEngine.rank, fp8.product

    def measured(*args: Any) -> Any:
        begun.append(True)
        return measure(*args)

    def ranked(engine: HSTUEngine, requests: Any) -> Any:
        result = rank(engine, requests)
        if begun and wrong == "zeros" and engine._precision == "fp8":  # the reference is such an engine, too
            result.scores[:] = [np.zeros_like(scores) for scores in result.scores]
        return result

    def multiplied(x: Any, weight: torch.Tensor, scales: torch.Tensor, bias: Any) -> torch.Tensor:
        return product(x, weight, scales**3 if begun and wrong == "scales" else scales, bias)

    monkeypatch.setattr(quality, "measure_lists", measured)
    monkeypatch.setattr(HSTUEngine, "rank", ranked)
    monkeypatch.setattr(fp8, "product", multiplied)
    words = [*pipeline_of(grbench_here, tmp_path), "engine.rank.precision=fp8", "retrieval.k=60"]
    done = grbench_forked(*words, *QUIET, "scenario=closed_loop", "scenario.queries=20")
    [record] = [json.loads(file.read_text()) for file in (tmp_path / "outputs").rglob("record.json")]
    lists = record["gate"]["lists"]
    assert lists["precision"] == "fp8" and lists["users"] == 40
    low, high = lists["hr10_interval"]
    assert low < lists["hr10_reference"] <= high
    assert (low <= lists["hr10"] <= high) is (not wrong), lists
    if not wrong:
        assert done.returncode == 0 and record["status"] == "OK", record["error"]
        assert lists["hr10"] == record["metrics"]["quality/hr10"]
        return
    assert done.returncode == 1 and record["status"] == "INCORRECT"
    assert "fp8 has an HR@10 of" in record["error"] and "gate.allow_loss=[fp8]" in record["error"]
    assert "throughput_rps" not in record["metrics"]


def test_cells_of_a_sweep_share_the_lists_of_the_reference(
    grbench_here: Grbench, grbench_forked: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, prepared = tmp_path / "references", quality.prepared

    def counted(*args: Any) -> Any:
        with built.open("a") as file:
            file.write("built\n")
        return prepared(*args)

    monkeypatch.setattr(quality, "prepared", counted)
    words = [*pipeline_of(grbench_here, tmp_path), "engine.retrieve.precision=bf16", "runner.keep_engine=false"]
    sweep = ["scenario.queries=20,30", "gate.quality_requests=40,25"]
    done = grbench_forked("-m", *words, *QUIET, "scenario=closed_loop", *sweep)
    assert done.returncode == 0, done.stderr
    found: dict[int, list[Any]] = {40: [], 25: []}
    for file in (tmp_path / "outputs").rglob("record.json"):
        record = json.loads(file.read_text())
        figures = {name: value for name, value in record["metrics"].items() if name.startswith("quality/")}
        found[record["gate"]["lists"]["users"]].append([figures, record["gate"]["lists"]])
    assert all(first == second for first, second in found.values())
    assert len(built.read_text().split()) == len(found)  # one for each number of users

    built.unlink()
    monkeypatch.setattr(evaluate, "prepared", counted)
    done = grbench_forked("evaluate", "-m", *words[:-2], "engine.retrieve.precision=bf16,fp16")
    assert done.returncode == 0, done.stderr
    assert len(built.read_text().split()) == 3  # of two precisions, and one reference


def test_a_pipeline_of_trained_models_has_its_quality_in_the_record(
    grbench_here: Grbench, grbench_forked: Grbench, tmp_path: Path
) -> None:
    run = [*pipeline_of(grbench_here, tmp_path), "engine.retrieve.precision=bf16"]
    found = grbench_here("evaluate", *run)
    assert found.returncode == 0, found.stderr
    assert "| engine=pipeline" in found.stdout or "| pipeline |" in found.stdout
    done = grbench_forked("-m", *run, *QUIET, "scenario=closed_loop", "scenario.queries=20", "retrieval.k=10,60")
    assert done.returncode == 0, done.stderr
    found = [json.loads(file.read_text()) for file in (tmp_path / "outputs").rglob("record.json")]
    short, whole = sorted(found, key=lambda record: record["spec"]["retrieval"]["k"])
    for record, cutoffs in ((short, {5, 10}), (whole, {5, 10, 50})):  # ten items have no HR@50
        metrics, intervals = record["metrics"], record["intervals"]
        names = {f"{kind}{cutoff}" for kind in ("hr", "ndcg", "mrr") for cutoff in cutoffs}
        for group in ("", "loss/", "popularity/"):
            of = [name.removeprefix(f"quality/{group}") for name in metrics if name.startswith(f"quality/{group}")]
            assert {name for name in of if "/" not in name and not name.endswith("_new")} == names
        assert 0 < metrics["quality/ndcg10"] <= metrics["quality/hr10"]
        for name in ("quality/hr10", "quality/loss/ndcg10"):
            assert intervals[name][0] <= metrics[name] <= intervals[name][1]
        assert abs(metrics["quality/loss/ndcg10"]) < 0.1
    assert short["metrics"]["quality/hr10"] > 0.7 > short["metrics"]["quality/popularity/hr10"]
    assert {f"quality/{name}_new" for name in names} <= whole["metrics"].keys()
    assert any("hr10_new" in note and "raise retrieval.k" in note for note in short["notes"])


def test_a_ranker_learns_what_the_workload_labels_by_default(
    grbench_here: Grbench, grbench_forked: Grbench, tmp_path: Path
) -> None:
    walks(tmp_path)
    small = [*MODEL, *WORKLOAD, "workload.num_candidates=6"]
    done = grbench_here("train", *small, "training.epochs=2", "training.batch=8", "held_out=60", *QUIET, "out=ranker")
    assert done.returncode == 0, done.stderr
    assert "model.tasks=[rated]: all that the workload labels" in done.stderr
    assert "'model.tasks=[rated]' model.weights=ranker/weights.safetensors" in done.stdout
    assert re.search(r"\| epochs +\| 2 +\|", done.stdout) and "2.0000" not in done.stdout
    typed = ["engine=hstu", *small, "model.tasks=[rated]", "model.weights=ranker/weights.safetensors"]
    cached = ["cache=lru", "cache.memory_gb=0.01", "cache.precision=int8"]
    found = grbench_here("evaluate", *typed, *cached, "gate.quality_requests=20", "--out", "found")
    assert found.returncode == 0, found.stderr
    [row] = json.loads((tmp_path / "found" / "results.json").read_text())["rows"]
    # Rounded states change the scores a little; without them the engine would be compared with itself, without a loss.
    assert 0 < abs(row["metrics"]["quality/loss/rated/ne"]) < 0.05
    share = int(re.search(r"(\d+)% of the histories of ranked requests were read from the KV cache", found.stdout)[1])
    assert share > 50

    words = ["engine.precision=bf16,fp16", "gate.quality_requests=20", "gate.allow_loss=[bf16,fp16]"]
    done = grbench_forked("-m", *typed, *words, *QUIET, "scenario=closed_loop", "scenario.queries=20")
    assert done.returncode == 0, done.stderr
    cells = [json.loads(file.read_text()) for file in (tmp_path / "outputs").rglob("record.json")]
    assert len({cell["gate"]["quality"]["tasks"]["rated"]["auc_reference"] for cell in cells}) == 1 < len(cells)
    [_] = (tmp_path / "outputs").rglob(".references/*")  # the second cell has asked for the same

    made = grbench_here("quantise", *typed, "gate.quality_requests=20", "--out", "small/e4m3.safetensors")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "small" / "e4m3.items.csv").is_file()
    assert all(
        f"| {name}, {of} |" in made.stdout for name in ("layers.0.uvqk", "head_hidden") for of in ("weight", "operand")
    )
    auc = float(re.search(r"\| rated/auc \| (\S+) \| \S+% \(\S+% to \S+%\) \|", made.stdout)[1])
    typed[-1] = "model.weights=small/e4m3.safetensors"
    words = ["engine.precision=fp8", "gate.quality_requests=20", "--out", "again"]
    again = grbench_here("evaluate", *typed, *words)
    assert again.returncode == 0, again.stderr
    [row] = json.loads((tmp_path / "again" / "results.json").read_text())["rows"]
    assert row["precision"] == "fp8" and row["metrics"]["quality/rated/auc"] == pytest.approx(auc, abs=6e-5)
    for out, message in (
        ("small/e4m3.safetensors", "it is model.weights; give another file"),
        ("other.safetensors", "is in e4m3 already; give the weights that it was made of"),
        ("small/e4m3.bin", "allowed is a name that ends in .safetensors"),
    ):
        refused = grbench_here("quantise", *typed, "gate.quality_requests=20", "--out", out)
        assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["engine=hstu"], "model.weights=null: random weights have no quality; give a file, or run `grbench train`"),
        (["engine=hstu", "task=generate"], "engine.precision=fp8 is for ranking; set engine.precision=bf16, or task="),
        (["engine=aoti"], "engine.precision=fp8: allowed is one of auto, fp32, fp16, bf16"),
        (
            ["engine=hstu", "model.head_dim=40"],
            "engine.precision=fp8 and model.head_dim=40: allowed are multiples of 16",
        ),
        (["engine=hstu", "--requests", "0"], "--requests 0: allowed is >= 1"),
        (["engine=hstu", "model.weights=none.safetensors"], "model.weights=none.safetensors: no such file"),
    ],
)
def test_what_can_not_be_quantised_is_named(grbench_here: Grbench, words: list[str], message: str) -> None:
    done = grbench_here("quantise", *words, "workload=ml_100k", "--out", "e4m3.safetensors")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["workload=synthetic"], "workload=synthetic: its events are random, so there is nothing to learn"),
        (
            ["model=decoder_tiny"],
            "model=decoder_tiny: a decoder learns task=generate retrieval.levels=1 only",
        ),
        (
            ["model=decoder_tiny", "task=generate", "retrieval.levels=1", "model.vocabulary=5000"],
            "model.vocabulary=5000: training has a softmax over the codes of a level; allowed here is null",
        ),
        *(
            ([f"training.{option}=0.4", *words], f"training.{option}=0.4: it is for {where}; leave it out")
            for option, words, where in (
                ("smoothing", [], "task=generate"),
                ("crop", [], "task=generate"),
                ("blanks", [], "task=generate"),
                ("temperature", [], "task=generate retrieval.levels=1"),
                ("temperature", ["task=generate"], "task=generate retrieval.levels=1"),
                ("teacher_temperature", ["task=generate"], "training.teacher=FILE"),
                ("teacher_share", ["task=generate"], "training.teacher=FILE"),
            )
        ),
        (
            ["task=generate", "retrieval.levels=1", "training.negatives=4", "training.smoothing=0.1"],
            "training.negatives=4 and training.smoothing=0.1: a smooth target has a share of all items",
        ),
        (["training.negatives=4"], "training.negatives=4: it is for task=generate retrieval.levels=1"),
        *(
            ([f"training.{typed}"], f"training.{typed}: it is for task=generate; leave it out")
            for typed in ("validation_users=4", "validation_users=5000", "crop=0")  # two are the defaults
        ),
        (
            ["task=generate", "retrieval.levels=1", "training.item_vectors=walks.txt"],
            "training.item_vectors=walks.txt: it is for",
        ),
        (
            ["task=generate", *WORKLOAD, *MODEL, "out=/proc/model"],
            "out=/proc/model: No such file or directory; set out to a folder that can be written",
        ),
        (["training.dropout=1"], "training.dropout=1.0: allowed is float >= 0 and <= 0.95"),
        (
            [*WORKLOAD, "workload.num_candidates=6", "held_out=8", "model.tasks=[liked]"],
            "the workload does not label them; set 'model.tasks=[rated]'",
        ),
        (
            ["task=generate", *WORKLOAD, *MODEL, "retrieval.levels=3", "model.max_positions=2"],
            "model.max_positions=2: an item has 3 codes, one a position; set it to 3 or more",
        ),
        (
            ["task=generate", *WORKLOAD, "training.item_vectors=walks.txt"],
            "training.item_vectors=walks.txt: not a readable safetensors file: it is text",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    grbench_here: Grbench, tmp_path: Path, words: list[str], message: str
) -> None:
    walks(tmp_path)
    done = grbench_here("train", *words, *QUIET)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.strip().splitlines()[-1].startswith("grbench train: ")


@pytest.mark.parametrize(
    "words, message",
    [
        (["engine=hstu"], "model.weights=null: random weights have no quality; `grbench train` makes a file"),
        (
            ["engine=pipeline", "model.weights=walks.txt"],
            "retrieval.weights=null: random weights have no quality, and engine=pipeline has two models, model and "
            "retrieval; set engine=hstu task=rank for model.weights alone, or retrieval.weights=FILE as well",
        ),
        (
            ["engine=pipeline", "retrieval.weights=walks.txt"],
            "set engine=hstu task=generate for retrieval.weights alone, or model.",
        ),
        (["engine=hstu", "workload=synthetic"], "workload=synthetic: its events are random"),
        (
            ["engine=hstu", "model.weights=walks.txt", "gate.quality_requests=0"],
            "gate.quality_requests=0: no request would be ranked; allowed here is >= 1",
        ),
        (
            ["engine=pipeline", "model.weights=walks.txt", "retrieval.weights=walks.txt"],
            "the file does not say that each user's last events, which are to be found, were left out",
        ),
        (["engine=hstu", "--users", "-1"], "--users -1: allowed is >= 0"),
        (["training.epochs=["], "training.epochs=[: [ is not closed; write"),
        (["held_out='9"], "held_out='9: "),
        (
            ["engine=hstu", "model.weights=walks.txt", "--users", "9"],
            "--users 9: to rank, set gate.quality_requests=NUMBER instead, the last requests",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    grbench_here: Grbench, tmp_path: Path, words: list[str], message: str
) -> None:
    walks(tmp_path)
    done = grbench_here("evaluate", *([] if "workload=synthetic" in words else WORKLOAD), *words)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
