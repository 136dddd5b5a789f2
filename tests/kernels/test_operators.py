"""The small operator families: every variant against the fp32 reference, as exact as eager PyTorch to a factor.

Errors are compared part by part (`PARTS`), so that a large part can't hide a wrong small one. On a machine
without a GPU, Triton's interpreter runs the kernels (tests/conftest.py).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import kept
from helpers.kernel_cases import (
    CASES,
    DTYPES,
    EACH_CASE,
    PARTS,
    Arguments,
    agrees,
    converted,
    errors,
    interaction,
    jagged_concat,
    jagged_split,
    layer_norm,
    norm_gate,
    token_embedding,
)
from torch import Tensor

from grkernels import registry, triton_launch, tuning

EAGER = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2}  # what eager PyTorch may be wrong by


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "case"), EACH_CASE)
def test_eager_torch(family: str, case: Callable[[], Arguments], dtype: str, poisoned: None) -> None:
    torch.manual_seed(1)
    arguments = converted(case(), DTYPES[dtype])
    most = EAGER[dtype] * (10 if family.endswith("norm") else 1)  # a large mean costs LayerNorm bits
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
    """A CUDA graph needs this: tensors without values (device meta) suffice for eager PyTorch."""
    arguments = CASES[family][1]()
    expected = registry.get(family, "torch").fn(**arguments)
    out = registry.get(family, "torch").fn(**converted(arguments, torch.float32, "meta"))
    shapes = [[x.shape for x in PARTS[family](o, arguments)] for o in (expected, out)]
    assert shapes[0] == shapes[1]


COMPILE_FOR_HOPPER = """
import torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from helpers.kernel_cases import CASES, converted
from grkernels import registry

here = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
triton.runtime.driver.set_active(SimpleNamespace(**{k: lambda *_, v=v: v for k, v in here.items()}))
run = triton.JITFunction.run
triton.JITFunction.run = lambda self, *args, **options: run(self, *args, **{**options, "warmup": True})
for family, cases in CASES.items():
    for case in (cases[1], cases[-1]):
        registry.get(family, "triton").fn(**converted(case(), torch.bfloat16))
    print(family)
"""


def test_kernels_compile_for_hopper() -> None:
    """The interpreter takes Python that the compiler refuses; compiling, unlike running, needs no GPU."""
    printed = (kept.output_of("triton_operators", COMPILE_FOR_HOPPER, TRITON_INTERPRET="0") / kept.OUTPUT).read_text()
    assert printed.split() == list(CASES)


COMPILE_WITH_DOUBLES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from grkernels.hstu_attention.triton import attention_kernel as attention
from grkernels.layer_norm.triton import _kernel as layer_norm
from grkernels.norm_gate.triton import _kernel as norm_gate
sizes = dict(TARGETS=True, CONTEXTUAL=False, WINDOW=False, PAGE=0, QK=32, V=32, QK_BLOCK=32, V_BLOCK=32, M=64, N=64,
             STORED=0)
sizes |= dict(E=64, W=64, ROWS=4, BLOCK_E=64, BLOCK_W=64, GROUPS=1, CONCAT=True)
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
    folder = kept.output_of("triton_doubles", COMPILE_WITH_DOUBLES, TRITON_INTERPRET="0")
    found = (folder / kept.OUTPUT).read_text().splitlines()
    assert len(found) == 3
    for instructions in found:
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
    """The part of a Triton kernel that `Launcher` calls.

    It records if a launch went through Triton's own call, or through the compiled kernel that this returned.
    """

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
    assert launch() == "compiled" and tuning.compiled()[before:] == ["helpers.kernel_cases"] * 5


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
