"""The families that serve pages and beams: every variant against loops, in place where they write.

On a machine without a GPU, Triton's interpreter runs the kernels (tests/conftest.py).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import kept
from torch import Tensor

from grbench.gate.kernel import KernelGate
from grkernels import registry, tuning

Arguments = dict[str, Any]
Function = Callable[..., Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = ("paged_write", "beam_attention")


def implementations(family: str) -> dict[str, Function]:
    """The reference and every variant."""
    variants = {name: registry.get(family, name) for name in registry.variants(family)}
    return {"reference": variants["torch"].reference} | {name: variant.fn for name, variant in variants.items()}


@pytest.fixture(params=["reference", "torch", "triton"])
def implementation(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# Attention


def case(
    lengths: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    page: int = 16,
    terms: int = 2,
    padding: int = 0,
) -> Arguments:
    """Return requests of these numbers of rows, cut anywhere. Pages hold keys and values side by side, in random order.

    padding: rows behind the last request, as in a captured graph.
    """
    torch.manual_seed(sum(lengths))
    starts = torch.tensor([0, *np.cumsum(lengths)]).int()
    n, most = int(starts[-1]) + padding, 9
    pages = torch.randn(len(lengths) * most, page, kv_heads, 2 * dim)
    own = torch.randint(0, len(pages) * page, (n, terms))
    own[torch.arange(terms) >= torch.randint(0, terms + 1, (n, 1))] = -1
    return {
        "q": 2 * torch.randn(n, heads, dim),
        "k_pages": pages[..., :dim],
        "v_pages": pages[..., dim:],
        "starts": starts,
        "block_table": torch.randperm(len(pages)).view(len(lengths), most).int(),
        "limits": torch.randint(1, most * page + 1, (n,)).int(),
        "own_slots": own,
        "scale": dim**-0.5,
    }


CASES = {
    "ragged": lambda: case([70, 1, 0, 150, 3]),
    "one head, large pages": lambda: case([65], heads=1, kv_heads=1, dim=8, page=64, terms=1),
    "no codes before": lambda: case([5, 9], terms=0),
    "padding": lambda: case([20, 80, 0, 0], padding=40),
    "wide": lambda: case([40, 33], heads=6, kv_heads=2, dim=72, terms=3),
}


def naive(q: Tensor, k_pages: Tensor, v_pages: Tensor, **a: Any) -> Tensor:
    """fp64, a row and a head at a time."""
    starts, page, group = a["starts"].tolist(), k_pages.shape[1], q.shape[1] // k_pages.shape[2]
    out = torch.zeros(starts[-1], *q.shape[1:], dtype=torch.float64)
    for b in range(len(starts) - 1):
        for i in range(starts[b], starts[b + 1]):
            seen = [(int(a["block_table"][b, p // page]), p % page) for p in range(int(a["limits"][i]))]
            seen += [(slot // page, slot % page) for slot in a["own_slots"][i].tolist() if slot >= 0]
            at = torch.tensor(seen).T
            for h in range(q.shape[1]):
                keys, values = (x[at[0], at[1], h // group].double() for x in (k_pages, v_pages))
                out[i, h] = torch.softmax(a["scale"] * keys @ q[i, h].double(), 0) @ values
    return out


def converted(arguments: Arguments, dtype: torch.dtype, device: str) -> Arguments:
    """In `dtype` on the device, keys and values still side by side in memory."""
    pages = torch.cat([arguments["k_pages"], arguments["v_pages"]], dim=3).to(device, dtype)
    dim = arguments["q"].shape[2]
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return moved | {"q": moved["q"].to(dtype), "k_pages": pages[..., :dim], "v_pages": pages[..., dim:]}


@functools.cache
def solved(name: str, dtype: torch.dtype) -> tuple[Arguments, Tensor, Tensor]:
    """Return a case, the loop's answer, and its answer without the rows' own codes."""
    arguments = converted(CASES[name](), dtype, DEVICE)
    on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return arguments, naive(**on_cpu), naive(**on_cpu | {"own_slots": torch.full_like(on_cpu["own_slots"], -1)})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_a_loop(name: str, dtype: torch.dtype, implementation: str) -> None:
    """Every implementation against a loop in fp64.

    fp32 differs in its order of summation. In bf16 inputs are exact; the result is rounded once, to 2^-9, and Triton's
    weights too. Outputs are means of values, 3 at most.
    """
    arguments, expected, blind = solved(name, dtype)
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 1e-2}[dtype]
    out = torch.full_like(arguments["q"], 7.0)
    implementations("beam_attention")[implementation](out, **arguments)
    torch.testing.assert_close(out[: len(expected)].double().cpu(), expected, atol=tolerance, rtol=0)
    assert (out[len(expected) :] == 7).all()
    if arguments["own_slots"].numel():
        assert expected.abs().max() > 10 * tolerance  # zeros would fail, and so would rows without their codes:
        assert (expected - blind).abs().max() > 10 * tolerance


# Pages


@pytest.mark.parametrize("strided", [False, True])
def test_rows_go_to_their_slots_and_nowhere_else(strided: bool, implementation: str) -> None:
    device = DEVICE
    torch.manual_seed(0)
    projected = torch.randn(13, 300, device=device)
    k, v = (projected[:, a : a + w].unflatten(1, (2, -1)) for a, w in ((20, 80), (150, 48)))
    if not strided:
        k, v = k.contiguous(), v.contiguous()
    slots = torch.randperm(20, device=device)[:13]
    slots[[0, 5]] = -1
    k_pages, v_pages = torch.zeros(5, 4, 2, 40, device=device), torch.zeros(5, 4, 2, 24, device=device)
    implementations("paged_write")[implementation](k, v, slots, k_pages, v_pages)
    kept = slots >= 0
    assert torch.equal(k_pages.flatten(0, 1)[slots[kept]], k[kept])
    assert torch.equal(v_pages.flatten(0, 1)[slots[kept]], v[kept])
    for pages in k_pages, v_pages:
        assert int((pages.flatten(0, 1).abs().sum((1, 2)) > 0).sum()) == 11


# All of them

COMPILE_FOR_HOPPER = """
import torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from grkernels import registry

here = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
triton.runtime.driver.set_active(SimpleNamespace(**{k: lambda *_, v=v: v for k, v in here.items()}))
run = triton.JITFunction.run
triton.JITFunction.run = lambda self, *args, **options: run(self, *args, **{**options, "warmup": True})
for family in FAMILIES:
    bench = registry.bench(family)
    for dtype in (torch.bfloat16, torch.float32) if registry.family(family).writes else (torch.bfloat16,):
        shape = list(bench.SHAPES.values())[-1]
        registry.get(family, "triton").fn(**bench.inputs(shape, dtype=dtype, device="cpu", seed=0))
    print(family)
"""


def test_kernels_compile_for_hopper() -> None:
    """The interpreter takes Python that the compiler refuses; compiling, unlike running, needs no GPU."""
    folder = kept.output_of("triton_pages", f"FAMILIES = {FAMILIES}\n{COMPILE_FOR_HOPPER}", TRITON_INTERPRET="0")
    assert (folder / kept.OUTPUT).read_text().split() == list(FAMILIES)


SMALL = {"paged_write": (9, 2, 24, 4), "beam_attention": (2, 40, 9, 4, 2, 24, 2, 16)}


@pytest.mark.parametrize("family", SMALL)
def test_every_candidate_configuration_is_right(family: str) -> None:
    """The tuner may pick any of them: here every tile shape (warps and stages don't exist in the interpreter)."""
    module, bench = importlib.import_module(f"grkernels.{family}.triton"), registry.bench(family)
    shape = bench.Shape(*SMALL[family])
    given, others = (bench.inputs(shape, dtype=torch.float32, device=DEVICE, seed=seed) for seed in (0, 1))
    gate = KernelGate(module.VARIANT.reference, given, others, torch.float32, registry.family(family).writes)
    for config in {tuple((k, c[k]) for k in c if k not in ("warps", "stages")): c for c in module.CANDIDATES}.values():
        with tuning.forced(family, "triton", config):
            gate.check(lambda: module.VARIANT.fn(**given), 2.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bench_shapes_are_supported_and_bound_by_memory_or_not(family: str) -> None:
    bench = registry.bench(family)
    for shape in bench.SHAPES.values():
        cost = bench.cost(shape, "bf16")
        assert cost.bytes > 0 and (cost.flops > 0) == (family == "beam_attention")
        for name in registry.variants(family):
            arguments = {"device": "cuda", "dtype": "bf16", **bench.supports_args(shape)}
            assert registry.get(family, name).supports(**arguments) is None


def test_eager_kernels_that_wait_are_refused_in_graphs() -> None:
    for family in FAMILIES:
        supports = registry.get(family, "torch").supports
        assert supports(device="cuda", dtype="bf16", captured=False) is None
        assert "CUDA graph" in (supports(device="cuda", dtype="bf16", captured=True) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_in_a_graph(family: str) -> None:
    """Triton's kernels wait for nothing: a graph replays them."""
    bench, writes = registry.bench(family), registry.family(family).writes
    variant = registry.get(family, "triton")
    shape = list(bench.SHAPES.values())[-1]
    given, others = (bench.inputs(shape, dtype=torch.bfloat16, device=DEVICE, seed=seed) for seed in (0, 1))
    gate = KernelGate(variant.reference, given, others, torch.bfloat16, writes)
    gate.check(lambda: variant.fn(**given), 2.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = variant.fn(**given)

    def replay() -> Any:
        graph.replay()
        return made

    gate.check(replay, 2.0)
