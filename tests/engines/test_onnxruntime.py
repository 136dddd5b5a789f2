"""The ONNX Runtime engine: answers, refusals, bad files, fallback chains; and what a precision costs in AUC."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import kept
from helpers.command import Grbench
from helpers.hstu_oracle import make_requests
from onnx import TensorProto, helper
from sklearn.metrics import log_loss, roc_auc_score

from grbench import workloads
from grbench.execution.records import Status
from grbench.execution.worker import classify
from grbench.gate import quality
from grbench.quality.labels import Labels, labels_of
from grbench.quality.rankings import Rankings
from grbench.workloads.config import SyntheticConfig
from grengines import registry
from grengines.api import CachingEngine, Catalogue, Request, Setup, Tier, UnavailableError
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.export import exporter
from grengines.export.identity import model_hash
from grengines.fallback import FallbackEngine, OutsideError, options_like
from grengines.hstu.config import HSTUEngineConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import build_model
from grengines.models.hstu.reference import RankingReference, zero_attention
from grengines.models.hstu.weights import save_weights
from grengines.numerics import SUMMATION_FLOOR, IncorrectError, relative_error
from grengines.onnxruntime.config import OnnxRuntimeConfig
from grengines.onnxruntime.engine import OnnxRuntimeEngine
from grkernels.config import KernelConfig

CATALOGUE = Catalogue(num_users=20, num_items=300, num_actions=2)
MODEL = HSTUConfig(
    layers=2, embedding_dim=32, heads=2, qk_dim=16, v_dim=8, scaling_seqlen=128, contextual_seq_len=2,
    max_attn_len=20, interaction=True, head_dim=16,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("parsed_once")
SAMPLE = make_requests(np.random.default_rng(0), CATALOGUE, [3, 37, 0, 200, 20], [6, 1, 9, 8, 0])


@pytest.fixture(scope="module", autouse=True)
def cache_folder() -> Iterator[Path]:
    """Share a cache folder among these tests and with later runs, so that each precision is exported once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = kept.cache_folder()
        patch.setenv("GRBENCH_CACHE", str(folder))
        yield folder


def engine(cache: Any = None, kernel: str = "torch", seed: int = 5, **options: Any) -> Any:
    config = OnnxRuntimeConfig(**{"device": "cpu", "cpu_threads": 1, **options})
    setup = Setup(MODEL, {"hstu_attention": kernel}, CATALOGUE, seed, cache or CacheConfig())
    return registry.make(config, setup, "rank")


def prepared(**options: Any) -> OnnxRuntimeEngine:
    made = engine(**options)
    made.prepare(SAMPLE, max_batch=5)
    return made


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_answers_equal_the_reference(precision: str) -> None:
    reference = RankingReference(MODEL, CATALOGUE, 5, "cpu")
    expected = np.concatenate(reference.scores(SAMPLE))
    eager = np.concatenate(reference.scores(SAMPLE, precision))
    tolerance = max(2 * relative_error(eager, expected), SUMMATION_FLOOR)
    blind = np.concatenate(reference.scores(SAMPLE, attention=zero_attention))
    assert relative_error(blind, expected) > 2 * tolerance
    made = prepared(precision=precision)
    for batches in ([SAMPLE], [[r] for r in SAMPLE], [SAMPLE[:2], SAMPLE[2:]]):
        results = [made.rank(batch) for batch in batches]
        scores = [s for result in results for s in result.scores]
        assert [s.shape for s in scores] == [(len(r.candidates), len(MODEL.tasks)) for r in SAMPLE]
        assert relative_error(np.concatenate(scores), expected) <= tolerance
    actual = made.actual()
    assert (actual["device"], actual["precision"]) == ("cpu", precision) and actual["onnx_bytes"] > 10_000
    json.dumps(actual)
    made.close()
    made.close()
    with pytest.raises(RuntimeError, match="not prepared, or closed"):
        made.rank(SAMPLE[:1])


def test_tiles_of_any_size_give_the_same_answer() -> None:
    one, many = prepared(precision="fp32", tile_rows=1000), prepared(precision="fp32", tile_rows=7)
    found = [np.concatenate(e.rank(SAMPLE).scores) for e in (one, many)]
    assert relative_error(*found) < SUMMATION_FLOOR and one.actual()["tile_rows"] == 1000


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"precision": "bf16"}, ValueError, "engine.precision=bf16 and engine.device=cpu: .*use fp32 or fp16"),
        ({"device": "cuda"}, UnavailableError, "engine.device=cuda: .*; use engine.device=cpu"),
        ({"cache": PagedCacheConfig()}, ValueError, "engine=onnxruntime computes whole histories; set cache=none"),
        ({"cache": CacheConfig(item_memory_gb=1.0)}, ValueError, "set cache.item_memory_gb=0"),
        ({"kernel": "triton"}, ValueError, "kernel=triton: engine=onnxruntime runs its own kernels; set kernel=auto"),
    ],
)
def test_what_it_can_not_do_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        engine(**options)
    assert "\n" not in str(caught.value)


def test_batches_and_samples_out_of_range_are_refused() -> None:
    made = prepared(precision="fp32")
    for batch in ([], [SAMPLE[0]] * 6):
        with pytest.raises(ValueError, match=r"requests in one batch; allowed is 1 to max_batch=5"):
            made.rank(batch)
    with pytest.raises(ValueError, match="both must be at least 1"):
        engine().prepare([], 1)


def test_bad_files_are_one_line_with_the_command_that_fixes_them(tmp_path: Path) -> None:
    good = exporter.cached(MODEL, CATALOGUE, 5, "fp32", skip_hidden=True)
    files = {
        name: tmp_path / f"{name}.onnx" for name in ("missing", "corrupt", "truncated", "foreign", "other", "half")
    }
    files["corrupt"].write_bytes(b"not an ONNX file at all")
    files["truncated"].write_bytes(good.onnx.read_bytes()[:5000])
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "foreign", [value], [out])
    foreign = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    foreign.ir_version = 10
    onnx.save(foreign, files["foreign"])
    model = onnx.load(good.onnx)
    for name, key, changed in (("other", "model_hash", "0123456789abcdef"), ("half", "precision", "fp16")):
        for entry in model.metadata_props:
            entry.value = (
                changed if entry.key == key else {"model_hash": model_hash(MODEL, CATALOGUE, 5)}.get(entry.key, "fp32")
            )
        onnx.save(model, files[name])
    messages = {
        "missing": "no such file",
        "corrupt": r"ONNX Runtime can't load it \(",
        "truncated": r"ONNX Runtime can't load it \(",
        "foreign": "not an export of a ranking model",
        "other": "exported with model_hash 0123456789abcdef, the run's is",
        "half": "exported with precision fp16, the run's is fp32",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message) as caught:
            prepared(precision="fp32", onnx=str(files[name]))
        text = str(caught.value)
        assert "\n" not in text and text.startswith(str(files[name]))
        assert f"python -m grbench export --out {tmp_path} --items 300 --users 20 --actions 2 seed=5" in text
    assert prepared(precision="fp32", onnx=str(good.onnx)).rank(SAMPLE).scores


class Narrow:
    """Engine that refuses histories of more than 30 events."""

    def __init__(self) -> None:
        self._engine = engine(precision="fp32")
        self.prepare, self.actual = self._engine.prepare, self._engine.actual
        self.reset_cache = self._engine.reset_cache
        self.closed = False

    def rank(self, requests: Sequence[Request]) -> Any:
        if longest := max((len(r.history_items) for r in requests if len(r.history_items) > 30), default=0):
            raise OutsideError(f"a history of {longest} events: built for 30; build it again")
        return self._engine.rank(requests)

    def close(self) -> None:
        self.closed = True


def test_a_chain_answers_what_the_first_was_not_built_for_and_says_so() -> None:
    narrow = Narrow()
    setup = Setup(MODEL, _native_kernels(), CATALOGUE, 5, CacheConfig())
    native = registry.make(HSTUEngineConfig(device="cpu"), setup, "rank")
    chain = FallbackEngine(narrow, ["hstu"], lambda name: native)  # type: ignore[arg-type,return-value]
    chain.prepare([r for r in SAMPLE if len(r.history_items) <= 30], 5)
    inside, outside = chain.rank(SAMPLE[:1]), chain.rank(SAMPLE[:2])
    assert (inside.details["fallback_requests"], outside.details["fallback_requests"]) == (0, 2)
    expected = RankingReference(MODEL, CATALOGUE, 5, "cpu").scores(SAMPLE[:2])
    assert relative_error(np.concatenate(outside.scores), np.concatenate(expected)) < SUMMATION_FLOOR
    actual = chain.actual()
    assert actual["engine"] == "onnxruntime" and actual["fallback"]["hstu"]["engine"] == "hstu"
    assert actual["fallback"]["hstu"]["answered"] == 2
    alone = FallbackEngine(narrow, [], lambda name: native)  # type: ignore[arg-type,return-value]
    with pytest.raises(OutsideError, match="a history of 37 events"):
        alone.rank(SAMPLE[:2])
    chain.close()
    assert narrow.closed


def test_a_chain_reports_the_caches_of_its_engines_and_closes_all_of_them() -> None:
    cache = PagedCacheConfig(memory_gb=0.001, page=16)
    setup = Setup(MODEL, _native_kernels(), CATALOGUE, 5, cache)
    narrow, native = Narrow(), registry.make(HSTUEngineConfig(device="cpu"), setup, "rank")
    chain = FallbackEngine(narrow, ["hstu"], lambda name: native)  # type: ignore[arg-type,return-value]
    chain.prepare([r for r in SAMPLE if len(r.history_items) <= 40], 5)
    assert isinstance(chain, CachingEngine) and isinstance(native, CachingEngine)
    user = SAMPLE[1].user_id
    assert chain.tier_of(user) is Tier.NONE and chain.state_bytes() == {Tier.DEVICE: 0}
    chain.rank(SAMPLE[1:2])
    assert chain.tier_of(user) is Tier.DEVICE
    assert chain.state_bytes() == native.state_bytes() != {Tier.DEVICE: 0}

    def fail() -> None:
        raise RuntimeError("the first engine fails")

    narrow.close = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the first engine fails"):
        chain.close()
    assert native.state_bytes() == {}  # it is closed


def _native_kernels() -> dict[str, str]:
    return KernelConfig("torch").requested()


def test_the_registry_builds_the_chain_that_the_config_names() -> None:
    @dataclasses.dataclass
    class Config(OnnxRuntimeConfig):
        fallback: list[str] = dataclasses.field(default_factory=list)

    def make(**options: Any) -> Any:
        config = Config(device="cpu", precision="int8", **options)
        return registry.make(config, Setup(MODEL, _native_kernels(), CATALOGUE, 5, CacheConfig()), "rank")

    assert isinstance(make(), OnnxRuntimeEngine)
    chain = make(fallback=["hstu"])
    chain.prepare(SAMPLE, 5)
    assert isinstance(chain, FallbackEngine) and chain.actual()["fallback"]["hstu"]["precision"] == "fp32"
    for name in ("onnxruntime", "vllm", "nothing"):
        with pytest.raises(ValueError, match=f"engine.fallback={name}: allowed are hstu"):
            make(fallback=[name])
    like = options_like(HSTUEngineConfig, OnnxRuntimeConfig(device="cpu", precision="fp16"))
    assert (like.device, like.precision) == ("cpu", "fp16")


def test_without_the_exporters_packages_a_file_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    good = exporter.cached(MODEL, CATALOGUE, 5, "fp32", skip_hidden=True)
    monkeypatch.delattr("grengines.export.exporter")
    for name in ("grengines.export.exporter", "grengines.export.onnx_attention"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert prepared(precision="fp32", onnx=str(good.onnx)).rank(SAMPLE).scores
    with pytest.raises(UnavailableError, match=r"onnxscript is not installed; pip install .*engine\.onnx=FILE"):
        prepared(precision="fp32")


TRACE = workloads.build(SyntheticConfig("synthetic", users=30, items=200, visits=60, max_history=40), 0, 80.0)


def test_memory_that_onnx_runtime_lacks_is_no_error_of_its_own() -> None:
    """Its exceptions are of no type that says it; with an output of 2**47 bytes no machine has the memory."""
    import onnxruntime

    kinds = {"x": TensorProto.FLOAT, "n": TensorProto.INT64}
    given = [helper.make_tensor_value_info(name, kind, [1]) for name, kind in kinds.items()]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Expand", ["x", "n"], ["y"])], "huge", given, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="Failed to allocate memory") as caught:
        session.run(None, {"x": np.ones(1, np.float32), "n": np.array([2**45])})
    status, reason = classify(caught.value)
    assert status is Status.OOM and reason.startswith("memory ran out: [ONNXRuntimeError]")
    assert classify(RuntimeError("a Gemm failed"))[0] is Status.ERROR


def test_labels_are_what_the_user_did_in_the_visit() -> None:
    assert labels_of(TRACE, 0, ["no such action"]) is None
    names = list(TRACE.events.action_names)
    seen = 0
    for i in range(len(TRACE.requests)):
        labels, (start, stop) = labels_of(TRACE, i, names), TRACE.own[i]
        assert labels is not None
        for c, item in enumerate(TRACE.requests[i].candidates):
            for t in range(len(names)):
                done = any(
                    TRACE.events.items[e] == item and TRACE.events.actions[e] >> t & 1 for e in range(start, stop)
                )
                assert labels[c, t] == done
                seen += done
        assert (TRACE.events.users[start:stop] == TRACE.requests[i].user_id).all()
    assert seen > 10


def test_quality_figures_and_their_limit() -> None:
    def asked(labels: list[Labels]) -> Rankings:
        return Rankings(TRACE, ["a", "b"], range(60), labels, seed=0)

    rng = np.random.default_rng(0)
    labels = [rng.random((40, 2)) < 0.3 for _ in range(60)]
    expected = [(rng.standard_normal((40, 2)) + one).astype(np.float32) for one in labels]
    same = quality.compare(expected, expected, asked(labels), "fp16")
    assert same.top_k_overlap == 1.0 and same.worst_loss == 0.0
    same.check([])
    truth, logits = np.concatenate(labels)[:, 1], np.concatenate(expected)[:, 1]
    assert same.tasks["b"].auc == pytest.approx(roc_auc_score(truth, logits))
    base = log_loss(truth, np.full(len(truth), truth.mean()))
    assert same.tasks["b"].ne == pytest.approx(log_loss(truth, 1 / (1 + np.exp(-logits.astype(float)))) / base)
    worse = [e + 0.3 * rng.standard_normal(e.shape).astype(np.float32) for e in expected]
    found = quality.compare(worse, expected, asked(labels), "int8")
    assert found.worst_loss > quality.MAX_LOSS and 0.5 < found.top_k_overlap < 1
    assert same.sure and not found.sure
    low, high = found.tasks["a"].auc_loss_interval
    assert low < found.tasks["a"].auc_loss < high
    with pytest.raises(IncorrectError, match=r"int8 loses .* on task [ab], allowed is 0\.1%; .*allow_loss=\[int8\]"):
        found.check(["fp16"])
    found.check(["int8"])
    only = quality.compare(expected, expected, asked([np.ones((40, 2), bool)] * 60), "fp32")
    assert (only.tasks["a"].auc, only.tasks["a"].ne) == (0.5, 1.0)


def test_a_whole_run_with_labels(grbench_forked: Grbench, tmp_path: Path, cache_folder: Path) -> None:
    actions = list(TRACE.events.action_names)[:2]
    model = HSTUConfig(layers=1, embedding_dim=16, heads=1, qk_dim=8, v_dim=8, tasks=actions, max_positions=64)
    save_weights(build_model(model, TRACE.catalogue, 3, "cpu", torch.float32), tmp_path / "weights.safetensors")
    done = grbench_forked(
        "engine=onnxruntime", "engine.precision=int8", "engine.cpu_threads=1", "workload=synthetic",
        "workload.users=30", "workload.items=200", "workload.visits=60", "workload.max_history=40",
        "scenario=closed_loop", "scenario.queries=40", "tracking=none", "model.layers=1", "model.embedding_dim=16",
        "model.heads=1", "model.qk_dim=8", "model.v_dim=8", "model.max_positions=64",
        f"model.tasks=[{','.join(actions)}]", "model.weights=weights.safetensors", "gate.allow_loss=[int8]",
        GRBENCH_CACHE=str(cache_folder),
    )  # fmt: skip
    record = json.loads(next((tmp_path / "outputs").rglob("record.json")).read_text())
    assert done.returncode == 0 and record["status"] == "OK", record["error"]
    assert record["actual"]["precision"] == "int8" and record["actual"]["providers"] == ["CPUExecutionProvider"]
    found = record["gate"]["quality"]
    assert found["precision"] == "int8" and found["requests"] == 60 and set(found["tasks"]) == set(actions)
    assert 0.5 < found["top_k_overlap"] <= 1.0
    for task in actions:
        assert record["metrics"][f"quality/{task}/auc"] == pytest.approx(found["tasks"][task]["auc"])
        low, high = record["intervals"][f"quality/{task}/auc"]
        assert low <= found["tasks"][task]["auc"] <= high
        assert {f"quality/{name}/{task}/auc" for name in ("popularity", "item_mean", "not_yet")} <= set(
            record["metrics"]
        )
