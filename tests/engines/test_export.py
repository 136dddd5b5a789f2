"""The export: its attention against the reference, its files, its check of itself, the command and its errors."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.command import Grbench
from helpers.hstu_oracle import make_requests
from helpers.onnx_attention import attention_session
from helpers.properties import examples
from helpers.race import race
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from grbench.tools.export import parser
from grbench.tools.ranking_model import compose_ranking
from grengines.api import Catalogue
from grengines.export import exporter
from grengines.export.check import check
from grengines.export.identity import command, model_hash, sources
from grengines.export.module import INPUTS, ExportedRanker, inputs_of, longest_history
from grengines.export.onnx_attention import DOMAIN, NAME
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import build_model
from grengines.models.hstu.quantised import round_input, round_weight
from grengines.models.hstu.reference import RankingReference
from grengines.models.hstu.weights import save_weights
from grengines.numerics import IncorrectError, relative_error
from grengines.runtime.batch import Bucket, Encoding, pack
from grkernels.hstu_attention.reference import hstu_attention as reference_attention

CPU = torch.device("cpu")
CATALOGUE = Catalogue(num_users=9, num_items=60, num_actions=3)
# Every option of the model that changes what is exported.
MODEL = HSTUConfig(
    layers=2, embedding_dim=32, heads=2, qk_dim=16, v_dim=8, scaling_seqlen=128, contextual_seq_len=2,
    max_attn_len=12, max_positions=20, interaction=True, head_dim=16,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("parsed_once")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> exporter.Export:
    return exporter.export(MODEL, CATALOGUE, 0, "fp32", tmp_path_factory.mktemp("export") / "fp32", skip_hidden=True)


@examples(60)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=4),
    context=st.integers(0, 3),
    window=st.sampled_from([0, 0, 1, 4]),
    tile=st.integers(1, 20),
    spare=st.integers(0, 3),
    skip_hidden=st.booleans(),
    of_candidates=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_onnx_attention_equals_the_reference(
    sizes: list[tuple[int, int]],
    context: int,
    window: int,
    tile: int,
    spare: int,
    skip_hidden: bool,
    of_candidates: bool,
    seed: int,
) -> None:
    lengths = [context + history + targets for history, targets in sizes]
    queries = [targets for _, targets in sizes] if of_candidates else lengths
    if not sum(queries):
        return
    rng, H, dqk, dv, N = np.random.default_rng(seed), 2, 3, 4, 16
    counts = ((queries, dqk), (lengths, dqk), (lengths, dv))
    q, k, v = (rng.standard_normal((sum(n) + spare, H, d)).astype(np.float32) for n, d in counts)
    q_offsets, offsets, targets = np.cumsum([0, *queries]), np.cumsum([0, *lengths]), np.array([t for _, t in sizes])
    tiles = -(-max(queries) // tile)
    session = attention_session(H, dqk, dv, N, context, window, 0.4, skip_hidden)
    out = session.run(
        None,
        {
            "q": q, "k": k, "v": v, "q_offsets": q_offsets, "offsets": offsets, "num_targets": targets,
            "tiles": np.arange(tiles * tile).reshape(tiles, tile),
            "columns": np.arange(max(context + max(h for h, _ in sizes), 1) + spare),
        },
    )[0]  # fmt: skip
    expected = reference_attention(
        *(torch.from_numpy(x) for x in (q, k, v)), q_offsets=torch.from_numpy(q_offsets),
        kv_offsets=torch.from_numpy(offsets), num_targets=torch.from_numpy(targets), max_q_len=max(queries),
        max_kv_len=max(lengths), scaling_seqlen=N, alpha=0.4, contextual_seq_len=context, max_attn_len=window,
    ).numpy()  # fmt: skip
    assert np.isfinite(out).all()  # rows past the sequences may hold any finite values
    np.testing.assert_allclose(out[: q_offsets[-1]], expected[: q_offsets[-1]], rtol=1e-5, atol=1e-6)


def test_memory_does_not_grow_with_the_square_of_the_history() -> None:
    n = 8192  # n * n fp32 scores take 256 MiB
    code = f"""
import numpy as np
from helpers.onnx_attention import attention_session
session = attention_session(1, 4, 4, 64, 0, 0, 0.5, True)
def peak(length, tile):
    x = np.ones((length, 1, 4), np.float32)
    offsets = np.array([0, length])
    session.run(None, dict(q=x, k=x, v=x, q_offsets=offsets, offsets=offsets, num_targets=np.array([0]),
                           tiles=np.arange(length).reshape(-1, tile), columns=np.arange(length)))
    with open("/proc/self/status") as status:  # getrusage would include the parent's peak
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024
print(peak(256, 128), peak({n}, 128), peak({n}, {n}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    small, tiled, whole = map(int, done.stdout.split())  # peak memory so far, MiB
    assert tiled - small < 100 < 250 < whole - tiled


def test_the_files_say_what_they_are(made: exporter.Export) -> None:
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["model_hash"] == model_hash(MODEL, CATALOGUE, 0)
    assert set(manifest["files"]) == {"model.onnx", "model.pt2"} and manifest["precision"] == "fp32"
    model = onnx.load(made.onnx)
    assert [f.name for f in model.functions] == [NAME] and {f.domain for f in model.functions} == {DOMAIN}
    calls = [n for n in model.graph.node if n.domain == DOMAIN]
    assert len(calls) == MODEL.layers and all(n.op_type == NAME for n in calls)
    # The last layer attends for candidates alone, and makes keys and values of every token.
    tensors = [i for i in (*model.graph.input, *model.graph.value_info) if i.type.tensor_type.shape.dim]
    rows = {i.name: i.type.tensor_type.shape.dim[0].dim_param for i in tensors}
    L, M = rows["token_rows"], rows["candidate_rows"]
    assert L != M and [[rows[name] for name in call.input[:3]] for call in calls] == [[L] * 3, [M, L, L]]
    assert [call.input[3] for call in calls] == ["offsets", "candidate_offsets"]
    attributes = {a.name: helper.get_attribute_value(a) for a in calls[0].attribute}
    assert attributes == pytest.approx(
        {"alpha": 0.25, "scaling_seqlen": 128, "contextual_seq_len": 2, "max_attn_len": 12}
    )
    assert [i.name for i in model.graph.input] == list(INPUTS) == list(manifest["inputs"])
    assert {p.key: p.value for p in model.metadata_props} == {
        "model_hash": manifest["model_hash"], "precision": "fp32",
    }  # fmt: skip
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("lengths, candidates", [([4, 31, 0], [3, 0, 9]), ([0], [1]), ([25], [6])])
def test_the_program_and_the_onnx_file_equal_the_reference(
    made: exporter.Export, lengths: list[int], candidates: list[int]
) -> None:
    requests = make_requests(np.random.default_rng(2), CATALOGUE, lengths, candidates)
    encoding = Encoding.of(MODEL, CATALOGUE)
    expected = np.concatenate(RankingReference(MODEL, CATALOGUE, 0, "cpu").scores(requests))
    session = onnxruntime.InferenceSession(str(made.onnx), providers=["CPUExecutionProvider"])
    program = torch.export.load(made.program).module()
    padded = Bucket.even(len(requests) + 1, max(lengths) + max(candidates) + 4, max(candidates) + 1)
    for bucket in (None, padded):
        batch = pack(requests, encoding, bucket=bucket).to(CPU)
        inputs = inputs_of(batch, longest_history(requests, encoding), tile_rows=8)
        answers = [session.run(None, {n: t.numpy() for n, t in inputs.items()})[0], program(**inputs).numpy()]
        for answer in answers:
            assert relative_error(answer[: len(expected)], expected) < 1e-5


def test_the_check_passes_what_is_right_and_fails_what_is_not(made: exporter.Export, tmp_path: Path) -> None:
    result = check(made, MODEL, CATALOGUE, 0)
    assert result.passed and result.error < 1e-5 < 0.01 < result.zero_attention_error
    assert result.longest > MODEL.max_attn_len + MODEL.contextual_seq_len
    for change in ({"max_attn_len": 11}, {"contextual_seq_len": 2, "scaling_seqlen": 120}, {"alpha": 0.2}):
        with pytest.raises(IncorrectError, match="differ from the fp32 reference by"):
            check(made, HSTUConfig(**{**vars(MODEL), **change}), CATALOGUE, 0)
    with pytest.raises(IncorrectError):
        check(made, MODEL, CATALOGUE, seed=1)  # other weights
    broken = onnx.load(made.onnx)
    for node in broken.functions[0].node:
        if node.op_type == "Loop":
            body = node.attribute[0].g
            greater = next(n for n in body.node if n.op_type == "Greater")
            greater.op_type = "GreaterOrEqual"  # candidates and events now see themselves twice
    (tmp_path / "broken").mkdir()
    onnx.save(broken, tmp_path / "broken" / exporter.ONNX_FILE)
    with pytest.raises(IncorrectError):
        check(exporter.Export(tmp_path / "broken", made.manifest), MODEL, CATALOGUE, 0)


def test_int8_and_large_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "EXTERNAL_BYTES", 0)
    made = exporter.export(MODEL, CATALOGUE, 0, "int8", tmp_path / "int8")
    assert set(made.manifest["files"]) == {"model.onnx", "model.onnx.data"}
    whole = 4 * made.manifest["parameters"]
    assert 10_000 < made.manifest["files"]["model.onnx.data"]["bytes"] < 0.75 * whole
    result = check(made, MODEL, CATALOGUE, 0)
    assert 1e-4 < result.error <= result.tolerance < result.zero_attention_error
    eight_bits = (TensorProto.INT8, TensorProto.UINT8)
    tensors = [t for t in onnx.load(made.onnx).graph.initializer if t.data_type in eight_bits and len(t.dims) > 1]
    weights = [t.name for t in tensors]
    # Each layer's two projections, but four to u, v, q and k in the last; the head's hidden one.
    assert len(weights) == 2 * (MODEL.layers - 1) + 5 + 1, weights
    assert not any("table" in name or "head_out" in name for name in weights)


def test_emulated_int8_rounds_as_int8_does() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 300), torch.randn(7, 300) + 1.0
    steps = (round_weight(weight) / weight.abs().amax(1, keepdim=True) * 127).round(decimals=3)
    assert torch.equal(steps, steps.round()) and steps.abs().max() == 127
    assert len(round_input(x).unique()) <= 256 and (round_input(x) - x).abs().max() <= (x.max() - x.min()) / 255
    assert torch.equal(round_input(torch.zeros(3)), torch.zeros(3)) and not round_input(torch.zeros(0)).numel()


def test_a_change_of_any_code_that_is_exported_makes_another_export() -> None:
    module = ExportedRanker(build_model(MODEL, CATALOGUE, 0, "cpu", torch.float32))
    encoding, requests = module.ranker.encoding, make_requests(np.random.default_rng(0), CATALOGUE, [5, 0], [3, 1])
    inputs = inputs_of(pack(requests, encoding).to(CPU), longest_history(requests, encoding), 2)
    ran: set[Path] = set()
    sys.setprofile(lambda frame, event, argument: ran.add(Path(frame.f_code.co_filename)))
    try:
        module(**inputs)
    finally:
        sys.setprofile(None)
    ours = {file for file in ran if {"grengines", "grkernels"} & set(file.parts)}
    assert {"model.py", "head.py", "torch.py", "module.py"} <= {file.name for file in ours}
    assert ours <= set(sources())


def test_the_cache_folder_keeps_models_apart_and_repairs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(exporter, "write_onnx", lambda program, model, path, *_: calls.append(path.write_text("x")))
    small = HSTUConfig(layers=1, embedding_dim=8, heads=1, qk_dim=2, v_dim=2, max_positions=4, head_dim=2)

    def cached(model: HSTUConfig = small, catalogue: Catalogue = CATALOGUE, seed: int = 0, **options: Any) -> Path:
        return exporter.cached(model, catalogue, seed, "fp32", **options).folder

    first = cached()
    assert cached() == first and len(calls) == 1
    others = [
        cached(seed=1),
        cached(HSTUConfig(**{**vars(small), "alpha": 0.5})),
        cached(catalogue=Catalogue(9, 61, 3)),
        cached(skip_hidden=True),
    ]
    assert len({first, *others}) == 5 and len(calls) == 5
    assert cached(HSTUConfig(**{**vars(small), "name": "other"})) == first  # its name changes nothing
    (first / exporter.ONNX_FILE).write_text("y")
    with pytest.raises(ValueError, match="not as it was written"):
        exporter.load(first)
    assert cached() == first and len(calls) == 6 and exporter.load(first).onnx.read_text() == "x"
    (first / exporter.MANIFEST_FILE).write_text("{")
    with pytest.raises(ValueError, match="not a manifest"):
        exporter.load(first)
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        exporter.load(tmp_path / "nothing")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds no export"):
        exporter.export(small, CATALOGUE, 0, "fp32", tmp_path / "mine")


def test_of_two_processes_that_export_one_model_the_second_takes_the_firsts(
    exporter_for_forks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path / "cache"))
    code = f"""
from grengines.api import Catalogue
from grengines.export import exporter
from grengines.models.hstu.config import HSTUConfig
meet_after(exporter, "write_onnx")
found = exporter.cached({dataclasses.replace(MODEL, layers=1)!r}, {CATALOGUE!r}, 0, "fp32")
exporter.load(found.folder)
print(published, found.onnx, found.onnx.stat().st_ino)
"""
    first, second = sorted(race(code, tmp_path))
    assert first.startswith("[('exports', False)]") and second.startswith("[('exports', True)]")
    assert first.split()[2:] == second.split()[2:]  # both processes use the same file
    assert len(list((tmp_path / "cache" / "exports").iterdir())) == 1


def test_the_command_exports_and_checks(grbench_here: Grbench, tmp_path: Path) -> None:
    own = tmp_path / "own" / "model" / "small.yaml"
    own.parent.mkdir(parents=True)
    sizes = "layers: 1\nembedding_dim: 16\nheads: 1\nqk_dim: 8\nv_dim: 8\n"
    own.write_text(f"defaults: [/schema/model/hstu@_here_, _self_]\n{sizes}")
    options = ["--config-dir", "own", "model=small", "--items", "50", "model.max_attn_len=7", "--actions", "2"]
    done = grbench_here("export", "--out", "out", *options)
    assert done.returncode == 0, done.stderr
    assert "checked: onnxruntime" in done.stdout and "model.pt2" in done.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["check"]["passed"] and manifest["model"]["max_attn_len"] == 7 and manifest["model"]["layers"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("model.layer=2", "model.layer: no such key; nearest: model.layers; known keys: "),
        ("model.layers=two", "model.layers=two: allowed is int >= 1"),
        ("model.layers=0", "model.layers=0: allowed is int >= 1"),
        ("model.layers", "model.layers: not an override, which is key=value"),
        ("model=nothing", "model=nothing: no such option; allowed: decoder_0p2b, "),
        ("model=decoder_tiny", "model=decoder_tiny: engine hstu runs hstu models only"),
        ("--items 0", "--items 0: allowed is >= 1"),
        ("--items", "argument --items: expected one argument; `python -m grbench export --help` lists the flags"),
        ("--config-dir nowhere", "--config-dir nowhere: no such folder"),
        ("model.weights=nothing.safetensors", "model.weights=nothing.safetensors: no such file"),
    ],
)
def test_the_commands_errors_are_one_line(grbench_here: Grbench, arguments: str, message: str) -> None:
    done = grbench_here("export", "--out", "out", "--items", "5", "--actions", "1", *arguments.split())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"grbench export: {message}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("model", [MODEL, HSTUConfig(), HSTUConfig(layers=3, max_positions=2048, alpha=0.5)])
def test_the_command_that_errors_name_gives_the_same_model(model: HSTUConfig) -> None:
    words = shlex.split(command(model, CATALOGUE, 5, "fp32", Path("out")))
    assert words[:4] == ["python", "-m", "grbench", "export"]
    spec, catalogue = compose_ranking(parser().parse_intermixed_args(words[4:]))
    assert spec.seed == 5
    assert model_hash(spec.model, catalogue, 0) == model_hash(model, CATALOGUE, 0)


def test_a_weights_file_names_the_model_and_the_catalogue(tmp_path: Path) -> None:
    ranker = build_model(MODEL, CATALOGUE, 0, "cpu", torch.float32)
    save_weights(ranker, tmp_path / "weights.safetensors")

    def composed(*words: str) -> tuple[HSTUConfig, Catalogue]:
        weights = f"model.weights={tmp_path / 'weights.safetensors'}"
        spec, catalogue = compose_ranking(parser().parse_intermixed_args(["--out", "out", weights, *words]))
        return spec.model, catalogue

    model, catalogue = composed("--users", str(CATALOGUE.num_users))
    assert catalogue == CATALOGUE
    stated = {key: value for key, value in vars(MODEL).items() if value is not None and key != "name"}
    assert {key: getattr(model, key) for key in stated} == stated
    assert model.choices == MODEL.choices  # the file states the variant's own options as well
    assert composed("model.max_attn_len=3")[0].max_attn_len == 3
    assert composed("model=hstu_tiny")[0].embedding_dim == 64
    assert composed("--items", "7", "--actions", "1")[1] == Catalogue(num_users=1, num_items=7, num_actions=1)
