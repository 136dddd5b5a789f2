"""doctor, sizing and overhead as a user runs them, and the numbers that sizing prints."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Grbench

from grbench.config.compose import compose_spec
from grbench.execution.records import RunRecord, Status
from grbench.scenarios.config import OfflineConfig
from grbench.tools import doctor, overhead, sizing
from grbench.tools.sizing import flops, fp8_flops, kv_bytes, last_layer, parameters, ranking_attention, weight_bytes
from grengines import registry as engines
from grengines.api import Catalogue, Engine
from grengines.last_layer import LastLayer
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.fp8 import use_fp8
from grengines.models.hstu.model import build_model


def test_doctor_lists_everything_with_reason_and_remedy(grbench_here: Grbench) -> None:
    done = grbench_here("doctor", "--json", "--quick")
    assert done.returncode == 0, done.stderr
    found = {(f["kind"], f["name"]): f for f in json.loads(done.stdout)}
    assert found["engine", "hstu"]["ok"]
    assert found["kernel", "hstu_attention=torch"]["ok"]
    in_fp8 = found["precision", "hstu engine.precision=fp8"]
    if not torch.cuda.is_available():
        assert in_fp8["ok"] and in_fp8["detail"].startswith("emulated by PyTorch in fp32")
    if not torch.cuda.is_available():  # a kernel that imports and can't run is not ok
        for name in ("hstu_attention=triton", "hstu_attention=cutlass", "paged_write=triton"):
            assert not found["kernel", name]["ok"] and "needs an NVIDIA GPU" in found["kernel", name]["detail"]
    assert found["package", "mlcommons-loadgen"]["ok"]
    for (kind, name), finding in found.items():
        if not finding["ok"]:
            assert finding["detail"], (kind, name)
            assert finding["remedy"] or kind == "device", (kind, name)
    table = grbench_here("doctor", "--quick")
    assert table.returncode == 0
    lines = table.stdout.splitlines()
    assert not any(line.endswith(" ") for line in lines)
    for (_, name), finding in found.items():  # each in one line, with all that is to be said
        assert any(all(text in line for text in (name, finding["detail"], finding["remedy"])) for line in lines), name


@pytest.mark.usefixtures("forked_workers")
def test_doctor_runs_engines(grbench_here: Grbench, monkeypatch: pytest.MonkeyPatch) -> None:
    run = doctor._run
    broken = RunRecord({}, "", Status.ERROR, "", 1.0, error="libfoo.so: cannot open; pip install foo")
    monkeypatch.setattr(doctor, "_run", lambda name: run(name) if name == "hstu" else broken)
    monkeypatch.setattr(engines, "names", lambda: ["hstu", "onnxruntime", "tensorrt"])
    monkeypatch.setattr(engines, "availability", lambda name: "no GPU; get one" if name == "tensorrt" else None)
    found = {f.name: f for f in doctor.findings() if f.kind == "engine"}
    assert found["hstu"].ok and "ran a tiny case in " in found["hstu"].detail and "(rank, " in found["hstu"].detail
    assert found["onnxruntime"] == doctor.Finding(
        "engine", "onnxruntime", False, "ERROR: libfoo.so: cannot open", "pip install foo"
    )
    assert found["tensorrt"] == doctor.Finding("engine", "tensorrt", False, "no GPU", "get one")


def test_doctor_shows_a_finding_before_it_looks_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is a file, whose lines Python would keep until the end."""
    seen: list[list[str]] = []
    broken = RunRecord({}, "", Status.ERROR, "", 1.0, error="it broke")

    def run(name: str) -> RunRecord:
        seen.append((tmp_path / "out").read_text().splitlines())
        return broken

    monkeypatch.setattr(doctor, "_run", run)
    monkeypatch.setattr(engines, "names", lambda: ["hstu", "onnxruntime", "hf"])
    monkeypatch.setattr(engines, "availability", lambda name: None)
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert doctor.main([]) == 1  # engine hstu does not run
    assert [len(lines) for lines in seen] == [1, 2, 3]  # the heading, and the engines before
    assert [line.split()[:3] for line in seen[2][1:]] == [["engine", n, "missing"] for n in ("hstu", "onnxruntime")]
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[:3] == seen[2] and len({line.index("ERROR: it broke") for line in lines[1:4]}) == 1


@pytest.mark.parametrize("name", ["hstu_tiny", "hstu_0p2b", "dlrm_v3", "wide_heads"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    model = compose_spec([f"model={name}"])[0].model
    e, h = model.embedding_dim, model.heads
    widths = 2 * h * (model.qk_dim + model.v_dim)
    layer = 2 * e + (e + 1) * widths + 2 * h * model.v_dim + 3 * h * model.v_dim * e
    counts = parameters(model, Catalogue(num_users=7, num_items=1000, num_actions=3))
    assert counts["layers"] == model.layers * layer
    tables = 1000 + 3 + 1 + model.max_positions + model.time_buckets
    assert counts["tables"] == tables * e
    inputs = e + (6 if name == "dlrm_v3" else 0)  # its head sees 6 dot products of a candidate's 4 vectors
    assert counts["head"] == 2 * e + (inputs + 1) * model.head_dim + (model.head_dim + 1) * 3


def test_the_models_have_the_sizes_their_names_promise() -> None:
    model = compose_spec(["model=hstu_0p2b"])[0].model
    total = sum(parameters(model, Catalogue(1, 100_000, 4)).values())
    assert total == pytest.approx(0.2e9, rel=0.05)


def test_flops_of_a_case_counted_by_hand() -> None:
    model = HSTUConfig(layers=3, embedding_dim=8, heads=2, qk_dim=4, v_dim=6, head_dim=5, tasks=["a", "b"])
    # 4 history tokens and 2 candidates: rows see 1, 2, 3, 4 and twice 5 columns.
    pairs = 1 + 2 + 3 + 4 + 5 + 5
    layer = 2 * 6 * 8 * (2 * 2 * (4 + 6)) + 2 * 6 * (3 * 2 * 6) * 8 + 2 * pairs * 2 * (4 + 6)
    # The last layer: keys and values of all tokens; u, q, attention and the output of the candidates.
    last = 2 * 6 * 8 * (2 * (4 + 6)) + 2 * 2 * 8 * (2 * (4 + 6)) + 2 * 2 * (3 * 2 * 6) * 8 + 2 * (5 + 5) * 2 * (4 + 6)
    head = 2 * 2 * (8 * 5 + 5 * 2)
    assert flops(model, 4, 2) == 2 * layer + last + head
    # All of the history cached: only the candidates' rows are left.
    layer = 2 * 2 * 8 * (2 * 2 * (4 + 6)) + 2 * 2 * (3 * 2 * 6) * 8 + 2 * 10 * 2 * (4 + 6)
    assert flops(model, 4, 2, cached=4) == 3 * layer + head
    model.interaction = True  # of each candidate 6 products of 8 numbers, and 6 more inputs of 5 hidden units
    assert flops(model, 4, 2, cached=4) == 3 * layer + head + 2 * 2 * (6 * 8 + 6 * 5)
    assert kv_bytes(model, 4, "bf16") == 3 * 4 * 2 * (4 + 6) * 2


def test_flops_follow_the_rows_that_an_engine_computes_in_the_last_layer() -> None:
    model = HSTUConfig(layers=3, embedding_dim=8, heads=2, qk_dim=4, v_dim=6, head_dim=5, tasks=["a", "b"])
    head, width, output = 2 * 8 * 5 + 2 * 5 * 2, 2 * (4 + 6), 3 * 2 * 6  # head: of one candidate

    def layer(tokens: int, rows: int, pairs: int) -> int:
        return 2 * 8 * (tokens * width + rows * (width + output)) + 2 * pairs * width

    # 4 events and 2 candidates: rows see 1, 2, 3, 4 and twice 5 columns.
    every, some = layer(6, 6, 20), layer(6, 2, 10)
    assert flops(model, 4, 2, rows=LastLayer.EVERY) == 3 * every + 2 * head
    for rows in (LastLayer.READ, LastLayer.HALF):
        assert flops(model, 4, 2, rows=rows) == 2 * every + some + 2 * head
        assert ranking_attention(model, 4, 2, rows) == (2 * 20 + 10) * 2 * width
    # 1 event and 2 candidates: engine=hstu saves no launches for a third of the rows.
    every, some = layer(3, 3, 5), layer(3, 2, 4)
    assert flops(model, 1, 2, rows=LastLayer.READ) == 2 * every + some + 2 * head
    assert flops(model, 1, 2) == flops(model, 1, 2, rows=LastLayer.EVERY) == 3 * every + 2 * head
    # Cached, a visit with few new events is mostly candidates.
    assert flops(model, 4, 2, cached=3) == flops(model, 4, 2, cached=3, rows=LastLayer.EVERY)
    assert flops(model, 4, 2, cached=3, rows=LastLayer.READ) < flops(model, 4, 2, cached=3)
    assert fp8_flops(model, 4, 2, LastLayer.EVERY) == 3 * layer(6, 6, 0) + 2 * 2 * 8 * 5


@pytest.mark.parametrize(
    ("words", "task", "rows"),
    [
        ("engine=hstu", "rank", LastLayer.HALF),
        ("engine=hstu engine.candidate_microbatch=8", "rank", LastLayer.READ),
        ("engine=hstu task=generate", "generate", LastLayer.READ),
        ("engine=aoti", "rank", LastLayer.READ),
        ("engine=onnxruntime", "rank", LastLayer.READ),
        ("engine=vllm", "generate", LastLayer.READ),
        ("engine=hf", "generate", LastLayer.EVERY),
        ("engine=remote", "rank", None),
        ("engine=pipeline engine@engine.rank=aoti", "rank", LastLayer.READ),
        ("engine=pipeline engine@engine.rank=hstu", "rank", LastLayer.HALF),
        ("engine=pipeline engine@engine.retrieve=hstu", "generate", LastLayer.READ),
    ],
)
def test_every_engine_says_what_its_last_layer_computes(words: str, task: str, rows: LastLayer | None) -> None:
    assert last_layer(compose_spec(words.split())[0], task) is rows


def test_sizing_prints_and_refuses(grbench_here: Grbench) -> None:
    done = grbench_here("sizing", "model=dlrm_v3", "workload=synthetic_long")
    assert done.returncode == 0, done.stderr
    assert "dlrm_v3: " in done.stdout
    assert re.search(r"16384 +2048 +1,739\.581", done.stdout)
    refused = grbench_here("sizing", "model=nope")
    assert refused.returncode == 2
    assert refused.stderr.startswith("grbench sizing: model=nope: no such option; allowed: decoder_0p2b, ")
    assert "Traceback" not in refused.stderr
    refused = grbench_here("sizing", "engine=hstu", "retrieval.k=4")
    assert refused.stderr.startswith("grbench sizing: retrieval.k=4: task=rank searches for no items")
    for flag, value in (("--items", "0"), ("--memory-gib", "inf")):
        refused = grbench_here("sizing", flag, value)
        assert refused.stderr.startswith(f"grbench sizing: {flag} {value}: allowed is a finite number > 0")


def test_sizing_cuts_no_figure_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert sizing.main(["engine=hstu", "model=dlrm_v3", "workload=synthetic_long"]) == 0
    assert re.search(r"16384 +2048 +1,739\.581", out := capsys.readouterr().out) and "…" not in out


def test_sizing_of_products_in_fp8(grbench_here: Grbench) -> None:
    """The bytes are those of the model that the engine makes, and attention bounds what fp8 can gain."""
    model, catalogue = compose_spec(["model=dlrm_v3", "model.embedding_rows=1000"])[0].model, Catalogue(3, 1000, 4)
    made = build_model(model, catalogue, 0, "cpu", torch.bfloat16)
    numbers = sum(p.numel() for p in made.parameters())
    assert weight_bytes(model, numbers, "bf16") == sum(p.nbytes for p in made.parameters())
    use_fp8(made)
    in_memory = sum(p.nbytes for p in made.parameters()) + sum(b.nbytes for b in made.buffers())
    assert weight_bytes(model, numbers, "fp8") == in_memory
    # Without history there is next to no attention: twice as fast at most. It takes nearly all of a long one.
    assert 1.9 < 1 / (1 - fp8_flops(model, 0, 2048) / flops(model, 0, 2048) / 2) < 2
    done = grbench_here("sizing", "model=dlrm_v3", "workload=synthetic_long", "--precision", "fp8", "engine=hstu")
    assert done.returncode == 0, done.stderr
    [gains] = re.findall(r"at most ([\d., ]+) times as fast as in bf16", done.stdout)
    assert [float(g) for g in gains.split(", ")] == sorted(map(float, gains.split(", ")), reverse=True)
    share = fp8_flops(model, 16384, 2048) / flops(model, 16384, 2048)
    assert gains.endswith(f"{1 / (1 - share / 2):.2f}")
    refused = grbench_here("sizing", "task=generate", "engine=hstu", "--precision", "fp8")
    assert refused.returncode == 2 and "--precision fp8: only ranking has it" in refused.stderr
    refused = grbench_here("sizing", "model=dlrm_v3", "model.head_dim=40", "engine=hstu", "--precision", "fp8")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "--precision fp8 and model.head_dim=40: allowed are multiples of 16" in refused.stderr
    assert "set --precision bf16" in refused.stderr


def test_fp8_operations_of_a_case_counted_by_hand() -> None:
    model = HSTUConfig(layers=3, embedding_dim=8, heads=2, qk_dim=4, v_dim=6, head_dim=5, tasks=["a", "b"])
    whole = 2 * 6 * 8 * (2 * 2 * (4 + 6)) + 2 * 6 * (3 * 2 * 6) * 8
    last = 2 * 6 * 8 * (2 * (4 + 6)) + 2 * 2 * 8 * (2 * (4 + 6)) + 2 * 2 * (3 * 2 * 6) * 8
    assert fp8_flops(model, 4, 2) == 2 * whole + last + 2 * 2 * 8 * 5


def test_the_share_of_attention_leaves_out_what_the_last_layer_does_not_compute(grbench_here: Grbench) -> None:
    model = HSTUConfig(layers=3, embedding_dim=8, heads=2, qk_dim=4, v_dim=6, head_dim=5, tasks=["a", "b"])
    pairs = 1 + 2 + 3 + 4 + 5 + 5
    assert ranking_attention(model, 4, 2) == 2 * (2 * pairs * 2 * (4 + 6)) + 2 * (5 + 5) * 2 * (4 + 6)
    done = grbench_here("sizing", "engine=hstu", "model=dlrm_v3", "workload=synthetic_long")
    model = compose_spec(["model=dlrm_v3"])[0].model
    share = ranking_attention(model, 16384, 2048) / flops(model, 16384, 2048)
    assert re.search(rf"16384 +2048 +1,739\.581 +{share:.0%} ", done.stdout)
    # The rest is products, but for the head's dot products and its last one.
    rest = fp8_flops(model, 16384, 2048) / flops(model, 16384, 2048)
    assert 0.999 < share + rest < 1


def test_sizing_of_pages_in_vllm(grbench_here: Grbench) -> None:
    """A key of 128 numbers takes 256 bytes in bf16, and 132 with its scale."""
    pages = {}
    for stored in ("engine", "fp8"):
        done = grbench_here("sizing", "engine=vllm", "model=hstu_0p2b", f"engine.kv_cache_precision={stored}")
        pages[stored] = float(re.findall(r"^ +512 .* (\S+) +\S+$", done.stdout, re.MULTILINE)[0])
    assert pages == {"engine": 72.0, "fp8": pytest.approx(72 * 132 / 256, abs=0.01)}


def test_sizing_of_a_pipeline_lists_both_stages(grbench_here: Grbench) -> None:
    done = grbench_here("sizing")
    assert done.returncode == 0, done.stderr
    searched, ranked = done.stdout.split("to rank\n")
    assert searched.startswith("to generate\n") and "beams" in searched
    assert "candidates" in ranked
    trained = compose_spec(["engine=hstu"])[0]
    counts = parameters(trained.ranking_model, Catalogue(num_users=943, num_items=1682, num_actions=2))
    assert f"{sum(counts.values()) / 1e6:,.1f} M parameters" in ranked and ranked.count("; 1,682 items") == 1
    given = grbench_here("sizing", "engine=hstu", "--items", "1000000")
    assert "; 1,000,000 items" in given.stdout


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ("--repeats 0", 2, "--repeats 0: allowed is >= 1"),
        ("engine=hf", 2, "task=generate: "),
        ("retrieval.k=4", 2, "retrieval.k=4: task=rank searches for no items"),
        ("workload=csv workload.path=missing.csv", 2, "workload.path=missing.csv: no such file; set workload.path"),
    ],
)
def test_what_overhead_can_not_measure_is_one_line(
    grbench_here: Grbench, arguments: str, code: int, message: str
) -> None:
    done = grbench_here("overhead", *arguments.split())
    assert done.returncode == code
    [line] = done.stderr.splitlines()
    assert line.startswith(f"grbench overhead: {message}")


@pytest.mark.serial
def test_overhead_is_small_beside_the_engine(grbench_forked: Grbench) -> None:
    done = grbench_forked(
        "overhead", "workload=synthetic", "--repeats", "4", "workload.max_requests=50", "scenario.queries=100"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"overhead: ([\d.]+) us, ([\d.]+)% of hstu on hstu_tiny", done.stdout)
    assert found, done.stdout
    assert 0 < float(found[1]) < 1000 and float(found[2]) < 10  # about 1% on idle cores
    loadgens = re.search(r"LoadGen: ([\d.]+) us at p50", done.stdout)
    assert loadgens and float(found[1]) < float(loadgens[1]) < 1000
    checks = re.search(r"checks: (-?[\d.]+) us an answer, between batches .*: ([\d.]+) us .* without", done.stdout)
    assert checks, done.stdout
    assert float(checks[1]) < float(checks[2])  # less than the rest of the harness


def test_overhead_measures_the_engine_of_the_cell_and_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    build = engines.build
    closed: list[str] = []

    def watched(*parts: Any, **more: Any) -> Engine:
        engine = build(*parts, **more)
        cache, close = engine.actual()["cache"]["name"], engine.close
        monkeypatch.setattr(engine, "close", lambda: closed.append(cache) or close())
        return engine

    monkeypatch.setattr(engines, "build", watched)
    monkeypatch.setattr(overhead, "OFFLINE", OfflineConfig(max_batch=32, queries=64))
    cell = ["workload=synthetic", "workload.max_requests=20", "scenario.queries=20", "gate.requests=2", "cache=lru"]
    assert overhead.main([*cell, "--repeats", "1"]) == 0
    assert closed == ["lru"]


@pytest.mark.parametrize(
    "words, line",
    [
        (["train", "engine=hstu"], "train: engine: this command has no such group of options; leave it out, or see"),
        (["engine=hstu", "--json", "--csv"], ": --json --csv: only one of them at a time; leave the others out"),
        (["report", "notes.txt"], "report: notes.txt: it is a file; give the folder of a record, or one above it"),
        (["reports", "batching"], "reports: --root reports: no report there; give the folder that holds them"),
        (["reports", "--check"], "reports: --root reports: no report there; give the folder that holds them"),
        (["export", "--out", "notes.txt"], "export: --out notes.txt: it is a file; give a folder"),
        (["build-plan", "--out", "notes.txt"], "build-plan: --out notes.txt: it is a file; give a folder"),
    ],
)
def test_what_a_stranger_types_wrong_is_one_line(
    grbench_here: Grbench, tmp_path: Path, words: list[str], line: str
) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    done = grbench_here(*words)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"grbench {line}".replace("grbench :", "grbench:"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
