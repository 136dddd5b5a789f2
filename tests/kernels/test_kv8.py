"""Pages in 8 bits: the numbers themselves, the variants that write and read them, and wrong pages that must fail.

Without a GPU, Triton's interpreter runs the Triton kernels, and they are compiled for Hopper.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from helpers import kept
from helpers.attention_cases import SMALL_TILES, Case, check
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grengines.numerics import relative_error
from grkernels import choice, registry, tuning
from grkernels.families import AUTO, Sizes
from grkernels.hstu_attention.keys import tuning_key
from grkernels.pages import EIGHT_BITS, dequantised, quantised
from grkernels.rounding import through_pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = list(EIGHT_BITS)
# Every finite number of e4m3: of all bytes, 0x7f and 0xff are NaN.
E4M3 = torch.tensor([b for b in range(256) if b & 127 != 127], dtype=torch.uint8).view(torch.float8_e4m3fn).double()
STEPS = {"int8": torch.arange(-127, 128).double(), "fp8": E4M3}


def rows(count: int = 400, dim: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, and in some of them numbers of very different sizes."""
    torch.manual_seed(0)
    x = torch.randn(count, dim) * torch.exp(3 * torch.randn(count, 1))
    x[::7] *= torch.exp(3 * torch.randn(dim))
    x[5] = 0
    return x.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_each_number_becomes_the_nearest_one(kind: str) -> None:
    """Against every number that there is, in fp64."""
    x = rows()
    numbers, scales = quantised(x, EIGHT_BITS[kind])
    assert numbers.dtype is EIGHT_BITS[kind] and scales.dtype is torch.float32 and scales.shape == x.shape[:1]
    largest = STEPS[kind].max()
    torch.testing.assert_close(scales.double() * largest, x.double().abs().amax(1), rtol=1e-6, atol=1e-29)
    wanted = x.double() / scales.double()[:, None]
    distance = (wanted - numbers.double()).abs()
    nearest = (wanted[..., None] - STEPS[kind]).abs().amin(-1)
    assert (distance <= nearest + 1e-4).all()  # ties, after the division's own rounding
    assert torch.equal(numbers[5].float(), torch.zeros(x.shape[1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_yardstick_rounds_as_pages_do(kind: str, dtype: torch.dtype) -> None:
    """Two computations without common code give the same bits."""
    x = rows(dtype=dtype)
    assert torch.equal(through_pages(x, kind), dequantised(*quantised(x, EIGHT_BITS[kind]), dtype))


def test_errors_are_those_of_the_documentation() -> None:
    torch.manual_seed(0)
    x = torch.randn(64 * 500, 128)
    for kind, each, together in (("int8", 0.0065, 0.0091), ("fp8", 0.026, 0.026)):
        assert relative_error(through_pages(x, kind), x) == pytest.approx(each, rel=0.05)
        page = x.view(500, -1)
        assert relative_error(through_pages(page, kind), page) == pytest.approx(together, rel=0.05)


def pages_of(kind: str, heads: int = 3, qk_dim: int = 24, v_dim: int = 40) -> dict[str, Tensor]:
    sizes = {"k_pages": qk_dim, "v_pages": v_dim}
    made = {name: torch.zeros(4, 16, heads, d, device=DEVICE).to(EIGHT_BITS[kind]) for name, d in sizes.items()}
    return made | {f"{x}_scales": torch.zeros(4, 16, heads, device=DEVICE) for x in "kv"}


def implementations() -> dict[str, Any]:
    variants = {name: registry.get("paged_write", name) for name in registry.variants("paged_write")}
    return {"reference": variants["torch"].reference} | {name: variant.fn for name, variant in variants.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_rows_go_to_their_slots_and_nowhere_else(kind: str, dtype: torch.dtype, name: str) -> None:
    projected = rows(37, 500, dtype).to(DEVICE)
    k, v = (projected[:, a : a + 3 * d].unflatten(1, (3, d)) for a, d in ((0, 24), (100, 40)))
    order = torch.randperm(64, device=DEVICE)
    slots = order[:37].clone()
    slots[[0, 9]] = -1
    pages = pages_of(kind)
    implementations()[name](k, v, slots, **pages)
    stored = slots >= 0
    for x, y in ("k", k), ("v", v):
        numbers, scales = pages[f"{x}_pages"].flatten(0, 1), pages[f"{x}_scales"].flatten(0, 1)
        back = dequantised(numbers[slots[stored]], scales[slots[stored]], torch.float32)
        assert relative_error(back, through_pages(y[stored].float(), kind)) < 1e-3  # a GPU may divide otherwise
        others = torch.cat([order[37:], order[[0, 9]]])
        assert not numbers[others].float().any() and not scales[others].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_an_append_changes_no_earlier_token(kind: str, name: str) -> None:
    """The new token is 1000 times as large: with one scale for the page, the earlier ones would vanish."""
    write, pages = implementations()[name], pages_of(kind)
    k, v = (torch.randn(8, 3, d, device=DEVICE) for d in (24, 40))
    slots = torch.arange(16, 24, device=DEVICE)
    write(k[:7], v[:7], slots[:7], **pages)
    before = {x: y.clone() for x, y in pages.items()}
    write(1000 * k[7:], 1000 * v[7:], slots[7:], **pages)
    for x, y in pages.items():
        assert torch.equal(y[1, :7].float(), before[x][1, :7].float())
        assert y[1, 7].float().any()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(0, 50), min_size=1, max_size=3))
    lengths[0] = max(lengths[0], 1)
    queries = [draw(st.integers(0, n)) for n in lengths]
    return Case(
        lengths,
        [draw(st.integers(0, n)) for n in queries] if draw(st.booleans()) else None,
        queries,
        heads=draw(st.integers(1, 2)),
        qk_dim=draw(st.sampled_from([8, 16, 24])),
        v_dim=draw(st.sampled_from([16, 40])),
        contextual=draw(st.sampled_from([0, 0, 3, 20])),
        window=draw(st.sampled_from([0, 0, 1, 20])),
        page=draw(st.sampled_from([8, 16])),
        stored=draw(st.sampled_from(KINDS)),
    )


def attention(name: str) -> Any:
    return registry.get("hstu_attention", name).fn


@examples(40)
@given(case=cases(), seed=st.integers(0, 2**20), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_eager_attention_over_random_pages(case: Case, seed: int, dtype: torch.dtype) -> None:
    check(attention("torch"), case.build(dtype, seed))


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernel itself is tested below")
@examples(25)
@given(case=cases(), seed=st.integers(0, 2**20), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_triton_over_random_pages(case: Case, seed: int, dtype: torch.dtype) -> None:
    with tuning.forced("hstu_attention", "triton", SMALL_TILES):
        check(attention("triton"), case.build(dtype, seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_with_options_of_other_models(kind: str, name: str) -> None:
    from grkernels.hstu_attention.extras import Extras

    case = Case([50, 37, 9], [8, 0, 4], [12, 7, 4], page=16, stored=kind).build(torch.float32)
    case.options["extras"] = Extras(target_group_size=4)
    check(attention(name), case)


WRONG = {
    "zeros": lambda o: {x: torch.zeros_like(o[x].float()).to(o[x].dtype) for x in ("k_pages", "v_pages")},
    "of other users": lambda o: {"page_table": o["page_table"].roll(1, 0)},
    "values without scales": lambda o: {"v_scales": torch.ones_like(o["v_scales"])},
    "keys without scales": lambda o: {"k_scales": torch.ones_like(o["k_scales"])},
    "scales of other tokens": lambda o: {x: o[x].roll(1, 1) for x in ("k_scales", "v_scales")},
    "scales of other heads": lambda o: {x: o[x].roll(1, 2) for x in ("k_scales", "v_scales")},
    "the scale of the largest token": lambda o: {x: o[x].amax((1, 2), True).expand_as(o[x]) for x in ("v_scales",)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_pages_fail_the_check(kind: str, wrong: str) -> None:
    case = Case([90, 70], [5, 0], [20, 7], page=16, stored=kind).build(torch.bfloat16)
    check(attention("torch"), case)
    with pytest.raises(AssertionError, match="rounding"):
        check(lambda **options: attention("torch")(**options | WRONG[wrong](options)), case)


def test_variants_that_can_not_read_8_bits_or_are_slow_at_it_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    sizes = {"qk_dim": 128, "v_dim": 128, "page": 64, "stored": "int8"}
    why = registry.refusal("hstu_attention", "compile", device="cuda", dtype="bf16", **sizes)
    assert why is not None and "pages in int8" in why and "supported here: torch, triton" in why
    for change in ({"dtype": "fp16"}, {"qk_dim": 96}):
        why = registry.refusal("hstu_attention", "cutlass", **{"device": "cuda", "dtype": "bf16", **sizes, **change})
        assert why is not None and "in heads of multiples of 64" in why
    asked, bytes_ = dict.fromkeys(("hstu_attention", "paged_write"), AUTO), Sizes(page=64, stored="int8", captured=True)
    for dtype in ("bf16", "fp16"):  # as measured, so nothing is timed
        made = choice.choose(asked, device="cuda", dtype=dtype, sizes=bytes_)
        assert made.variants == {"hstu_attention": "triton", "paged_write": "triton"}
        taken, cutlass = made.reasons["hstu_attention"].split("; ", 1)
        assert taken.startswith("triton: the first that can run in the order measured for sm90")
        assert cutlass.startswith("cutlass: over pages in 8 bits it is measured")
    wide = choice.choose(asked, device="cuda", dtype="bf16", sizes=Sizes(page=64, captured=True))
    named = choice.choose({"hstu_attention": "cutlass"}, device="cuda", dtype="bf16", sizes=bytes_)
    assert wide.variants["hstu_attention"] == named.variants["hstu_attention"] == "cutlass"
    assert named.reasons == {"hstu_attention": "cutlass: named in the configuration"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    for family in asked:
        supports = registry.get(family, "triton").supports
        assert "8.9" in (supports(device="cuda", dtype="bf16", **sizes | {"stored": "fp8"}) or "")
        assert supports(device="cuda", dtype="bf16", **sizes) is None


def test_no_table_of_other_pages_configures_a_launch() -> None:
    """Tiles that fit with pages in bf16 need not fit beside the bytes of these."""
    for kind in ("", *KINDS):
        case = Case([50], [8], [12], page=16, stored=kind).build(torch.float32, device=DEVICE)
        key = tuning_key(**case.options)
        assert key.rpartition("page=16")[2] == {"": "", "int8": " stored=int8", "fp8": " stored=float8_e4m3fn"}[kind]


COMPILE_FOR_HOPPER = """
import torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from grkernels import registry
from grkernels.hstu_attention.bench import Shape, inputs
from grkernels.pages import EIGHT_BITS

here = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
triton.runtime.driver.set_active(SimpleNamespace(**{k: lambda *_, v=v: v for k, v in here.items()}))
run = triton.JITFunction.run
triton.JITFunction.run = lambda self, *args, **options: run(self, *args, **{**options, "warmup": True})
for kind, dtype in EIGHT_BITS.items():
    x = torch.randn(9, 4, 128, dtype=torch.bfloat16)
    pages = [torch.zeros(3, 64, 4, 128).to(dtype)] * 2 + [torch.zeros(3, 64, 4)] * 2
    registry.get("paged_write", "triton").fn(x, x, torch.arange(9), *pages)
    given = inputs(Shape(1, 40, 8, 90, page=64, stored=kind), dtype=torch.bfloat16, device="cpu", seed=0)
    registry.get("hstu_attention", "triton").fn(**given)
    print(kind)
"""


def test_kernels_compile_for_hopper() -> None:
    """The interpreter takes Python that the compiler refuses; compiling, unlike running, needs no GPU."""
    folder = kept.output_of("triton_eight_bits", COMPILE_FOR_HOPPER, TRITON_INTERPRET="0")
    assert (folder / kept.OUTPUT).read_text().split() == KINDS


COMPILE_CUTE = """
import sys
from pathlib import Path
import torch
from grkernels.cute_common import ELEMENTS, compile_kernel
from grkernels.hstu_attention.sm90.kernel import Attention
from grkernels.hstu_attention.sm90.sizes import Tiles
for kind, dim, tiles, page in (
    ("int8", 256, Tiles(128, 64, 2, False, False), 64),
    ("fp8", 128, Tiles(64, 128, 2, False, False, True), 16),
):
    kernel = Attention(ELEMENTS[torch.bfloat16], dim, dim, tiles, page, kind)
    made = compile_kernel(kernel, options="--keep-ptx --keep-cubin --dump-dir " + sys.argv[1])
    Path(sys.argv[1], f"{kind}.ptx").write_text(made.__ptx__)
"""


@pytest.mark.skipif(find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed")
def test_cute_kernels_compile_for_hopper() -> None:
    folder = kept.output_of("cute_eight_bits", COMPILE_CUTE, CUTE_DSL_ARCH="sm_90a")
    for kind in KINDS:
        ptx = (folder / f"{kind}.ptx").read_text()
        wanted = ("wgmma.mma_async", "cp.async.bulk.tensor", "cp.async.cg.shared.global", "fence.proxy.async")
        assert all(words in ptx for words in wanted)


def test_the_arithmetic_of_the_loader_on_hopper_is_exact() -> None:
    """sm90/eight_bits.py makes bf16 of bytes by their bits: here the same steps for every byte."""

    def bf16(bits: Tensor) -> Tensor:
        return bits.to(torch.int16).view(torch.bfloat16).double()

    byte = torch.arange(256)
    whole = byte.to(torch.uint8).view(torch.int8).double()
    assert torch.equal(bf16(0x4300 | (byte & 0x7F)) + bf16((0xC300 | (byte & 0x80)) - 0x10000), whole)
    e4m3, upper = byte.to(torch.uint8).view(torch.float8_e4m3fn).double(), byte << 8
    finite = ~e4m3.isnan()
    shifted = (upper >> 4 & 0x07F0) | (upper & 0x8000)
    shifted = torch.where(shifted >= 0x8000, shifted - 0x10000, shifted)
    assert torch.equal((bf16(shifted) * bf16(torch.tensor(0x7B80)))[finite], e4m3[finite])


# On a GPU.

ON_GPU = [
    Case([900, 800, 300, 5], [100, 20, 0, 5], [350, 100, 300, 5], page=64),
    Case([900, 801, 300], None, [1, 16, 1], page=128),
    Case([900, 800, 300], [3, 2, 0], [20, 17, 1], page=32, contextual=4, window=100),
    Case([700, 300, 2, 130], [5, 30, 1, 0], [5, 30, 1, 129], page=16),
    Case([5000, 3], [130, 0], [200, 3], page=64, heads=1),
    Case([3000], [40], [700], page=64, contextual=3, window=900, heads=1),
]
SIZES = [(128, 128), (256, 256), (32, 32), (64, 128), (192, 96), (80, 48)]


def readers(kind: str, qk_dim: int, v_dim: int) -> list[str]:
    """The variants that read such pages on this GPU and then compute in the dtype."""
    sizes = {"qk_dim": qk_dim, "v_dim": v_dim, "page": 64, "stored": kind}
    names = [n for n in registry.variants("hstu_attention") if not registry.get("hstu_attention", n).yardstick]
    return [n for n in names if not registry.unsupported("hstu_attention", n, device="cuda", dtype="bf16", **sizes)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention_on_a_gpu(kind: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    for i, case in enumerate(ON_GPU):
        case.qk_dim, case.v_dim, case.stored = *sizes, kind
        built = case.build(dtype, seed=i, device="cuda")
        for name in readers(kind, *sizes):
            check(attention(name), built)
            for wrong in ("zeros", "scales of other tokens"):
                with pytest.raises(AssertionError, match="rounding"):
                    check(
                        lambda name=name, wrong=wrong, **options: attention(name)(**options | WRONG[wrong](options)),
                        built,
                    )


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("int8", (128, 128)),
        ("int8", (256, 256)),
        ("fp8", (256, 256)),
        ("fp8", (64, 128)),
        ("int8", (192, 64)),
    ],
)
def test_the_loader_of_hopper(kind: str, sizes: tuple[int, int]) -> None:
    """CuTe's kernel by its function, whether or not `supports` offers it; once with every candidate of the tuner."""
    cutlass = pytest.importorskip("grkernels.hstu_attention.cutlass")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an NVIDIA GPU of compute capability 9.0")
    for i, case in enumerate(ON_GPU[:5]):
        case.qk_dim, case.v_dim, case.stored = *sizes, kind
        built = case.build(torch.bfloat16, seed=i, device="cuda")
        check(cutlass.hstu_attention, built)
        assert torch.equal(cutlass.hstu_attention(**built.options), cutlass.hstu_attention(**built.options))
        for wrong in ("zeros", "scales of other tokens", "values without scales"):
            with pytest.raises(AssertionError, match="rounding"):
                check(lambda wrong=wrong, **o: cutlass.hstu_attention(**o | WRONG[wrong](o)), built)
    candidates = [config for config in cutlass.CANDIDATES if not config["dynamic"]]
    for config in candidates if (kind, sizes) == ("int8", (256, 256)) else []:
        with tuning.forced("hstu_attention", "cutlass", config):
            try:
                check(cutlass.hstu_attention, built)
            except ValueError as e:  # tiles that don't fit
                assert str(e).startswith(("m=", "n="))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_graph(kind: str) -> None:
    """New tokens are stored and read in one graph; a replay with other tokens stores and reads those."""
    write = registry.get("paged_write", "triton").fn
    case = Case([700, 300], [200, 0], [250, 40], page=64, qk_dim=64, v_dim=64, stored=kind)
    options = case.build(torch.bfloat16, device="cuda").options
    pages = {x: options[x] for x in ("k_pages", "v_pages", "k_scales", "v_scales")}
    k, v = (torch.randn(450 + 260, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table, lengths = options["page_table"].long(), options["paged_lengths"].tolist()
    slots = torch.cat([table[b, torch.arange(n, device="cuda") // 64] * 64 + torch.arange(n, device="cuda") % 64
                       for b, n in enumerate(lengths)])  # fmt: skip
    for name in readers(kind, 64, 64):
        if name == "torch":
            continue
        graph = torch.cuda.CUDAGraph()
        for captured in (False, True):
            with torch.cuda.graph(graph) if captured else torch.inference_mode():
                write(k, v, slots, **pages)
                out = attention(name)(**options)
        for seed in range(2):
            torch.manual_seed(seed)
            k.normal_()
            v.normal_()
            for x in pages.values():
                x.zero_()
            graph.replay()
            replayed = out.clone()
            check(lambda replayed=replayed, **_: replayed, case)
