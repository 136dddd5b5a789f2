"""The kernel benchmark end to end on a CPU, and that its gate stops what is wrong before it is timed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.command import Grbench
from helpers.forks import Fork
from helpers.fp8_attention import attended
from helpers.mlflow_store import new_database
from torch import Tensor

from grbench.cli import main
from grbench.execution.records import Status
from grbench.execution.results import load as load_results
from grbench.gate.kernel import KernelGate, TimedOutputs
from grbench.kernelbench import bench as kernelbench
from grbench.kernelbench import products, projected, stack
from grbench.kernelbench.bench import ALL_SHAPES, Bench, Row, status_of
from grbench.kernelbench.config import KernelBenchConfig, select
from grbench.kernelbench.timing import Ceilings, interleaved
from grbench.report.cells import figure
from grbench.report.results import results_sections
from grbench.report.row_charts import roofline
from grengines.numerics import IncorrectError
from grkernels import fp8, registry, tuning
from grkernels.hstu_attention import bench, peers, spec
from grkernels.hstu_attention.fp8_projection import blocks_of, project
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.hstu_attention.torch import hstu_attention as eager
from grkernels.quantise import bench as quantise_bench
from grkernels.variant import KernelVariant, Projected

SMALL = "4x128_b1_1024+256"  # the smallest shape of hstu_attention
FAST = ["device=cpu", "repeats=3", "min_time_s=0.01"]
TINY = bench.Shape(batch=2, new=24, targets=4, heads=2, qk_dim=16, v_dim=16)
CAUSAL_TINY = bench.Shape(batch=2, new=24, heads=2, qk_dim=16, v_dim=16)
ROOFS = Ceilings(1.0, 1.0, 1024, 1024, "fp32")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Row]]:
    """Run a job in this process on a tiny shape with these variants in hstu_attention's place, beside `torch`."""

    def run(
        shape: bench.Shape = TINY,
        peers: bool = False,
        dtype: str = "fp32",
        tune: bool = False,
        launches: Sequence[str] = (),
        **fns: Any,
    ) -> dict[str, Row]:
        real = registry.get("hstu_attention", "torch")

        def get(family: str, name: str) -> KernelVariant:
            fn = fns.get(name, real)
            if isinstance(fn, Exception):
                raise fn
            return fn if isinstance(fn, KernelVariant) else KernelVariant(family, name, fn, reference, real.supports)

        monkeypatch.setattr(registry, "variants", lambda family: tuple(dict.fromkeys(("torch", *fns))))
        monkeypatch.setattr(registry, "availability", lambda family, name: None)
        monkeypatch.setattr(registry, "get", get)
        monkeypatch.setattr(bench, "SHAPES", {"tiny": shape})
        monkeypatch.setattr(kernelbench, "ceilings", lambda *_: ROOFS)
        config = KernelBenchConfig(
            ["hstu_attention"], dtype=dtype, device="cpu", repeats=3, min_time_s=0.001, peers=peers, tune=tune
        )
        config.launches = list(launches)
        return {row.variant: row for rows in Bench(config, "cpu", lambda _: None).run() for row in rows}

    return run


def test_a_run_leaves_results_plot_and_mlflow_runs(grbench_here: Grbench, tmp_path: Path) -> None:
    chosen = ["families=[hstu_attention]", "variants=[torch]", f"shapes=[{SMALL}]", "dtype=fp32"]
    uri = new_database(tmp_path / "outputs")
    done = grbench_here("kernels", *chosen, *FAST)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"{re.escape(SMALL)} +torch +OK", done.stdout)
    assert done.stdout.count("generative-recommenders") <= 2  # once a peer, not once a shape
    [path] = tmp_path.glob("outputs/kernels/*/results.json")
    results = json.loads(path.read_text())
    assert results["environment"]["cpu"]
    roofs = results["ceilings"]
    rows = {row["variant"]: row for row in results["rows"]}
    row = rows["torch"]
    assert row["flops"] == spec.flops(spec.visible_pairs(1280, 256), 4, 128, 128)
    p50 = row["metrics"]["latency_ms/p50"]
    assert len(row["times_ms"]) >= 3
    assert p50 in row["times_ms"]
    assert row["metrics"]["tflops"] == pytest.approx(row["flops"] / p50 / 1e9)
    assert row["metrics"]["matmul_share"] == pytest.approx(row["metrics"]["tflops"] / roofs["tflops"])
    floor_s = max(row["flops"] / roofs["tflops"] / 1e12, row["bytes"] / roofs["tbps"] / 1e12)
    assert row["metrics"]["roofline_share"] == pytest.approx(1e3 * floor_s / p50)
    assert row["metrics"]["error"] <= row["metrics"]["error_allowed"]
    assert rows["meta_triton"]["status"] == "UNAVAILABLE"
    assert rows["meta_triton"]["shape"] == ALL_SHAPES
    assert (path.parent / "roofline_hstu_attention.png").read_bytes().startswith(b"\x89PNG")
    page = "\n\n".join(results_sections([("job", load_results(path))]))
    assert f"| {SMALL} | fp32 | torch | {figure(p50)} |" in page
    assert f"UNAVAILABLE: {rows['meta_triton']['reason']}" in " ".join(page.split())  # a long reason has several lines

    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("grbench-kernels")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [r for r in runs if r.data.tags["role"] == "sweep"]
    children = {
        r.data.params["variant"]: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert children.keys() == {"torch"}  # what can't run here is in results.json only
    child = children["torch"]
    assert child.info.run_name == f"hstu_attention-torch-{SMALL}-fp32"
    assert child.data.params["shape"] == SMALL
    assert child.data.tags["status"] == "OK"
    assert child.data.metrics["latency_ms/p50"] == pytest.approx(p50, rel=1e-5)
    assert {
        "tflops",
        "tbps",
        "roofline_share",
        "error",
        "error_allowed",
        "error_timed",
        "error_rounding",
    } <= child.data.metrics.keys()
    assert parent.info.status == "FINISHED"
    attached = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert attached == {"results.json", "roofline_hstu_attention.png"}


@pytest.mark.parametrize(
    "override, expected",
    [
        ("families=[nope]", "known: hstu_attention"),
        ("variants=[nope]", "known: torch"),
        ("shapes=['nope*']", f"{SMALL}"),
        ("dtype=fp8", "bf16"),
        ("+nonsense=1", "repeats"),
        ("launches=['m=big']", "n=64 stages=3"),
        ("launches=['m=64']", "norm_product has no launch configuration"),
    ],
)
def test_unknown_names_are_one_line(
    override: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["grbench"])
    assert main(["kernels", "-m", "dtype=fp32", "seed=0,1", override]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert override.split("=")[0].lstrip("+") in line
    assert expected in line
    assert not list(tmp_path.iterdir())  # a wrong job stops the command before the first one runs


def test_what_is_wrong_is_not_timed(tiny: Callable[..., dict[str, Row]]) -> None:
    calls = 0
    kept: list[Tensor] = []

    def zeros(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return eager(q, k, v, **options).zero_()

    def stale(*args: Any, **options: Any) -> Tensor:
        kept.append(eager(*args, **options))
        return kept[0]

    def unwritten(*args: Any, **options: Any) -> Tensor:
        out = eager(*args, **options)
        out[3, 1, 5] = torch.nan
        return out

    def short(*args: Any, **options: Any) -> Tensor:
        return eager(*args, **options)[:-1]

    def rounded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return eager(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options).float()

    rows = tiny(zeros=zeros, stale=stale, unwritten=unwritten, short=short, rounded=rounded)
    assert rows["torch"].ok
    for name in ("zeros", "stale", "unwritten", "short", "rounded"):
        assert rows[name].status is Status.INCORRECT, (name, rows[name])
        assert not rows[name].times_ms
        assert "latency_ms/p50" not in rows[name].metrics
    assert rows["zeros"].metrics["error"] == pytest.approx(1.0)
    assert calls == 3  # first calls and gate, no repetitions


def test_what_goes_wrong_while_it_is_timed_is_not_reported(tiny: Callable[..., dict[str, Row]]) -> None:
    calls = 0

    def tires(*args: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return eager(*args, **options) * (1.0 if calls < 5 else 0.5)

    row = tiny(tires=tires)["tires"]
    assert row.status is Status.INCORRECT
    assert not row.times_ms


def test_no_failure_stops_the_others(tiny: Callable[..., dict[str, Row]]) -> None:
    def oom(*args: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def broken(*args: Any, **options: Any) -> Tensor:
        raise ZeroDivisionError("division by zero")

    unsupported = KernelVariant("hstu_attention", "unsupported", eager, reference, lambda **_: "needs a GPU of 2030")
    missing = ImportError("package warp is not installed; pip install warp")
    rows = tiny(oom=oom, broken=broken, unsupported=unsupported, missing=missing, last=eager)
    assert rows["oom"].status is Status.OOM
    assert (rows["broken"].status, rows["broken"].reason) == (Status.ERROR, "ZeroDivisionError: division by zero")
    assert (rows["unsupported"].status, rows["unsupported"].reason) == (Status.UNAVAILABLE, "needs a GPU of 2030")
    assert (rows["missing"].status, rows["missing"].shape) == (Status.UNAVAILABLE, ALL_SHAPES)
    assert rows["last"].ok
    assert rows["last"].metrics["speedup_torch"] > 0


def test_the_gate_must_be_able_to_fail() -> None:
    def inputs(value: float) -> dict[str, Any]:
        return {"x": torch.full((8,), value)}

    def same(x: Tensor) -> Tensor:
        return x

    for value, other in ((0.0, 1.0), (1.0, 1.0)):  # zeros are right; another's answer is right
        gate = KernelGate(same, inputs(value), inputs(other), torch.float32)
        with pytest.raises(IncorrectError, match="the gate can't tell right from wrong"):
            gate.check(lambda v=value: torch.full((8,), v), 2.0)  # type: ignore[misc]
    gate = KernelGate(same, inputs(1.0), inputs(2.0), torch.float32)
    assert gate.check(lambda: torch.ones(8), 2.0).error == 0
    with pytest.raises(IncorrectError):
        gate.check(lambda: torch.ones(8).half(), 2.0)  # another dtype


def test_outputs_that_are_written_in_place_are_restored_before_each_check() -> None:
    def add(out: Tensor, x: Tensor) -> None:
        out += x

    def inputs(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(8, generator=generator) for name in ("out", "x")}

    given = inputs(0)
    gate = KernelGate(add, given, inputs(1), torch.float32, writes=("out",))
    for _ in range(3):
        assert gate.check(lambda: add(**given), 2.0).error == 0
    with pytest.raises(IncorrectError):
        gate.check(lambda: None, 2.0)  # nothing is written
    still = {"out": given["out"], "x": torch.zeros(8)}
    gate = KernelGate(add, still, inputs(1), torch.float32, writes=("out",))
    with pytest.raises(IncorrectError, match="untouched outputs"):
        gate.check(lambda: add(**still), 2.0)  # what was there is right


@pytest.mark.parametrize("how", ["zeros", "stale"])
def test_the_output_that_was_timed_is_compared(
    tiny: Callable[..., dict[str, Row]], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    state: dict[str, Any] = {"timing": False}

    def timed(*args: Any, **options: Any) -> Any:
        state["timing"] = True
        try:
            return interleaved(*args, **options)
        finally:
            state["timing"] = False

    def wrong_under_load(*args: Any, **options: Any) -> Tensor:
        out, before = eager(*args, **options), state.get("out")
        state["out"] = out
        if not state["timing"]:
            return out
        return torch.zeros_like(out) if how == "zeros" else before

    monkeypatch.setattr(kernelbench, "interleaved", timed)
    rows = tiny(wrong=wrong_under_load)
    assert rows["wrong"].status is Status.INCORRECT
    assert "the output that was timed differs" in (rows["wrong"].reason or "")
    assert not rows["wrong"].times_ms
    assert rows["torch"].ok and rows["torch"].metrics["error_timed"] < 1e-5


def test_outputs_that_were_written_over_and_over_are_made_once_more() -> None:
    def add(out: Tensor, x: Tensor) -> None:
        out += x

    def twice(out: Tensor, x: Tensor) -> None:
        out += 2 * x

    sets = [{name: torch.randn(8) for name in ("out", "x")} for _ in range(2)]
    gate = KernelGate(
        add, *({name: torch.randn(8) for name in ("out", "x")} for _ in range(2)), torch.float32, ("out",)
    )
    timed = TimedOutputs(sets, ("out",))
    for _ in range(3):
        add(**sets[1])
    assert timed.check(gate, 1, None, lambda: add(**sets[1]), 2.0).error == 0
    with pytest.raises(IncorrectError, match="the output that was timed differs"):
        timed.check(gate, 1, None, lambda: twice(**sets[1]), 2.0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_wrong_torch_variant_does_not_widen_what_is_allowed(tiny: Callable[..., dict[str, Row]], dtype: str) -> None:
    def wrong(*args: Any, **options: Any) -> Tensor:
        return 1.03 * eager(*args, **options)

    rows = tiny(torch=wrong, dtype=dtype)
    assert rows["torch"].status is Status.INCORRECT, rows["torch"].metrics


def test_several_outputs_are_held_to_account_one_by_one() -> None:
    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        return 1e6 * x, x

    x = {"x": torch.arange(1.0, 9.0)}
    gate = KernelGate(pair, x, {"x": -x["x"]}, torch.float32)
    gate.check(lambda: pair(**x), 2.0)
    with pytest.raises(IncorrectError):
        gate.check(lambda: (1e6 * x["x"], torch.zeros(8)), 2.0)  # small beside the first, but wrong


def test_the_softmax_yardstick_has_its_own_reference(tiny: Callable[..., dict[str, Row]]) -> None:
    rows = tiny(CAUSAL_TINY, peers=True, dtype="bf16")
    assert rows["sdpa_softmax"].ok, rows["sdpa_softmax"].reason
    assert "speedup_peer" not in rows["torch"].metrics  # another operator is no peer to be faster than
    assert tiny(TINY, peers=True)["sdpa_softmax"].status is Status.UNAVAILABLE
    arguments = bench.inputs(CAUSAL_TINY, dtype=torch.float64, device="cpu", seed=0)
    q, k, v = (arguments[name].unflatten(0, (2, 24)).transpose(1, 2) for name in "qkv")
    weights = (arguments["alpha"] * q @ k.transpose(2, 3)).masked_fill(torch.ones(24, 24).triu(1) > 0, -torch.inf)
    expected = (weights.softmax(3) @ v).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(peers.softmax_attention(**arguments), expected, atol=1e-6, rtol=1e-5)


def test_a_peer_gets_the_arguments_that_its_release_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def triton_hstu_mha(N: int, alpha: float, q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor,
                        num_targets: Tensor | None = None) -> Tensor:  # fmt: skip
        return eager(q, k, v, q_offsets=seq_offsets, kv_offsets=seq_offsets, num_targets=num_targets, max_q_len=N,
                     max_kv_len=N, scaling_seqlen=N, alpha=alpha)  # fmt: skip

    monkeypatch.setattr(peers, "_module", lambda *_: SimpleNamespace(triton_hstu_mha=triton_hstu_mha))
    monkeypatch.setattr(peers, "_needs_gpu", lambda _: None)
    arguments = bench.inputs(TINY, dtype=torch.float32, device="cpu", seed=0)
    meta, tma = (p.load() for p in peers.PEERS[:2])
    torch.testing.assert_close(meta(**arguments)(), eager(**arguments))
    with pytest.raises(NotImplementedError, match="enable_tma"):
        tma(**arguments)


@pytest.mark.parametrize("dtype", kernelbench.DTYPES)
def test_rows_in_fp8_are_right_in_every_dtype(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(kernelbench, "ceilings", lambda *_: ROOFS)
    monkeypatch.setattr(quantise_bench, "SHAPES", {"small": quantise_bench.Shape(9, 48)})
    config = KernelBenchConfig(["quantise"], ["torch"], dtype=dtype, device="cpu", repeats=3, min_time_s=0.001)
    [row] = [row for rows in Bench(config, "cpu", lambda _: None).run() for row in rows]
    assert row.ok, row.reason
    assert 0 < row.metrics["error"] <= row.metrics["error_allowed"]


def test_large_shapes_run_on_a_cpu_only_if_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelbench, "ceilings", lambda *_: ROOFS)
    config = KernelBenchConfig(families=["hstu_attention"], variants=["torch"], shapes=["4x256_b32*"], peers=False)
    [[row]] = Bench(config, "cpu", lambda _: None).run()
    assert row.status is Status.UNAVAILABLE
    assert row.reason
    assert "shapes=[NAME]" in row.reason


def test_patterns_choose_shapes_of_every_family() -> None:
    chosen = {f.name: f.shapes for f in select(KernelBenchConfig(shapes=["1280x*", SMALL]))}
    assert chosen["hstu_attention"] == (SMALL,)
    assert chosen["norm_gate"] == ("1280x512",)
    assert "interaction" not in chosen


def test_repetitions_go_round_in_changing_order_over_all_inputs() -> None:
    ran: list[str] = []
    calls = {name: [lambda n=name, i=i: ran.append(f"{n}{i}") for i in range(2)] for name in "abc"}

    def fails() -> None:
        raise RuntimeError("on its way")

    times = interleaved({**calls, "d": [fails]}, "cpu", repeats=20, min_time_s=1e-9)
    assert list(times.failed) == ["d"]
    assert {len(ms) for name, ms in times.ms.items() if name != "d"} == {20}
    rounds = [ran[i : i + 3] for i in range(0, 60, 3)]
    for i, names in enumerate(rounds):
        assert sorted(names) == [f"{n}{i % 2}" for n in "abc"]
    assert len({tuple(n[0] for n in names) for names in rounds}) > 1


def test_tuning_keeps_the_fastest_right_configuration(
    tiny: Callable[..., dict[str, Row]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fn(*args: Any, **options: Any) -> Tensor:
        config = tuning.choose("hstu_attention", "tunable", "key=1", {"sleep": 3, "wrong": 0})
        if config["sleep"] > 100:
            raise ValueError("too much shared memory")
        time.sleep(config["sleep"] / 1e3)
        return eager(*args, **options) * (1 - config["wrong"])

    monkeypatch.setattr(tuning, "_path", lambda family, gpu: tmp_path / "tuned.json")
    monkeypatch.setattr(
        sys.modules[__name__],
        "CANDIDATES",
        [{"sleep": s, "wrong": w} for s, w in ((0, 1), (50, 0), (2, 0), (101, 0))],
        raising=False,
    )
    tuning._table.cache_clear()
    row = tiny(tune=True, tunable=fn)["tunable"]
    tuning._table.cache_clear()
    assert row.ok, row.reason
    assert json.loads((tmp_path / "tuned.json").read_text())["tunable"]["key=1"] == {"sleep": 2, "wrong": 0}
    [used] = row.tuning
    assert (used["source"], used["config"]) == ("table", {"sleep": 2, "wrong": 0})


def test_changed_launches_are_measured_beside_the_variant(
    tiny: Callable[..., dict[str, Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[dict[str, int]] = []

    def fn(*args: Any, **options: Any) -> Tensor:
        config = tuning.choose("hstu_attention", "tunable", "key=1", {"m": 64, "wrong": 0})
        ran.append(dict(config))
        return eager(*args, **options) * (1 - config["wrong"])

    monkeypatch.setattr(sys.modules[__name__], "CANDIDATES", [{"m": 64, "wrong": 0}], raising=False)
    rows = tiny(launches=["m=32", "wrong=1", "steps=2"], tunable=fn)
    assert rows["tunable"].ok and rows["tunable+m=32"].ok
    assert rows["tunable+wrong=1"].status is Status.INCORRECT
    unknown = rows["tunable+steps=2"]
    assert unknown.status is Status.UNAVAILABLE and unknown.reason == "launches: tunable has no steps; it has m, wrong"
    for name, m in (("tunable", 64), ("tunable+m=32", 32)):
        [used] = rows[name].tuning
        assert used["config"] == {"m": m, "wrong": 0}
        assert len(rows[name].times_ms) >= 3
        assert sum(config == used["config"] for config in ran) > 5  # first calls, gate and repetitions


def test_ctrl_c_keeps_the_shapes_that_are_done(tmp_path: Path) -> None:
    """The signal comes in the second shape, which takes until then."""
    words = ["kernels", "families=[interaction]", "variants=[torch]", "dtype=fp32", "device=cpu", "repeats=10"]
    words += ["shapes=[2048x4x512,4096x27x64]", "tracking=none"]
    timed: list[Any] = []

    def times(*given: Any, **options: Any) -> Any:
        timed.append(given)
        if len(timed) == 2:
            time.sleep(600)
        return interleaved(*given, **options)

    def bench_kernels() -> None:
        pytest.MonkeyPatch().setattr(kernelbench, "ceilings", lambda *_: ROOFS)
        pytest.MonkeyPatch().setattr(kernelbench, "interleaved", times)
        os.chdir(tmp_path)
        sys.argv = ["grbench"]
        sys.exit(main(words))

    printed = tmp_path / "printed.txt"
    process = Fork(bench_kernels, printed)
    end = time.monotonic() + 120
    while not printed.exists() or len(re.findall("^interaction ", printed.read_text(), re.MULTILINE)) < 2:
        assert process.poll() is None and time.monotonic() < end, printed.read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert "OK" in printed.read_text()
    [path] = tmp_path.glob("outputs/kernels/*/results.json")
    assert [row["status"] for row in json.loads(path.read_text())["rows"]] == ["OK"]


def test_statuses() -> None:
    assert status_of(NotImplementedError("no pages"))[0] is Status.UNAVAILABLE
    assert status_of(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))[0] is Status.OOM
    assert status_of(KeyError("x")) == (Status.ERROR, "KeyError: 'x'")


@pytest.mark.gpu
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other processes use the GPU at the same time")
def test_a_gpu_is_timed_by_its_own_clock_from_a_cold_cache() -> None:
    config = KernelBenchConfig(
        families=["layer_norm"], variants=["torch"], shapes=["1280x512", "99328x512"], min_time_s=0.2, peers=False
    )
    found = {rows[0].shape: rows[0] for rows in Bench(config, "cuda", lambda _: None).run()}  # in the family's order
    small, large = (found[shape] for shape in config.shapes)
    for row in (small, large):
        assert row.ok, row.reason
        assert len(row.times_ms) >= config.repeats
        assert row.metrics["roofline_share"] < 1.1  # from a warm cache it would seem faster than the memory
    # 2.6 MB at some TB/s take microseconds: were the host's launch overhead in it, it would be tens of them. The least
    # counts, since other work on the host or the GPU only adds time.
    assert min(small.times_ms) < 0.02


def test_the_stack_of_layers_is_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelbench, "ceilings", lambda *_: ROOFS)
    chosen = ["torch", "torch+graph", "cutlass"]
    config = KernelBenchConfig(
        ["hstu_stack"], chosen, shapes=["tiny"], dtype="fp32", device="cpu", repeats=3, min_time_s=0.001
    )
    rows = {row.variant: row for rows in Bench(config, "cpu", lambda _: None).run() for row in rows}
    assert rows["torch"].ok and rows["torch"].metrics["error"] < 1e-5
    assert rows["torch+graph"].status is Status.UNAVAILABLE and "CUDA graphs" in (rows["torch+graph"].reason or "")
    assert "supported here: torch" in (rows["cutlass"].reason or "")


def test_a_stack_with_products_in_fp8_has_their_tolerance_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelbench, "ceilings", lambda *_: ROOFS)
    monkeypatch.setattr(kernelbench, "fp8_ceilings", lambda roofs, device: roofs)
    right = fp8.product

    def measured() -> dict[str, Row]:
        names = ["torch", "torch+fp8", "torch+fp8+graph"]
        config = KernelBenchConfig(["hstu_stack"], names, ["tiny"], "bf16", "cpu", repeats=3, min_time_s=0.001)
        return {row.variant: row for rows in Bench(config, "cpu", lambda _: None).run() for row in rows}

    rows = measured()
    wide, narrow = rows["torch"], rows["torch+fp8"]
    assert wide.ok and narrow.ok and wide.flops == narrow.flops and narrow.bytes < wide.bytes
    assert wide.metrics["error_allowed"] < narrow.metrics["error"] <= narrow.metrics["error_allowed"]
    assert "CUDA graphs" in (rows["torch+fp8+graph"].reason or "")
    monkeypatch.setattr(fp8, "product", lambda x, weight, scales, bias: right(x, weight, scales.square(), bias))
    assert measured()["torch+fp8"].status is Status.INCORRECT


def test_a_stack_in_fp8_is_measured_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter runs norms and projection, and the formulas of the kernel for Hopper attention.

    A CPU refuses it otherwise. Wrong scales and zeros of attention have no time.
    """
    monkeypatch.setattr(kernelbench, "ceilings", lambda *_: ROOFS)
    monkeypatch.setattr(kernelbench, "fp8_ceilings", lambda roofs, device: dataclasses.replace(roofs, tflops=2.0))
    get, refusal, right = registry.get, registry.refusal, fp8.product

    def measured(dtype: str = "bf16") -> dict[str, Row]:
        config = KernelBenchConfig(
            ["hstu_stack"], ["torch", "fp8", "fp8+graph"], ["tiny"], dtype, "cpu", repeats=3, min_time_s=0.001
        )
        return {row.variant: row for rows in Bench(config, "cpu", lambda _: None).run() for row in rows}

    refused = measured()
    assert refused["torch"].ok and {refused[name].status for name in ("fp8", "fp8+graph")} == {Status.UNAVAILABLE}
    assert (refused["fp8"].reason or "").startswith("kernel.hstu_attention=fp8: ")
    assert measured("fp32")["fp8"].reason == "dtype=fp32: products in fp8 give bf16; set dtype=bf16"

    emulated = dataclasses.replace(
        get("hstu_attention", "torch"), name="fp8", projected=Projected(blocks_of, project, attended)
    )
    monkeypatch.setattr(registry, "get", lambda family, name: emulated if name == "fp8" else get(family, name))
    monkeypatch.setattr(
        registry,
        "refusal",
        lambda family, name, **o: refusal(family, "torch" if name in ("fp8", "triton") else name, **o),
    )
    rows = measured()
    assert rows["fp8"].ok, rows["fp8"].reason
    wide, narrow = rows["torch"], rows["fp8"]
    assert wide.metrics["error_allowed"] < narrow.metrics["error"] <= narrow.metrics["error_allowed"]
    assert narrow.metrics["error_allowed"] == 2 * narrow.metrics["error_rounding"]
    assert narrow.metrics["ceiling_tflops"] == 2.0
    given = stack.inputs(stack.SHAPES["tiny"], dtype=torch.bfloat16, device="cpu", seed=0)
    weights = [layer.uvqk.weight for layer in given["layers"]] + [layer.out.weight for layer in given["layers"]]
    saved = sum(w.nbytes // 2 - 4 * len(w) for w in weights)
    assert wide.bytes - narrow.bytes == saved and wide.flops == narrow.flops

    monkeypatch.setattr(fp8, "product", lambda x, weight, scales, bias: right(x, weight, scales.square(), bias))
    assert measured()["fp8"].status is Status.INCORRECT
    monkeypatch.setattr(fp8, "product", right)
    blind = Projected(blocks_of, project, lambda made, dtype, **o: attended(made, dtype, **o).zero_())
    emulated = dataclasses.replace(emulated, projected=blind)
    wrong = measured()["fp8"]
    assert wrong.status is Status.INCORRECT and not wrong.times_ms


@pytest.mark.gpu
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other processes use the GPU at the same time")
def test_a_stack_in_fp8_runs_on_a_gpu() -> None:
    config = KernelBenchConfig(
        ["hstu_stack"], ["cutlass", "cutlass+fp8", "fp8", "fp8+graph"], ["5x512_b1_*"], min_time_s=0.1
    )
    rows = {row.variant: row for rows in Bench(config, "cuda", lambda _: None).run() for row in rows}
    assert all(row.ok for row in rows.values()), [row.reason for row in rows.values()]
    assert rows["cutlass"].metrics["error_allowed"] < rows["fp8"].metrics["error"] < 0.2


def test_products_in_fp8_are_measured_beside_those_in_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the tolerance of its own rounding and the ceiling of its own products; a wrong one has no time."""
    fp8_roofs = dataclasses.replace(ROOFS, tflops=2.0)
    monkeypatch.setattr(kernelbench, "ceilings", lambda *_: ROOFS)
    monkeypatch.setattr(kernelbench, "fp8_ceilings", lambda roofs, device: fp8_roofs)
    config = KernelBenchConfig(
        ["norm_product"], ["torch", "torch+fp8"], shapes=["tiny*"], device="cpu", repeats=3, min_time_s=0.001
    )

    def measured() -> list[Row]:
        return [row for rows in Bench(config, "cpu", lambda _: None).run() for row in rows]

    rows = measured()
    assert [row.variant for row in rows] == ["torch", "torch+fp8"] * 3 and all(row.ok for row in rows)
    for wide, narrow in zip(rows[::2], rows[1::2], strict=True):
        assert wide.metrics["error_allowed"] < narrow.metrics["error"] <= narrow.metrics["error_allowed"]
        assert narrow.metrics["error_allowed"] == 2 * narrow.metrics["error_rounding"]
        assert (wide.metrics["ceiling_tflops"], narrow.metrics["ceiling_tflops"]) == (1.0, 2.0)
        assert narrow.metrics["matmul_share"] == pytest.approx(narrow.metrics["tflops"] / 2)
        assert (narrow.flops, narrow.bytes) == products.cost(products.SHAPES[narrow.shape], "bf16", "torch+fp8")
    chart = roofline("norm_product", [dataclasses.asdict(row) for row in rows], ROOFS.to_dict())
    assert chart is not None and [max(s.y) for s in chart.series if s.mode == "line"] == [1.0, 2.0]
    right = fp8.product
    monkeypatch.setattr(fp8, "product", lambda x, weight, scales, **o: right(x, weight, scales.square(), **o))
    wrong = {(row.shape, row.variant): row for row in measured()}
    for (_, variant), row in wrong.items():
        assert row.ok if variant == "torch" else row.status is Status.INCORRECT and not row.times_ms


def test_the_projection_and_attention_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of rounding has its tolerance, and the operands that the projection writes pass theirs."""
    monkeypatch.setattr(kernelbench, "ceilings", lambda *_: ROOFS)
    monkeypatch.setattr(kernelbench, "fp8_ceilings", lambda roofs, device: roofs)
    variant = dataclasses.replace(
        registry.get("hstu_attention", "torch"), name="fp8", projected=Projected(blocks_of, project, attended)
    )
    get, refusal = registry.get, registry.refusal
    monkeypatch.setattr(registry, "get", lambda family, name: variant if name == "fp8" else get(family, name))
    monkeypatch.setattr(
        registry, "refusal", lambda family, name, **o: refusal(family, "torch" if name == "fp8" else name, **o)
    )
    chosen = ["torch", "fp8", "torch+product", "fp8+product"]
    config = KernelBenchConfig(
        ["projected_attention"], chosen, shapes=["tiny"], device="cpu", repeats=2, min_time_s=0.001
    )

    def measured() -> dict[str, Row]:
        return {row.variant: row for rows in Bench(config, "cpu", lambda _: None).run() for row in rows}

    rows = measured()
    assert all(row.ok for row in rows.values()), [row.reason for row in rows.values()]
    assert rows["torch"].metrics["error_allowed"] < rows["torch+product"].metrics["error"] / 2
    given = projected.inputs(projected.SHAPES["tiny"], dtype=torch.bfloat16, device="cpu", seed=0)
    out = projected.bind("fp8", **given)()
    read = [given["x"], given["weight"]]
    assert projected.cost(projected.SHAPES["tiny"], "bf16", "fp8").bytes == sum(x.nbytes for x in (*read, *out))
    unscaled = variant.projected
    assert unscaled is not None

    def wrong(*args: Any, **options: Any) -> Any:
        u, made = unscaled.project(*args, **options)
        return u, dataclasses.replace(made, blocks=torch.ones_like(made.blocks))

    variant = dataclasses.replace(variant, projected=unscaled._replace(project=wrong))
    statuses = {name: row.status for name, row in measured().items()}
    assert statuses["fp8"] is statuses["fp8+product"] is Status.INCORRECT and statuses["torch"] is Status.OK


@pytest.mark.parametrize("variant", ["torch", "torch+fp8", "torch+fp8+apart"])
@pytest.mark.parametrize("name", ["tiny", "tiny_gate", "tiny_alone"])
def test_the_bytes_of_a_product_are_those_of_its_inputs_and_result(name: str, variant: str) -> None:
    shape = products.SHAPES[name]
    given = products.inputs(shape, dtype=torch.bfloat16, device="cpu", seed=0)
    moved = [given["x"], *(given[key] for key in ("u", "added") if key in given)]
    weight = given["weight"]
    if variant != "torch":
        made = fp8.Scaled.of(weight)
        weight = made.values
        moved += [made.scales]
    if variant == "torch+fp8" and not shape.norm:
        ready = fp8.Scaled.of(moved.pop(0))
        moved += [ready.values, ready.scales]
    out = products.bind(variant, **given)()
    assert products.cost(shape, "bf16", variant).bytes == sum(x.nbytes for x in (*moved, weight, out))


def test_products_in_fp8_need_bf16_results() -> None:
    config = KernelBenchConfig(["norm_product"], ["torch+fp8"], shapes=["tiny"], dtype="fp32", device="cpu")
    [row] = [row for rows in Bench(config, "cpu", lambda _: None).run() for row in rows]
    assert row.status is Status.UNAVAILABLE and row.reason == "dtype=fp32: products in fp8 give bf16; set dtype=bf16"
