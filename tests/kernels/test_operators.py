"""The small operator families: every variant against the fp32 reference, as exact as plain PyTorch to a factor.

Errors are compared part by part (`PARTS`), so that a large part can't hide a wrong small one. On a machine
without a GPU, Triton's interpreter runs the kernels (tests/conftest.py).
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grkernels import registry, triton_launch, tuning

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PLAIN = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2}  # what plain PyTorch may be wrong by
FLOOR = 4 * 2.0**-23  # a few roundings of fp32: where plain PyTorch happens to be exact

Arguments = dict[str, Any]


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


def jagged_lengths(first: tuple[int, ...], second: tuple[int, ...]) -> Arguments:
    return {"first_offsets": offsets(first), "second_offsets": offsets(second)}


def norm_gate(rows: int, heads: int, d: int, *, scale: float = 1e-3, mean: float = 0.0) -> Arguments:
    """u is a strided view of a projection, and so is a where it has several heads."""
    W = heads * d
    a = scale * (mean + torch.randn(rows, W + 8 * (heads > 1)))[:, :W]
    return {
        "u": 2 * torch.randn(rows, 2 * W + 16)[:, 16 : 16 + W],
        "a": a.unflatten(1, (heads, d)) if heads > 1 else a,
        "weight": 1 + 0.1 * torch.randn(W),
        "bias": 0.1 * torch.randn(W),
        "eps": 1e-6 if mean == 0.0 else scale**2 / 100,
    }


def layer_norm(rows: int, width: int, *, scale: float = 1.0, mean: float = 0.0) -> Arguments:
    x = scale * (mean + torch.randn(rows, width + 8))[:, 8:]
    return {"x": x, "weight": 1 + 0.1 * torch.randn(width), "bias": 0.1 * torch.randn(width), "eps": scale**2 / 100}


def interaction(batch: int, features: int, dim: int) -> Arguments:
    """Strided: some features of each sample, some values of each feature."""
    return {"x": torch.randn(batch, features + 2, dim + 4)[:, 1 : 1 + features, 4:]}


def jagged_concat(first: tuple[int, ...], second: tuple[int, ...], heads: int, d: int, padding: int = 0) -> Arguments:
    """Padding beyond the last sequence is NaN: nothing may come of it."""
    streams = []
    for lengths in first, second:
        x = torch.randn(sum(lengths) + padding, heads, 2 * d)[:, :, d:]
        x[sum(lengths) :] = torch.nan
        streams.append(x if heads > 1 else x[:, 0])
    rows = sum(first) + sum(second) + padding
    return {"first": streams[0], "second": streams[1], "rows": rows, **jagged_lengths(first, second)}


def jagged_split(first: tuple[int, ...], second: tuple[int, ...], heads: int, d: int, padding: int = 0) -> Arguments:
    x = torch.randn(sum(first) + sum(second) + padding, heads, d + 8)[:, :, 8:]
    x[sum(first) + sum(second) :] = torch.nan
    sizes = {"first_rows": sum(first) + padding, "second_rows": sum(second) + 2 * padding}
    return {"x": x if heads > 1 else x[:, 0], **sizes, **jagged_lengths(first, second)}


def token_embedding(rows: int, width: int, num_actions: int) -> Arguments:
    return {
        "token_rows": torch.randint(30, (rows,)),
        "actions": torch.randint(2 ** (num_actions + 1), (rows,)),  # one bit more than the table has rows
        "weights": torch.rand(rows, dtype=torch.float64),
        "positions": torch.randint(9, (rows,)),
        "time_buckets": torch.randint(5, (rows,)),
        "token_table": torch.randn(30, width),
        "action_table": torch.randn(num_actions, width),
        "weight_vector": torch.randn(width),
        "position_table": torch.randn(9, width),
        "time_table": torch.randn(5, width),
    }


def thirds(out: Tensor, x: Arguments) -> tuple[Tensor, ...]:
    return out.chunk(3, dim=1)


def dense_and_pairs(out: Tensor, x: Arguments) -> tuple[Tensor, ...]:
    return out.tensor_split([x["x"].shape[2]], dim=1)


PARTS: dict[str, Callable[[Any, Arguments], tuple[Tensor, ...]]] = {
    "norm_gate": thirds,
    "layer_norm": lambda out, x: (out,),
    "interaction": dense_and_pairs,
    "jagged_concat": lambda out, x: (out,),
    "jagged_split": lambda out, x: out,
    "token_embedding": lambda out, x: (out,),
}
RAGGED = (3, 0, 1, 0, 5), (0, 0, 4, 1, 2)
# What to run each family at; on a CPU, torch.compile runs the first only: compiling takes seconds.
CASES: dict[str, list[Callable[[], Arguments]]] = {
    "norm_gate": [
        lambda: norm_gate(5, 2, 20),
        lambda: norm_gate(3, 1, 48, scale=1e-5, mean=10.0),
        lambda: norm_gate(1, 1, 1100),
        lambda: norm_gate(2, 4, 1024, scale=1e-5),
        lambda: norm_gate(0, 1, 16),
    ],
    "layer_norm": [
        lambda: layer_norm(5, 40),
        lambda: layer_norm(3, 100, scale=1e-2, mean=20.0),
        lambda: layer_norm(1, 1),
        lambda: layer_norm(2, 4097),
        lambda: layer_norm(0, 16),
    ],
    "interaction": [
        lambda: interaction(5, 4, 16),
        lambda: interaction(3, 27, 40),
        lambda: interaction(9, 1, 100),
        lambda: interaction(3, 2, 100),
        lambda: interaction(2, 33, 300),
        lambda: interaction(1, 128, 16),
        lambda: interaction(2, 130, 40),
        lambda: interaction(0, 4, 16),
    ],
    "jagged_concat": [
        lambda: jagged_concat(*RAGGED, 2, 20),
        lambda: jagged_concat(*RAGGED, 1, 1100, padding=3),
        lambda: jagged_concat((1,), (0,), 1, 16),
        lambda: jagged_concat((0, 0, 2), (0, 0, 0), 1, 16),
        lambda: jagged_concat((0,), (0,), 1, 16, padding=2),
        lambda: jagged_concat((), (), 1, 16, padding=2),
    ],
    "jagged_split": [
        lambda: jagged_split(*RAGGED, 2, 20),
        lambda: jagged_split(*RAGGED, 1, 1100, padding=3),
        lambda: jagged_split((1,), (0,), 1, 16),
        lambda: jagged_split((0, 0, 2), (0, 0, 0), 1, 16),
        lambda: jagged_split((0,), (0,), 1, 16, padding=2),
        lambda: jagged_split((), (), 1, 16, padding=2),
    ],
    "token_embedding": [
        lambda: token_embedding(7, 24, 3),
        lambda: token_embedding(3, 1100, 1),
        lambda: token_embedding(0, 16, 2),
    ],
}
EACH_CASE = [pytest.param(family, case, id=f"{family}{i}") for family in CASES for i, case in enumerate(CASES[family])]


def converted(arguments: Arguments, dtype: torch.dtype, device: str | None = None) -> Arguments:
    """The same problem, its fp32, fp16 and bf16 tensors as `dtype`; strides stay. device None: where they are."""

    def convert(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        whole = x if x._base is None else x._base  # converting a view would make it contiguous
        moved = whole.to(device, dtype if x.dtype in DTYPES.values() else x.dtype)
        return moved.as_strided(x.shape, x.stride(), x.storage_offset())

    return {name: convert(x) for name, x in arguments.items()}


def errors(family: str, out: Any, arguments: Arguments) -> list[float]:
    """||out - reference|| / ||reference|| of each part, the reference being fp32 on the same (rounded) values."""
    exact = registry.get(family, "torch").reference(**converted(arguments, torch.float32))
    pairs = zip(PARTS[family](out, arguments), PARTS[family](exact, arguments), strict=True)
    return [((a.float() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs]


def agrees(family: str, out: Any, arguments: Arguments) -> bool:
    """The check that every variant must pass. Shape and dtype are those of plain PyTorch."""
    plain = registry.get(family, "torch")
    expected = plain.fn(**arguments)
    for a, b in zip(PARTS[family](out, arguments), PARTS[family](expected, arguments), strict=True):
        assert a.shape == b.shape and a.dtype is b.dtype
    allowed = [plain.max_error_ratio * e + FLOOR for e in errors(family, expected, arguments)]
    return all(e <= most for e, most in zip(errors(family, out, arguments), allowed, strict=True))  # NaN is not <=


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that a variant allocates is NaN until it writes it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "case"), EACH_CASE)
def test_plain_torch(family: str, case: Callable[[], Arguments], dtype: str, poisoned: None) -> None:
    torch.manual_seed(1)
    arguments = converted(case(), DTYPES[dtype])
    most = PLAIN[dtype] * (10 if family.endswith("norm") else 1)  # a large mean costs LayerNorm bits
    assert all(e <= most for e in errors(family, registry.get(family, "torch").fn(**arguments), arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests below run the same kernels on the GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "case"), EACH_CASE)
def test_triton(family: str, case: Callable[[], Arguments], dtype: str, poisoned: None) -> None:
    torch.manual_seed(2)
    arguments = converted(case(), DTYPES[dtype])
    assert agrees(family, registry.get(family, "triton").fn(**arguments), arguments)


@pytest.mark.parametrize("family", CASES)
def test_compiled(family: str) -> None:
    variant = registry.get(family, "compile")
    if reason := variant.supports(device="cpu", dtype="fp32"):
        pytest.skip(reason)
    torch.compiler.reset()
    arguments = converted(CASES[family][0](), torch.bfloat16)
    assert agrees(family, variant.fn(**arguments), arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests below run the same kernels on the GPU")
@pytest.mark.parametrize("family", CASES)
def test_every_candidate_configuration_is_right(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner may pick any of them: here every tile shape (warps and stages don't exist in the interpreter)."""
    module = importlib.import_module(f"grkernels.{family}.triton")
    tiles = {tuple((k, c[k]) for k in c if k not in ("warps", "stages", "programs")): c for c in module.CANDIDATES}
    arguments = CASES[family][0]()
    for config in tiles.values():
        monkeypatch.setattr(tuning, "choose", lambda *_, config=config: config)
        assert agrees(family, module.VARIANT.fn(**arguments), arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", CASES)
def test_wrong_outputs_fail_the_same_check(family: str, dtype: str) -> None:
    arguments = converted(CASES[family][1](), DTYPES[dtype])
    out = registry.get(family, "torch").fn(**arguments)
    outs = out if isinstance(out, tuple) else (out,)
    wrong: dict[str, Callable[[Tensor], Tensor]] = {
        "zeros": torch.zeros_like,
        "shifted by a value": lambda x: x.roll(1, dims=1),
        "shifted by a row": lambda x: x.roll(1, dims=0),
        "not a number": lambda x: x.index_fill(0, torch.tensor([0]), torch.nan),
        "one value unwritten": lambda x: x.index_put(
            (torch.tensor(1), torch.tensor(x.shape[1] - 1)), torch.tensor(9.0).to(x)
        ),
    }
    assert agrees(family, out, arguments)
    for name, spoil in wrong.items():
        spoiled = tuple(spoil(x) for x in outs)
        assert not agrees(family, spoiled if isinstance(out, tuple) else spoiled[0], arguments), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_gate_left_out_fail_the_same_check(dtype: str) -> None:
    for case in CASES["norm_gate"][:4]:
        arguments = converted(case(), DTYPES[dtype])
        gate, a, result = registry.get("norm_gate", "torch").fn(**arguments).chunk(3, dim=1)
        u = arguments["u"]
        for wrong in (
            [gate, a, gate * a],
            [u, a, result],
            [gate, a, result / gate],
            [gate, torch.zeros_like(a), result],
        ):
            assert not agrees("norm_gate", torch.cat(wrong, dim=1), arguments)


@pytest.mark.parametrize("family", CASES)
def test_no_value_is_read_on_the_host(family: str) -> None:
    """What a CUDA graph needs: tensors without values (device meta) have all that plain PyTorch asks for."""
    arguments = CASES[family][1]()
    expected = registry.get(family, "torch").fn(**arguments)
    out = registry.get(family, "torch").fn(**converted(arguments, torch.float32, "meta"))
    shapes = [[x.shape for x in PARTS[family](o, arguments)] for o in (expected, out)]
    assert shapes[0] == shapes[1]


COMPILE_FOR_HOPPER = """
import torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from test_operators import CASES, converted
from grkernels import registry

here = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
triton.runtime.driver.set_active(SimpleNamespace(**{k: lambda *_, v=v: v for k, v in here.items()}))
run = triton.JITFunction.run
triton.JITFunction.run = lambda self, *args, **options: run(self, *args, **{**options, "warmup": True})
for family, cases in CASES.items():
    registry.get(family, "triton").fn(**converted(cases[1](), torch.bfloat16))
"""


def test_kernels_compile_for_hopper() -> None:
    """The interpreter takes Python that the compiler refuses; compiling, unlike running, needs no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-c", COMPILE_FOR_HOPPER], check=True, cwd=Path(__file__).parent, env=environment, timeout=120
    )


COMPILE_WITH_DOUBLES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from grkernels.hstu_attention.triton import _kernel as attention
from grkernels.layer_norm.triton import _kernel as layer_norm
from grkernels.norm_gate.triton import _kernel as norm_gate
sizes = dict(TARGETS=True, CONTEXTUAL=False, WINDOW=False, PAGE=0, QK=32, V=32, QK_BLOCK=32, V_BLOCK=32, M=64, N=64)
sizes |= dict(E=64, W=64, ROWS=4, BLOCK_E=64, BLOCK_W=64)
indices = ("q_offsets", "kv_offsets", "num_targets", "page_table", "paged_lengths")
for kernel in (attention.kernel, layer_norm.kernel, norm_gate.kernel):
    kinds = {}
    for name in kernel.arg_names:
        kinds[name] = "*i64" if name in indices else "*bf16"
        if name.endswith("stride") or name in ("L", "heads", "contextual", "window", "total_rows"):
            kinds[name] = "i32"
        if name in ("eps", "half_alpha", "scale"):
            kinds[name] = "fp64"
        if name.isupper() and name != "L":
            kinds[name] = "constexpr"
    constants = {name: sizes[name] for name, kind in kinds.items() if kind == "constexpr"}
    made = triton.compile(ASTSource(kernel, kinds, constants), target=GPUTarget("cuda", 90, 32))
    print(*sorted({line.split()[0] for line in made.asm["ptx"].splitlines() if ".f64" in line and ";" in line}))
"""


def test_numbers_that_come_in_fp64_are_not_computed_with_in_fp64() -> None:
    """AOTInductor passes Python's numbers so; attention's inline assembly would read half of one."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_WITH_DOUBLES],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 3
    for instructions in done.stdout.splitlines():
        assert "cvt.rn.f32.f64" in instructions
        assert all(i.startswith(("cvt", "ld", "mov")) for i in instructions.split()), instructions


@pytest.mark.parametrize("family", CASES)
def test_benchmark_shapes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of every benchmark are what the family takes, and the cost counts their bytes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    bench = importlib.import_module(f"grkernels.{family}.bench")
    for shape in bench.SHAPES.values():
        args, cost = bench.supports_args(shape), bench.cost(shape, "bf16")
        for name in registry.variants(family):
            assert registry.get(family, name).supports(device="cuda", dtype="bf16", **args) is None
        assert cost.bytes > 2**20 and cost.flops < 300 * cost.bytes
        assert bench.cost(shape, "fp32").bytes <= 2 * cost.bytes
        assert importlib.import_module(f"grkernels.{family}.triton").tuning_key(**args)


def test_supports_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = registry.get("norm_gate", "triton").supports
    assert "fp8" in (triton(device="cuda", dtype="fp8", width=8) or "")
    assert "width 40000 is over 32768" in (triton(device="cuda", dtype="bf16", width=40000) or "")
    monkeypatch.setattr("grkernels.triton_common.INTERPRETED", False)
    assert "needs an NVIDIA GPU" in (triton(device="cpu", dtype="bf16", width=8) or "")
    monkeypatch.setitem(os.environ, "PATH", "")
    assert "C++ compiler" in (registry.get("norm_gate", "compile").supports(device="cpu", dtype="bf16", width=8) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["compile", "triton"])
@pytest.mark.parametrize(("family", "case"), EACH_CASE)
def test_on_a_gpu(family: str, case: Callable[[], Arguments], name: str, dtype: str) -> None:
    if name == "compile" and (dtype != "bf16" or case is not CASES[family][0]):
        pytest.skip("torch.compile takes seconds for each case; the first one shows that it runs")
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()
    arguments = converted(case(), DTYPES[dtype], "cuda")
    assert agrees(family, registry.get(family, name).fn(**arguments), arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["torch", "compile", "triton"])
@pytest.mark.parametrize("family", CASES)
def test_on_a_gpu_at_real_sizes_and_in_a_graph(family: str, name: str, dtype: str) -> None:
    if name == "compile" and dtype != "bf16":
        pytest.skip("torch.compile takes seconds for each case; bf16 shows that it runs")
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()
    variant, bench = registry.get(family, name), importlib.import_module(f"grkernels.{family}.bench")
    for shape in bench.SHAPES.values():
        arguments = bench.inputs(shape, dtype=DTYPES[dtype], device="cuda", seed=3)
        eager = variant.fn(**arguments)
        assert agrees(family, eager, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = variant.fn(**arguments)
    for x in captured if isinstance(captured, tuple) else (captured,):
        x.fill_(torch.nan)
    graph.replay()
    assert agrees(family, captured, arguments)


class Kernel:
    """As much of Triton's as `Launcher` calls: says whether a launch went through Triton's own call, or the compiled
    kernel that this returned."""

    fn = interaction

    def __init__(self) -> None:
        self.launches: list[str] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        return lambda *arguments, num_warps: (self.launches.append("own"), {grid: self.again})[1]

    def again(self, *arguments: Any) -> None:
        self.launches.append("compiled")


def test_launches_find_their_kernel_by_what_it_was_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU test_triton_compiles_nothing_anew_for_other_lengths sees the real thing."""
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    kernel, before = Kernel(), len(tuning.compiled())
    launcher = triton_launch.Launcher(kernel, aligned=1)
    memory, index = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(9, dtype=torch.int64)

    def launch(x: Tensor = memory, at: Tensor = index, stride: int = 8, rows: int = 5, block: int = 16) -> str:
        launcher((1, 1, 1), (x, at), (stride,), (rows, 1e-6), (block,), num_warps=4)
        return kernel.launches[-1]

    assert launch() == "own" and launch() == "compiled"
    assert launch(rows=16) == launch(rows=1) == launch(at=index[1:]) == launch(memory[8:]) == "compiled"
    assert launch(memory[1:]) == launch(memory[1:]) == "own"  # not aligned: as Triton finds it, every time
    for other in ({"stride": 16}, {"block": 32}, {"x": memory.float()}, {"at": index.int()}):
        assert launch(**other) == "own" and launch(**other) == "compiled"  # type: ignore[arg-type]
    assert launch() == "compiled" and tuning.compiled()[before:] == ["test_operators"] * 5


BY_LENGTH: dict[str, Callable[[int], Arguments]] = {
    "norm_gate": lambda n: norm_gate(n, 2, 32),
    "layer_norm": lambda n: layer_norm(n, 64),
    "interaction": lambda n: interaction(n, 5, 28),
    "jagged_concat": lambda n: jagged_concat((3, 0, n), (0, 0, 4), 2, 16),
    "jagged_split": lambda n: jagged_split((3, 0, n), (0, 0, 4), 2, 16),
    "token_embedding": lambda n: token_embedding(n, 64, 3),
}


@pytest.mark.gpu
@pytest.mark.parametrize("family", BY_LENGTH)
def test_triton_compiles_nothing_anew_for_other_lengths(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one call, other numbers of rows, and index tensors that begin elsewhere, find the same kernel."""
    from triton import knobs

    fn, events = registry.get(family, "triton").fn, []
    fn(**converted(BY_LENGTH[family](5), torch.bfloat16, "cuda"))
    before = tuning.compiled()
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda *_, **event: events.append(event))
    for rows in (1, 16, 17, 64):
        arguments = converted(BY_LENGTH[family](rows), torch.bfloat16, "cuda")
        moved = {name: shifted(x) for name, x in arguments.items()}
        for result, again in zip(tensors(fn(**arguments)), tensors(fn(**moved)), strict=True):
            assert torch.equal(result, again)
    assert tuning.compiled() == before and not events


def shifted(x: Any) -> Any:
    """An index tensor's values, beginning 8 bytes past a multiple of 16; anything else as it is."""
    if not isinstance(x, Tensor) or x.dtype != torch.int64:
        return x
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
