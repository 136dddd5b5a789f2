"""Triton's, CuTe's and the compiled HSTU attention against the fp32 reference, contiguous and paged.

Without a GPU, Triton's interpreter runs the Triton kernel, and the CuTe kernels are compiled for Hopper.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from helpers import kept
from helpers.attention_cases import SMALL_TILES, Case, check
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grengines.numerics import relative_error
from grkernels import registry, tuning
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.hstu_attention.torch import hstu_attention as eager

GPU = torch.cuda.is_available()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(0, 50), min_size=1, max_size=3))
    lengths[0] = max(lengths[0], 1)
    page = draw(st.sampled_from([0, 0, 8, 16]))
    queries = [draw(st.integers(0, n)) for n in lengths] if page or draw(st.booleans()) else None
    most = lengths if queries is None or not page else queries  # candidates are never in pages
    return Case(
        lengths,
        [draw(st.integers(0, n)) for n in most] if draw(st.booleans()) else None,
        queries,
        heads=draw(st.integers(1, 2)),
        qk_dim=draw(st.sampled_from([8, 16, 24])),
        v_dim=draw(st.sampled_from([16, 40])),
        contextual=draw(st.sampled_from([0, 0, 3, 20])),
        window=draw(st.sampled_from([0, 0, 1, 20])),
        page=page,
    )


@examples(40)
@given(case=cases(), seed=st.integers(0, 2**20))
def test_paged_eager_torch_equals_the_reference(case: Case, seed: int) -> None:
    check(eager, case.build(torch.float32, seed))


@pytest.mark.skipif(GPU, reason="on a GPU the kernel itself is tested below")
@examples(25)
@given(case=cases(), seed=st.integers(0, 2**20), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_triton_in_the_interpreter(case: Case, seed: int, dtype: torch.dtype) -> None:
    with tuning.forced("hstu_attention", "triton", SMALL_TILES):
        check(registry.get("hstu_attention", "triton").fn, case.build(dtype, seed))


def test_compiled_on_this_machine() -> None:
    variant = registry.get("hstu_attention", "compile")
    reason = variant.supports(device="cpu", dtype="fp32")
    if reason is not None:
        pytest.skip(reason)
    check(variant.fn, Case([30, 0, 9], [4, 0, 2]).build(torch.float32))


def test_the_graphs_that_are_compiled_do_not_grow_with_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own tracing and guards, which refuse a ninth graph; only the machine code is left out."""
    from grkernels.hstu_attention import compile as module

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    module.compiled.cache_clear()
    torch.compiler.reset()
    rng = np.random.default_rng(0)
    for call in range(30):
        lengths = rng.integers(1, 60, size=[1, 2, 8, 64][call % 4]).tolist()
        if call % 2:
            case = Case(lengths, queries=[int(rng.integers(1, n + 1)) for n in lengths], page=16)
        else:
            case = Case(lengths, [int(rng.integers(0, n + 1)) for n in lengths])
        check(module.hstu_attention, case.build(torch.float32, seed=call))
    module.compiled.cache_clear()


def test_wrong_outputs_fail_the_check() -> None:
    case = Case([40, 7], [5, 0]).build(torch.bfloat16)

    def shifted(**options: Any) -> Tensor:
        return eager(**options).roll(1, 0)

    def stale(**options: Any) -> Tensor:
        return eager(**Case([40, 7], [5, 0]).build(torch.bfloat16, seed=1).options)

    def unwritten(**options: Any) -> Tensor:
        return torch.full_like(eager(**options), float("nan"))

    check(eager, case)
    for wrong in (lambda **o: torch.zeros_like(eager(**o)), shifted, stale, unwritten):
        with pytest.raises(AssertionError):
            check(wrong, case)
    for change in ({"num_targets": None}, {"max_attn_len": 20}, {"contextual_seq_len": 3}):
        with pytest.raises(AssertionError):
            check(lambda change=change, **o: eager(**{**o, **change}), case)


def test_refusals_name_the_variants_that_would_do() -> None:
    sizes = {"qk_dim": 40, "v_dim": 16}
    refused = registry.refusal("hstu_attention", "cutlass", device="cpu", dtype="bf16", **sizes)
    assert refused is not None and refused.startswith("kernel.hstu_attention=cutlass: ")
    assert "torch" in refused.rpartition("supported here: ")[2]
    assert registry.refusal("hstu_attention", "torch", device="cpu", dtype="bf16", **sizes) is None
    assert "at most 256" in (
        registry.refusal("hstu_attention", "triton", device="cuda", dtype="bf16", qk_dim=512, v_dim=16) or ""
    )


COMPILE = """
import sys
from pathlib import Path
import torch
from grkernels.cute_common import ELEMENTS, compile_kernel
from grkernels.hstu_attention.sm90.kernel import Attention
from grkernels.hstu_attention.sm90.sizes import Tiles
for number, (dtype, qk_dim, v_dim, tiles, page) in enumerate((
    (torch.bfloat16, 128, 128, Tiles(128, 128, 2, True, True), 0),
    (torch.float16, 256, 256, Tiles(128, 64, 2, False, False), 32),
    (torch.bfloat16, 256, 48, Tiles(64, 64, 2, False, False, True), 64),
)):
    kernel = Attention(ELEMENTS[dtype], qk_dim, v_dim, tiles, page)
    made = compile_kernel(kernel, options="--keep-ptx --keep-cubin --dump-dir " + sys.argv[1])
    Path(sys.argv[1], f"{number}.ptx").write_text(made.__ptx__)
    print(len(made.__cubin__))
"""


@pytest.mark.skipif(find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed")
def test_cute_kernels_compile_for_hopper() -> None:
    folder = kept.output_of("cute_attention", COMPILE, CUTE_DSL_ARCH="sm_90a")
    for number, cubin_bytes in enumerate((folder / kept.OUTPUT).read_text().split()):
        ptx = (folder / f"{number}.ptx").read_text()
        assert all(wanted in ptx for wanted in ("wgmma.mma_async", "cp.async.bulk.tensor", "tanh.approx"))
        assert int(cubin_bytes) > 10_000
    assert number == 2


def names(signature: Any, prefix: str = "") -> list[str]:
    """Fields of nested named tuples, flattened as the launcher takes them: "q.data", ..."""
    if not hasattr(signature, "_fields"):
        return [prefix]
    fields = get_type_hints(signature).items()
    return [name for field, kind in fields for name in names(kind, f"{prefix}.{field}".strip("."))]


@pytest.mark.skipif(find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed")
def test_cute_launches_with_the_values_that_its_signature_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are positional, for speed. On a GPU the results depend on them; here each is compared with its name."""
    from grkernels import cute_common
    from grkernels.hstu_attention import cutlass
    from grkernels.hstu_attention.sm90.kernel import Arguments

    launches: list[tuple[float, ...]] = []
    monkeypatch.setattr(cute_common, "launcher", lambda kernel: lambda *values: launches.append(values))
    monkeypatch.setattr(cute_common, "processors", lambda device: 132)
    monkeypatch.setattr(cute_common, "stream", lambda device: 99)
    cutlass.compiled.cache_clear()
    case = Case([900, 800, 300], [3, 2, 0], [20, 17, 1], page=32, contextual=4, window=100).build(torch.bfloat16)
    o = case.options
    with tuning.forced("hstu_attention", "cutlass", {**cutlass.CANDIDATES[0], "m": 64, "n": 64}):
        out = cutlass.hstu_attention(**o)
    cutlass.compiled.cache_clear()
    *values, stream = launches[0]
    launched = dict(zip(names(Arguments), values, strict=True))
    assert stream == 99 and launched.pop("counter") + 16 == launched.pop("sharing.arrivals") > 16
    assert launched.pop("sharing.partials") and launched == {
        **{f"{x}.data": o[x].data_ptr() for x in ("q", "k", "v", "k_pages", "v_pages")},
        **{f"{x}.stride": o[x].stride(0) for x in ("q", "k", "v")},
        **{f"{x}.head_stride": o[x].stride(-2) for x in ("q", "k", "v", "k_pages", "v_pages")},
        **{f"{x}.page_stride": o[x].stride(0) for x in ("k_pages", "v_pages")},
        **{f"{x}.slot_stride": o[x].stride(1) for x in ("k_pages", "v_pages")},
        "kv_rows": o["k"].shape[0],
        "output.data": out.data_ptr(),
        "output.scale": 1 / 64,
        "batch.q_offsets": o["q_offsets"].data_ptr(),
        "batch.kv_offsets": o["kv_offsets"].data_ptr(),
        "batch.num_targets": o["num_targets"].data_ptr(),
        "batch.q_rows": o["q"].shape[0],
        "batch.heads": 2,
        "batch.sequences": 3,
        "batch.limits.contextual": 4,
        "batch.limits.window": 100,
        "batch.has_targets": 1,
        "k_pages.scales": 0,
        "v_pages.scales": 0,
        "pages": o["k_pages"].shape[0],
        "page_table.pages": o["page_table"].data_ptr(),
        "page_table.stride": o["page_table"].stride(0),
        "page_table.lengths": o["paged_lengths"].data_ptr(),
        "sharing.splits": 3,  # 15 tiles of 64 keys, at least 4 each
        "half_alpha": o["alpha"] / 2,
        "ctas": 18,  # 3 sequences, 2 heads, 3 shares
        **{f"scales.{x}": 0 for x in ("rows", "blocks", "count")},
    }


# On a GPU.

ON_GPU = [
    Case([500, 1, 0, 333, 128]),
    Case([700, 1, 0, 650, 129], [200, 1, 0, 0, 129]),
    Case([700, 300, 64], [200, 100, 3], contextual=5, window=64),
    Case([700, 300, 64], contextual=70),
    Case([700, 300, 2], [5, 300, 1], contextual=2, window=1),
    Case([900, 800, 1, 0, 300], [300, 20, 1, 0, 10], [350, 100, 1, 0, 300]),
    Case([900, 640, 77], None, [1, 16, 77]),
    Case([900, 800, 300, 5], [100, 20, 0, 5], [350, 100, 300, 5], page=64),
    Case([900, 801, 300], None, [1, 16, 1], page=128),
    Case([900, 800, 300], [3, 2, 0], [20, 17, 1], page=32, contextual=4, window=100),
    Case([100] * 300, [10] * 300, heads=1),
    # Few rows over many keys: several CTAs share an item.
    Case([6000, 2100], None, [1, 70]),
    Case([5000, 3], [130, 0], [200, 3], page=64, heads=1),
    Case([3000], [40], [700], contextual=3, window=900, heads=1),
]
SIZES = [(128, 128), (256, 256), (32, 32), (64, 128), (192, 96), (80, 48)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cutlass"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_on_a_gpu(name: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    variant = registry.get("hstu_attention", name)
    for i, case in enumerate(ON_GPU):
        case.qk_dim, case.v_dim = sizes
        built = case.build(dtype, seed=i, device="cuda")
        check(variant.fn, built)
        # Whoever of those that share an item ends last, sums are added in the same order.
        assert torch.equal(variant.fn(**built.options), variant.fn(**built.options))


@pytest.mark.gpu
def test_compiled_on_a_gpu() -> None:
    fn = registry.get("hstu_attention", "compile").fn
    check(fn, Case([300, 1, 0, 77], [20, 1, 0, 0], qk_dim=64, v_dim=32).build(torch.bfloat16, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cutlass"])
def test_one_long_sequence_beside_many_short_ones(name: str) -> None:
    lengths = [300] * 40 + [16384] + [1, 0] * 20
    case = Case(lengths, [min(n, 50) for n in lengths], heads=1, qk_dim=128, v_dim=128).build(
        torch.bfloat16, device="cuda"
    )
    check(registry.get("hstu_attention", name).fn, case)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cutlass"])
def test_offsets_past_the_int32_range(name: str) -> None:
    """Views whose last rows lie more than 2^31 elements after the first."""
    rows, width = 70_000, 32_768
    fused = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    fused[:, :192].normal_()
    q, k, v = (fused[:, 64 * i : 64 * (i + 1)].unflatten(1, (1, 64)) for i in range(3))
    ends = torch.tensor([0, rows - 200, rows], device="cuda")
    options = {"q": q, "k": k, "v": v, "q_offsets": ends, "kv_offsets": ends, "num_targets": None, "max_kv_len": rows}
    options |= {"max_q_len": rows, "scaling_seqlen": 64, "alpha": 0.125, "max_attn_len": 32}
    out = registry.get("hstu_attention", name).fn(**options)[-200:]
    tail = {name: x[-200:].contiguous() for name, x in (("q", q), ("k", k), ("v", v))}
    own = torch.tensor([0, 200], device="cuda")
    expected = reference(
        **{**options, **tail, "q_offsets": own, "kv_offsets": own, "max_q_len": 200, "max_kv_len": 200}
    )
    assert relative_error(out, expected) < 8e-3  # bf16 rounds P and the result: 2^-9 each, measured 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cutlass"])
def test_in_a_graph(name: str) -> None:
    fn = registry.get("hstu_attention", name).fn
    case = Case([700, 1, 0, 650], [200, 1, 0, 0], qk_dim=64, v_dim=64).build(torch.bfloat16, device="cuda")
    direct = fn(**case.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fn(**case.options)
    for _ in range(2):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, direct)
