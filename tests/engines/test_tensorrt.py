"""TensorRT: plans built by its compiler for RTX, refusals, and the plugin's kernel. No test runs a plan."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import kept
from helpers.plans import CATALOGUE, ENCODING, MODEL, REQUESTS, SMALL, facts_of, feeds, made
from helpers.race import race

from grbench.cli import main
from grengines import registry
from grengines.api import UnavailableError
from grengines.export import exporter
from grengines.models.hstu.quantised import round_fp8
from grengines.models.hstu.reference import RankingReference
from grengines.numerics import relative_error
from grengines.runtime.batch import Encoding, pack
from grengines.runtime.profile import Sizes, profiles
from grengines.tensorrt import library as libraries
from grengines.tensorrt import plan as plans
from grengines.tensorrt import sample as samples
from grengines.tensorrt.config import PRECISIONS, TensorRTConfig
from grengines.tensorrt.quantise import quantise
from grkernels.config import KernelConfig

pytestmark = pytest.mark.usefixtures("parsed_once")
needs_rtx = pytest.mark.skipif(
    libraries.missing("tensorrt_rtx") is not None,
    reason="tensorrt_rtx has wheels for Linux on x86-64 only" if sys.platform != "linux" else "make setup installs it",
)


@pytest.fixture(scope="module", autouse=True)
def cache() -> Iterator[None]:
    """Share exports among these tests and with later runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRBENCH_CACHE", str(kept.cache_folder()))
        yield


SOURCES = ("kernels/**/*.py", "engines/**/*.py", "tests/helpers/plans.py", "tests/helpers/hstu_oracle.py")
SOURCES += ("tests/engines/test_tensorrt.py",)


def kept_plan(precision: str, target: str) -> Path:
    """Return a folder with a plan, and in phases.json the build's phases with their shares. A build takes seconds."""

    def fill(folder: Path) -> None:
        phases: list[tuple[str, float]] = []
        made(precision, target, folder / "plan", lambda phase, share: phases.append((phase, share)))
        (folder / "phases.json").write_text(json.dumps(phases))

    return kept.folder_of(f"plan_{precision}_{target}", fill, SOURCES)


@needs_rtx
@pytest.mark.parametrize(
    ("precision", "target"), [*((precision, "8.9") for precision in PRECISIONS), ("fp16", "12.0"), ("fp8", "12.0")]
)
def test_every_precision_is_built_for_gpus_that_are_not_here(precision: str, target: str) -> None:
    folder = kept_plan(precision, target)
    phases = json.loads((folder / "phases.json").read_text())
    library = libraries.find("tensorrt_rtx")
    facts, _ = facts_of(precision, target)
    again = plans.load(folder / "plan", facts, "fix it")
    assert again.facts == facts
    assert again.manifest["bytes"] == len(again.read()) > 100_000
    assert (again.facts.library, again.facts.version) == ("tensorrt_rtx", library.version)
    assert len(again.facts.profiles) == 2
    tensors = again.manifest["tensors"]
    assert tensors["token_rows"] == {"dtype": "INT64", "shape": [-1]}
    assert tensors["tiles"] == {"dtype": "INT64", "shape": [-1, -1]}
    assert tensors["logits"]["dtype"] == "FLOAT" and tensors["logits"]["shape"][1] == len(MODEL.tasks)
    assert len({phase for phase, _ in phases}) > 1 and {0.0, 1.0} <= {share for _, share in phases}
    assert sorted(file.name for file in folder.iterdir()) == ["phases.json", "plan"]
    assert sorted(file.name for file in (folder / "plan").iterdir()) == ["manifest.json", "model.plan"]


@needs_rtx
def test_the_network_is_in_the_precision_that_was_asked_for() -> None:
    """Plans differ in content, and 8-bit plans are smaller, so no precision is silently replaced by another."""
    wide = dataclasses.replace(MODEL, layers=1, embedding_dim=512, heads=8, qk_dim=64, v_dim=64, contextual_seq_len=0)
    encoding = Encoding.of(wide, CATALOGUE)
    library, sizes = libraries.find("tensorrt_rtx"), profiles(REQUESTS, encoding, 4)
    given = samples.feeds(REQUESTS, encoding, 1, 64)

    def fill(folder: Path) -> None:
        for precision in ("fp32", "fp16", "int8"):
            facts = plans.Facts.of(
                library, wide, CATALOGUE, 0, precision=precision, target="8.9", profiles=sizes, calibration="x"
            )
            plans.build(library, facts, wide, CATALOGUE, 0, folder / precision, given)

    folder = kept.folder_of("plans_wide", fill, SOURCES, wide, sizes)
    size = {file.parent.name: file.stat().st_size for file in folder.glob("*/model.plan")}
    parameters = 512 * 4 * 512 + 3 * 512 * 512
    assert size["fp32"] - size["fp16"] > parameters  # nearly two bytes less per weight
    assert size["fp16"] - size["int8"] > parameters / 2  # nearly one byte less


@needs_rtx
def test_what_the_compiler_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"TensorRT for RTX has no target 9\.0; it has .*8\.9"):
        made("fp16", "9.0", tmp_path / "plan")
    # Refittable weights can be prepared only on a GPU.
    with pytest.raises(
        UnavailableError, match=r"can't build fp16 with refit for compute capability 8\.9: .*CUDA_SUCCESS"
    ):
        made("fp16", "8.9", tmp_path / "plan", refit=True)
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_a_plan_that_does_not_belong_here_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    good = plans.load(kept_plan("fp16", "8.9") / "plan", facts_of("fp16", "8.9")[0], "")

    def complaint(folder: Path, wanted: plans.Facts = good.facts) -> str:
        with pytest.raises(ValueError) as e:
            plans.load(folder, wanted, "fix it")
        assert "\n" not in str(e.value) and str(e.value).endswith("; fix it")
        return str(e.value)

    assert ": no plan" in complaint(tmp_path / "none")
    for name, value, what in (
        ("model_hash", "another", "built for model_hash"),
        ("precision", "bf16", "built for precision fp16, this run has bf16"),
        ("target", "12.0", "built for target 8.9"),
        ("version", "99", "built for version"),
    ):
        assert what in complaint(good.folder, dataclasses.replace(good.facts, **{name: value}))
    broken = tmp_path / "broken"
    shutil.copytree(good.folder, broken)
    with (broken / "model.plan").open("r+b") as f:
        f.seek(5000)
        f.write(b"nonsense")
    assert "not as it was written" in complaint(broken)
    (broken / "manifest.json").write_text(json.dumps({"facts": {"model_hash": 1}}))
    assert "not the manifest of a plan" in complaint(broken)
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    with pytest.raises(ValueError, match="holds no plan"):
        made("fp16", "8.9", other)


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.03), ("fp8", 0.08)])
def test_eight_bits_cost_what_eight_bits_cost(kind: str, most: float, tmp_path: Path) -> None:
    """Compare the Q/DQ model in ONNX Runtime with the fp32 model: they differ by 8-bit rounding alone."""
    whole, half = (exporter.cached(MODEL, CATALOGUE, 0, precision).onnx for precision in ("fp32", "fp16"))
    quantise(half, tmp_path / "model.onnx", kind, feeds())
    feed = samples.feeds(REQUESTS[1:2], ENCODING, 1, 64)[0]

    def logits(path: Path) -> Any:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)[0]

    expected = logits(whole)
    error = relative_error(logits(tmp_path / "model.onnx"), expected)
    assert 5 * relative_error(logits(half), expected) < error < most
    nodes = onnx.load(str(tmp_path / "model.onnx")).graph.node
    products = 2 * (MODEL.layers - 1) + 5  # of the last layer: to u, v, q and k one by one, and the output's
    assert sum(n.op_type == "QuantizeLinear" for n in nodes) == products
    assert sum(n.op_type == "DequantizeLinear" for n in nodes) == 2 * products


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_of_zeros_have_a_scale(kind: str, tmp_path: Path) -> None:
    model = onnx.load(str(exporter.cached(MODEL, CATALOGUE, 0, "fp16").onnx))
    product = next(n for n in model.graph.node if n.op_type == "Gemm")
    weight = next(w for w in model.graph.initializer if w.name == product.input[1])
    weight.raw_data = bytes(len(weight.raw_data))
    onnx.save(model, str(tmp_path / "zeros.onnx"))
    path = quantise(tmp_path / "zeros.onnx", tmp_path / "quantised.onnx", kind, feeds())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, feeds()[0])[0]).all()


def test_the_reference_knows_what_eight_bits_cost() -> None:
    """The tolerance of int8 and fp8 is above that of half precision and near the error of Q/DQ."""
    reference = RankingReference(MODEL, CATALOGUE, 0, "cpu")
    exact = np.concatenate(reference.scores(REQUESTS))

    def cost(precision: str) -> float:
        return relative_error(np.concatenate(reference.scores(REQUESTS, precision)), exact)

    assert 2 * cost("fp16") < cost("int8") < cost("fp8") < 0.08
    x = torch.tensor([0.0, 1.0, -3.0, 448.0])
    assert round_fp8(x).tolist() == x.tolist()  # e4m3 represents these exactly
    assert round_fp8(torch.tensor([448.0, 17.0])).tolist() == [448.0, 16.0]  # a mantissa of three bits


def test_eight_bits_need_a_calibration_set(tmp_path: Path) -> None:
    half = exporter.cached(MODEL, CATALOGUE, 0, "fp16").onnx
    with pytest.raises(ValueError, match=r"int8 needs a calibration set; give requests: engine\.calibration=16"):
        quantise(half, tmp_path / "model.onnx", "int8", [])


@needs_rtx
def test_the_command_builds_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: str) -> tuple[int, str, str]:
        sizes = ("layers=1", "embedding_dim=16", "heads=1", "qk_dim=16", "v_dim=16")
        model = [*(f"model.{size}" for size in sizes), "--items", "50", "--actions", "2"]
        code = main(["build-plan", "--out", str(tmp_path / "plan"), *args, *model])
        return code, *capsys.readouterr()

    workload = ["workload=synthetic", "workload.items=50", "workload.users=20", "workload.visits=40"]
    code, out, error = run("--precision", "int8", "--target", "12.0", *workload)
    assert code == 0, error
    assert "built in" in out and (tmp_path / "plan" / "model.plan").stat().st_size > 10_000
    for args, expected, said in (
        (("--precision", "fp8", "--history", "20", "--candidates", "4"), 2, "fp8 needs a calibration set"),
        (("--history", "20"), 2, "--history and --candidates: give both, or none"),
        (("--history", "20", "--candidates", "0"), 2, "--candidates 0: allowed is >= 1"),
        (("--profiles", "0", *workload), 2, "--profiles 0: allowed is >= 1"),
        (("--calibration", "0", *workload), 2, "--calibration 0: allowed is >= 1"),
        (("--history", "20", "--candidates", "4", "--target", "9.0"), 3, "has no target 9.0"),
        (("workload=csv", "workload.path=none.csv"), 2, "none.csv: no such file"),
    ):
        code, out, error = run(*args)
        assert code == expected and said in error and error.count("\n") == 1, error
        assert not out or "9.0" not in args, "a target is refused before the export"


@needs_rtx
def test_of_two_processes_that_build_one_plan_the_second_takes_the_firsts(
    exporter_for_forks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both processes export the model and compute scales from it, without disturbing each other."""
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path / "cache"))
    code = """
from helpers import kept
from helpers.plans import CATALOGUE, SMALL, facts_of
from grengines.tensorrt import library, plan
meet_after(plan, "_compile")
facts, feeds = facts_of("int8", "8.9", SMALL)
found = plan.cached(library.find("tensorrt_rtx"), facts, SMALL, CATALOGUE, 0, feeds)
plan.load(found.folder, facts, "")
print(published[-1], found.folder, (found.folder / "model.plan").stat().st_ino, found.manifest["sha256"])
"""
    first, second = sorted(race(code, tmp_path))
    assert first.startswith("('plans', False)") and second.startswith("('plans', True)")
    assert first.split()[2:] == second.split()[2:]
    assert len(list((tmp_path / "cache" / "plans").iterdir())) == 1
    folder = Path(first.split()[2])
    (folder / "model.plan").write_bytes(b"nonsense")
    facts, calibration = facts_of("int8", "8.9", SMALL)
    with pytest.raises(ValueError, match=rf"not as it was written .*; rm -r {folder}, and it is built again"):
        plans.cached(libraries.find("tensorrt_rtx"), facts, SMALL, CATALOGUE, 0, calibration)


@needs_rtx
def test_what_execution_calls_is_in_the_library() -> None:
    """Check that the library has every name that engine.py uses, because no plan can be executed here."""
    trt = libraries.find("tensorrt_rtx").module
    for owner, names in (
        (trt.Runtime, ("deserialize_cuda_engine",)),
        (trt.ICudaEngine, ("create_execution_context", "create_runtime_config", "device_memory_size_v2")),
        (
            trt.IExecutionContext,
            (
                "set_optimization_profile_async",
                "set_input_shape",
                "set_tensor_address",
                "infer_shapes",
                "execute_async_v3",
                "set_device_memory",
                "is_stream_capturable",
            ),
        ),
        (
            trt.IRuntimeConfig,
            (
                "create_runtime_cache",
                "set_runtime_cache",
                "cuda_graph_strategy",
                "set_execution_context_allocation_strategy",
            ),
        ),
        (trt.ExecutionContextAllocationStrategy, ("USER_MANAGED",)),
        (trt.IRuntimeCache, ("serialize", "deserialize")),
        (trt.CudaGraphStrategy, ("WHOLE_GRAPH_CAPTURE",)),
        (trt.OnnxParserRefitter, ("refit_from_file",)),
        (trt.Refitter, ("refit_cuda_engine",)),
        (trt.ITimingCache, ("serialize",)),
        (trt.IBuilderConfig, ("create_timing_cache", "set_timing_cache")),
    ):
        for name in names:
            assert hasattr(owner, name), f"{owner.__name__}.{name}"
    takes = trt.ICudaEngine.create_execution_context.__doc__
    assert takes is not None and "runtime_config" in takes
    assert "ignore_mismatch: bool" in trt.IBuilderConfig.set_timing_cache.__doc__
    assert "profile_index" in trt.IExecutionContext.set_optimization_profile_async.__doc__
    assert "memory: typing.SupportsInt, size" in trt.IExecutionContext.set_device_memory.__doc__


def test_shapes_of_profiles_hold_what_they_are_for() -> None:
    sizes = profiles(REQUESTS, ENCODING, 4, 2)
    facts = plans.Facts("m", "bf16", "tensorrt", "10.13", "9.0", sizes, 24, "", False, False)
    small, large = (facts.shapes(s) for s in sizes)
    assert large["token_rows"] == ((1,), (256,), (256,)) and large["offsets"] == ((2,), (5,), (5,))
    assert large["tiles"] == ((1, 1), (3, 24), (3, 24)) and large["columns"][2] == (48,)
    assert large["candidate_tiles"] == ((1, 1), (3, 24), (3, 24)) and large["candidate_offsets"] == large["offsets"]
    assert small["token_rows"][2] < large["token_rows"][2]


def test_a_batch_is_laid_out_aligned() -> None:
    from grengines.tensorrt.execution import ALIGNMENT, Staged, words_of

    most = Sizes(4, 256, 64, 48, 64)
    staged = Staged(words_of(most), pin=False)
    host = pack(REQUESTS[:3], ENCODING)
    for _ in range(2):  # the second time, buffers hold the first batch's data
        staged.fill(host, 46, 24)
    whole = samples.feeds(REQUESTS[:3], ENCODING, 3, 24)
    assert whole  # below, inputs are compared with the exporter's

    from grengines.export.module import inputs_of

    expected = inputs_of(host.to(torch.device("cpu")), 46, 24)
    raw = staged.buffer.numpy().tobytes()
    for name, (offset, shape) in staged.places.items():
        tensor = expected[name].numpy()
        assert offset % ALIGNMENT == 0 and shape == tensor.shape
        assert raw[offset : offset + tensor.nbytes] == tensor.tobytes(), name
    assert staged.rulers == {name: tuple(expected[name].shape) for name in ("tiles", "candidate_tiles", "columns")}


def test_where_nothing_can_be_executed_the_cell_is_unavailable_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from grengines.tensorrt import engine as module

    def build(**options: Any) -> Any:
        return registry.build(TensorRTConfig(**options), MODEL, KernelConfig(), CATALOGUE, 0)

    monkeypatch.setattr(libraries, "installed", lambda name: None)
    monkeypatch.setattr(libraries.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(
        UnavailableError, match=r"lacks, and no package helps; .*tensorrt-rtx-cu13.*build-plan --library t"
    ):
        build()
    monkeypatch.setattr(libraries.ctypes.util, "find_library", lambda name: "libcuda.so.1")
    with pytest.raises(
        UnavailableError, match=r"tensorrt or tensorrt_rtx is not installed; pip install 'grbench\[tensorrt\]'"
    ):
        build()
    monkeypatch.undo()
    if libraries.missing("tensorrt_rtx") is None:
        if libraries.no_gpu() is not None:
            with pytest.raises(UnavailableError, match="this machine lacks, and no package helps; to build a plan"):
                build()
        rtx = libraries.find("tensorrt_rtx")
        assert rtx.refusal("8.9") is None
        refusal = r"TensorRT for RTX does not support compute capability 9\.0 \(supported: 8\.0, .*12\.1\)"
        monkeypatch.setattr(libraries, "no_gpu", lambda: None)
        monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(module.torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda device: (9, 0))
        with pytest.raises(UnavailableError, match=refusal + "; use engine=aoti here"):
            build(library="tensorrt_rtx")
    with pytest.raises(UnavailableError, match="tensorrt is not installed"):
        libraries.find("tensorrt") if libraries.missing("tensorrt") else pytest.skip("TensorRT is here")


PLUGIN = """
from helpers import kept
from helpers.plans import MODEL
from grengines.runtime.profile import Sizes
from grengines.tensorrt import plugin
for target, dtype in (("9.0", "fp32"), ("9.0", "bf16"), ("12.0", "fp16")):
    made = plugin.compile_kernel(MODEL, dtype, target, Sizes(4, 256, 64, 48, 64))
    entry = made.ptx[made.ptx.index(".entry " + made.name):].split(")")[0]
    kinds = [p.split()[1] for p in entry.split("(")[1].split(",")]
    print(target, dtype, *kinds, made.threads % 32, made.shared > 0)
"""


def test_the_plugins_kernel_compiles_with_the_parameters_that_tensorrt_passes() -> None:
    """The parameters are the inputs, one integer and the output, and none that only Triton's launcher would pass."""
    lines = (kept.output_of("plugin", PLUGIN, SOURCES, TRITON_INTERPRET="0") / kept.OUTPUT).read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.split()[2:12] == [".u64"] * 8 + [".u32", ".u64"] and line.endswith("0 True")


def test_the_plugins_node_stands_in_for_the_function(tmp_path: Path) -> None:
    from grengines.tensorrt.plugin import substitute

    model = onnx.load(str(substitute(exporter.cached(MODEL, CATALOGUE, 0, "fp16").onnx, tmp_path / "model.onnx")))
    nodes = [n for n in model.graph.node if n.op_type == "hstu_attention"]
    assert len(nodes) == MODEL.layers and not model.functions
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes, node.domain) == ({"plugin_namespace": b"grbench", "aot": 1}, "")
