"""The AOTInductor engine: its package's answers, what it refuses, its errors; with Triton inside on a GPU."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import kept
from helpers.checkout import ROOT
from helpers.hstu_oracle import make_requests
from torch.utils.flop_counter import FlopCounterMode

from grengines import registry
from grengines.aoti import package
from grengines.aoti.config import AOTIEngineConfig
from grengines.aoti.engine import AOTIEngine
from grengines.aoti.package import Facts, Inputs
from grengines.aoti.paged import PagedRanker
from grengines.api import Catalogue, RankResult, Request, Setup, Tier, UnavailableError
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.cache.places import PagedBatch
from grengines.cache.pool import PagePool
from grengines.export.attention import adapted
from grengines.export.module import ExportedRanker
from grengines.fallback import OutsideError
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import build_model
from grengines.models.hstu.reference import RankingReference, zero_attention
from grengines.numerics import relative_error
from grengines.runtime.batch import Encoding, pack
from grengines.runtime.profile import Sizes, check, profiles
from grkernels import capabilities
from grkernels import registry as kernel_registry
from grkernels.config import KernelConfig
from grkernels.hstu_attention import torch as eager_attention
from grkernels.operators import Operators
from grkernels.pages import EIGHT_BITS

CATALOGUE = Catalogue(num_users=20, num_items=300, num_actions=4)
# Every option of the model that changes what is traced. One layer alone would never read what another wrote in place.
MODEL = HSTUConfig(
    layers=2, embedding_dim=32, heads=2, qk_dim=16, v_dim=8, scaling_seqlen=128, contextual_seq_len=2,
    max_attn_len=20, interaction=True,
)  # fmt: skip
pytestmark = pytest.mark.timeout(900)  # a package takes a minute of a core, which other processes may use as well
NO_COMPILER = pytest.mark.skipif(capabilities.compiler() is not None, reason="AOTInductor needs a C++ compiler")


def requests_of(lengths: list[int], candidates: list[int], seed: int = 0) -> list[Request]:
    return make_requests(np.random.default_rng(seed), CATALOGUE, lengths, candidates)


def engine(
    model: HSTUConfig = MODEL,
    seed: int = 5,
    kernel: str = "torch",
    cache: CacheConfig | PagedCacheConfig = CacheConfig(),  # noqa: B008
    **options: Any,
) -> AOTIEngine:
    config = AOTIEngineConfig(**{"device": "cpu", "cpu_threads": 1, **options})
    return AOTIEngine(config, Setup(model, KernelConfig(kernel).requested(), CATALOGUE, seed, cache))


def error(result: RankResult, expected: list[Any]) -> float:
    return relative_error(np.concatenate(result.scores), np.concatenate(expected))


# The packages of the last run, as one takes a minute to build. Their names have a digest of their sources.
KEPT = ROOT / ".pytest_cache" / "packages"
SAMPLE = requests_of([3, 37, 12, 44, 20], [6, 1, 9, 8, 5])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Share a cache folder among these tests, and set small tiles, so that attention loops over two of them.

    Each tile of each layer takes seconds to trace and compile. The second one begins at another row and is not full.
    """
    KEPT.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        (folder / "packages").mkdir()
        for made in KEPT.glob("*/*.pt2"):
            shutil.copy(made, folder / "packages")
        patch.setenv("GRBENCH_CACHE", str(folder))
        patch.setattr(eager_attention, "TILE_BYTES", tile_bytes(rows=34))
        yield folder


def tile_bytes(rows: int) -> int:
    """Return the memory of a tile of these rows, for four requests of up to 64 tokens."""
    return rows * 4 * MODEL.heads * 64 * eager_attention.BYTES_A_SCORE


def keep(made: AOTIEngine, kind: str) -> None:
    """Keep the package of an engine for the next run, and no older one of its kind."""
    shutil.rmtree(KEPT / kind, ignore_errors=True)
    (KEPT / kind).mkdir()
    shutil.copy(made.actual()["package"], KEPT / kind)


@pytest.fixture(scope="module")
def ready(cache: Path) -> Iterator[AOTIEngine]:
    """An engine with the package for whole histories."""
    made = engine()
    made.prepare(SAMPLE, 4)
    keep(made, "whole")
    yield made
    made.close()


PAGED_MODEL = dataclasses.replace(MODEL, contextual_seq_len=0)
PAGES = PagedCacheConfig(page=16, memory_gb=1e-3, host_gb=1e-3, admit_visit=1, host_admit_visit=1)


EVENTS = 58  # of each user; with six candidates, 64 tokens


def visits(events: int, users: Sequence[int]) -> list[Request]:
    """Requests of users, who each have the first `events` of their events."""
    whole = requests_of([EVENTS] * len(users), [5, 3, 6, 4][: len(users)], seed=9)
    history = [f for f in Request.__dataclass_fields__ if f.startswith("history_")]
    return [
        dataclasses.replace(r, user_id=user, **{f: getattr(r, f)[:events] for f in history})
        for r, user in zip(whole, users, strict=True)
    ]


@pytest.fixture(scope="module")
def paged(cache: Path) -> Iterator[AOTIEngine]:
    """An engine with the package that appends to pages, in two tiles."""
    made = engine(PAGED_MODEL, cache=PAGES)
    made.prepare(visits(EVENTS, [1, 2, 3, 4]), 4)
    keep(made, "paged")
    yield made
    made.close()


@NO_COMPILER
def test_a_returning_user_is_answered_from_pages(paged: AOTIEngine) -> None:
    reference = RankingReference(PAGED_MODEL, CATALOGUE, 5, "cpu")
    paged.reset_cache()
    for events, users, cached in (
        (30, [1, 2], [0, 0]),
        (45, [1, 2], [30, 30]),  # fifteen new events
        (45, [1, 2], [45, 45]),  # candidates alone
        (50, [1, 2, 3, 4], [45, 45, 0, 0]),
        (EVENTS, [1], [50]),
    ):
        requests = visits(events, users)
        result = paged.rank(requests)
        assert error(result, reference.scores(requests)) < 1e-5
        assert [c.tokens for c in result.cached] == cached
        assert result.details["cache_faults"] == 0
    [stranger] = visits(0, [5])
    alone = [dataclasses.replace(stranger, candidates=stranger.candidates[:1])]  # one token, fewer than tiles
    assert paged.actual()["attention_tiles"] == 2
    assert error(paged.rank(alone), reference.scores(alone)) < 1e-5
    assert [paged.tier_of(user) for user in (1, 4, 6)] == [Tier.DEVICE, Tier.DEVICE, Tier.NONE]
    assert paged.state_bytes()[Tier.DEVICE] > paged.state_bytes()[Tier.HOST] == 0
    paged.reset_cache(keep=Tier.HOST)
    result = paged.rank(visits(EVENTS, [1, 2]))
    assert error(result, reference.scores(visits(EVENTS, [1, 2]))) < 1e-5
    assert result.details["cache_host_hits"] == 2
    assert paged.user_cache is not None
    with torch.inference_mode():
        paged.user_cache.states.pool.all_k.zero_()  # the check can fail
    assert error(paged.rank(visits(EVENTS, [1])), reference.scores(visits(EVENTS, [1]))) > 1e-3
    actual = paged.actual()
    assert actual["cache"]["page"] == 16 and actual["cache_pages"] > 0 and actual["kernels"]["paged_write"] == "torch"


@NO_COMPILER
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_package_reads_pages_in_eight_bits(cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the error of the reference whose history went through such pages; wrong scales and stale pages fail.

    One layer in one tile takes half the time to compile. Which scales each layer gets is tested without a compiler.
    """
    monkeypatch.setattr(eager_attention, "TILE_BYTES", tile_bytes(rows=64))
    model = dataclasses.replace(PAGED_MODEL, layers=1, interaction=False)
    pages = dataclasses.replace(PAGES, precision=kind)
    made = engine(model, cache=pages)
    made.prepare(visits(EVENTS, [1, 2, 3, 4]), 4)
    keep(made, f"paged_{kind}")
    reference = RankingReference(model, CATALOGUE, 5, "cpu")
    made.reset_cache()
    made.rank(visits(30, [1, 2]))
    for events, users in ((45, [1, 2]), (45, [1, 2]), (EVENTS, [1, 2, 3])):  # new events, candidates alone, a new user
        requests = visits(events, users)
        expected = reference.scores(requests)
        rounding = relative_error(np.concatenate(reference.scores(requests, stored=kind)), np.concatenate(expected))
        result = made.rank(requests)
        assert result.cached[0].tokens and 1e-5 < error(result, expected) < 2 * rounding < 0.1, (events, rounding)
    made.reset_cache(keep=Tier.HOST)
    again = made.rank(requests)
    assert again.details["cache_host_hits"] == 3 and error(again, expected) < 2 * rounding
    assert made.user_cache is not None and made.actual()["cache_precision"] == kind
    pool = made.user_cache.states.pool
    assert pool.all_k.dtype.itemsize == pool.all_v.dtype.itemsize == 1
    with torch.inference_mode():
        for wrong in (lambda its: its.roll(1, 3), torch.ones_like, torch.zeros_like):
            for scales in pool.all_scales:
                right = scales.clone()
                scales.copy_(wrong(scales))
                assert error(made.rank(requests), expected) > 2 * rounding
                scales.copy_(right)
    assert error(made.rank(requests), expected) < 2 * rounding
    path = made.actual()["package"]
    made.close()
    other = engine(model, cache=PAGES, package=path)
    with pytest.raises(ValueError, match=f"made for stored {kind}, this run has "):
        other.prepare(visits(EVENTS, [1, 2, 3, 4]), 4)
    other.close()


@NO_COMPILER
def test_a_batch_that_fails_in_the_cache_is_answered_without_it(
    paged: AOTIEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(requests: Sequence[Request]) -> None:
        raise RuntimeError("no index")

    paged.reset_cache()
    paged.rank(visits(30, [1, 2]))
    monkeypatch.setattr(paged.user_cache, "queue", broken)
    requests = visits(40, [1, 2])
    result = paged.rank(requests)
    assert error(result, RankingReference(PAGED_MODEL, CATALOGUE, 5, "cpu").scores(requests)) < 1e-5
    assert (result.details["cache_faults"], result.details["cache_misses"]) == (1, 2)


@NO_COMPILER
def test_a_package_for_whole_histories_does_not_append(ready: AOTIEngine) -> None:
    made = engine(cache=PAGES, package=ready.actual()["package"])
    with pytest.raises(ValueError, match="made for page 0, this run has 16"):
        made.prepare(SAMPLE, 4)


@NO_COMPILER
def test_answers_equal_the_reference_at_any_lengths(ready: AOTIEngine) -> None:
    reference = RankingReference(MODEL, CATALOGUE, 5, "cpu")
    assert ready.actual()["attention_tiles"] == 2
    for requests in (
        SAMPLE[:4],
        SAMPLE[:1],  # one sequence, unlike every example of the export
        requests_of([0, 1, 45, 0], [1, 1, 9, 2], seed=1),
        requests_of([0], [1], seed=2),  # contextual tokens and a candidate: tiles of one row
    ):
        result = ready.rank(requests)
        expected = reference.scores(requests)
        assert error(result, expected) < 1e-5
        assert [s.shape for s in result.scores] == [s.shape for s in expected]
        blind = reference.scores(requests, attention=zero_attention)
        assert relative_error(np.concatenate(blind), np.concatenate(expected)) > 1e-3  # the check can fail


@NO_COMPILER
def test_a_second_engine_loads_the_package_without_the_model(
    ready: AOTIEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr("grengines.aoti.engine.build_model", never)
    second = engine(package=ready.actual()["package"])
    for made in (engine(), second):
        made.prepare(SAMPLE, 4)
        assert error(made.rank(SAMPLE[:3]), ready.rank(SAMPLE[:3]).scores) == 0.0
        actual = made.actual()
        assert actual["package_build_s"] == 0 and actual["package_bytes"] > 10_000
        assert actual["kernels"]["hstu_attention"] == "torch" and actual["built_for"]["batch"] == 4
        made.close()
    with pytest.raises(RuntimeError, match="not prepared"):
        second.rank(SAMPLE[:1])


@NO_COMPILER
def test_a_batch_that_the_package_was_not_built_for_is_refused_before_it_runs(ready: AOTIEngine) -> None:
    for requests, what in (
        (SAMPLE, "requests=5, the engine is built for at most 4"),
        (requests_of([80], [3]), "longest=85, the engine is built for at most 64"),
        (requests_of([3], [17]), ""),
        (requests_of([3], [0]), "no candidates"),
    ):
        if what:
            with pytest.raises(OutsideError, match=what):
                ready.rank(requests)
        else:
            ready.rank(requests)  # more candidates than any request had, but no more than a batch may have


@NO_COMPILER
def test_the_next_engine_of_a_chain_answers_what_the_package_was_not_built_for(ready: AOTIEngine) -> None:
    config = AOTIEngineConfig(device="cpu", cpu_threads=1, fallback=["hstu"])
    chain = registry.build(config, MODEL, KernelConfig(), CATALOGUE, 5)
    chain.prepare(SAMPLE, 4)
    outside = requests_of([80], [3])
    expected = RankingReference(MODEL, CATALOGUE, 5, "cpu").scores(outside)
    assert error(chain.rank(outside), expected) < 1e-5  # type: ignore[attr-defined]
    assert chain.rank(SAMPLE[:1]).details["fallback_requests"] == 0  # type: ignore[attr-defined]
    assert chain.actual()["fallback"]["hstu"]["answered"] == 1
    chain.close()


@NO_COMPILER
def test_a_chain_is_prepared_with_a_package_that_is_too_small_for_its_largest_batch(ready: AOTIEngine) -> None:
    outside = requests_of([80], [3])
    given: dict[str, Any] = {"device": "cpu", "cpu_threads": 1, "package": ready.actual()["package"]}
    alone = registry.build(AOTIEngineConfig(**given), MODEL, KernelConfig(), CATALOGUE, 5)
    with pytest.raises(OutsideError, match="longest=85, the engine is built for at most 64"):
        alone.prepare(outside, 4)
    alone.close()
    chain = registry.build(AOTIEngineConfig(**given, fallback=["hstu"]), MODEL, KernelConfig(), CATALOGUE, 5)
    chain.prepare(outside, 4)
    assert chain.rank(outside).details["fallback_requests"] == 1  # type: ignore[attr-defined]
    chain.close()


@NO_COMPILER
def test_a_package_that_does_not_belong_here_is_one_line_that_says_what_to_do(
    ready: AOTIEngine, tmp_path: Path
) -> None:
    good = Path(ready.actual()["package"])
    cut, foreign, flipped = (tmp_path / name for name in ("cut.pt2", "foreign.pt2", "flipped.pt2"))
    cut.write_bytes(good.read_bytes()[:-5000])
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("x/wrapper_metadata.json", "{}")
    shutil.copy(good, flipped)
    with zipfile.ZipFile(good) as archive:
        code = next(i for i in archive.infolist() if i.filename.endswith(".so"))
    with flipped.open("r+b") as f:
        f.seek(code.header_offset + code.file_size // 2)
        f.write(bytes(16))

    def complaint(made: AOTIEngine) -> str:
        with pytest.raises(ValueError) as e:
            made.prepare(SAMPLE, 4)
        made.close()
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "no such package; set engine.package=null" in complaint(engine(package=str(tmp_path / "none.pt2")))
    for bad in (cut, foreign, flipped):
        assert f"{bad}: not a complete package" in complaint(engine(package=str(bad)))
    assert "made for model_hash" in complaint(engine(seed=6, package=str(good)))
    assert "made for precision fp32, this run has bf16" in complaint(engine(precision="bf16", package=str(good)))
    assert "made for threads 1" in complaint(engine(cpu_threads=2, package=str(good)))
    whole = good.read_bytes()
    try:
        good.write_bytes(whole[:1000])
        assert complaint(engine()).endswith(f"delete it and it is built again: rm {good}")
    finally:
        good.write_bytes(whole)


def test_what_cannot_be_part_of_a_package_is_refused() -> None:
    config = AOTIEngineConfig(device="cpu")
    with pytest.raises(ValueError, match=r"kernel\.hstu_attention=cutlass can't be part of a package; .*triton"):
        registry.build(config, MODEL, KernelConfig("cutlass"), CATALOGUE, 5)
    with pytest.raises(ValueError, match=r"item_memory_gb=0.1: .* set cache\.item_memory_gb=0"):
        registry.build(config, MODEL, KernelConfig(), CATALOGUE, 5, PagedCacheConfig(item_memory_gb=0.1))
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="cuda_graphs=true: a CPU has no CUDA graphs"):
            engine(cuda_graphs=True)


def test_its_kernels_are_the_same_at_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timing would choose anew at each start, and then the package of the start before is another one's."""
    monkeypatch.setattr(kernel_registry, "device_kind", lambda device: "cuda")
    made = engine(kernel="auto").actual()
    assert set(made["kernels"].values()) == {"triton"}
    assert "none is timed, because Inductor compiles torch" in made["kernel_choice"]["layer_norm"]


def test_without_a_compiler_the_engine_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    reason = registry.availability("aoti")
    assert reason == "there is no C++ compiler; apt-get install g++"
    with pytest.raises(UnavailableError, match=r"engine aoti: there is no C\+\+ compiler"):
        registry.build(AOTIEngineConfig(device="cpu"), MODEL, KernelConfig(), CATALOGUE, 5)


@NO_COMPILER
@pytest.mark.skipif(sys.platform != "linux", reason="about ELF libraries")
def test_packages_share_the_c_plus_plus_library_of_the_process(tmp_path: Path) -> None:
    """A package that links a second copy, such as the static library requested here, crashes when it is loaded."""
    source, library = tmp_path / "a.cc", tmp_path / "a.so"
    source.write_text('#include <iostream>\nextern "C" void f() { std::cout << 1; }\n')
    command = ["g++", "-static-libstdc++", "-shared", "-fPIC", str(source), "-o", str(library)]
    needed = {}
    with package.toolchain(torch.device("cpu"), tmp_path) as libraries:
        for more in ([], [f"-l{name}" for name in libraries]):
            subprocess.run([*command, *more], check=True)
            needed[bool(more)] = b"libstdc++.so.6" in library.read_bytes()
    assert needed == {False: False, True: True}


def test_profiles_follow_the_lengths_and_hold_every_request() -> None:
    encoding = Encoding.of(MODEL, CATALOGUE)
    requests = requests_of([10] * 30 + [100] * 10, [4] * 40)
    small, large = profiles(requests, encoding, 8, count=2)
    assert small == Sizes(8, 8 * 16, 16, 16, 8 * 16)
    assert large == Sizes(8, 8 * 128, 128, 128, 8 * 16)
    assert profiles(requests, encoding, 8) == [large]
    for request in requests:
        assert check([request] * 8, encoding, large, "").fits(large)
    with pytest.raises(OutsideError, match=r"requests 130: longest=106, the engine is built for at most 16; fix it"):
        check(requests[30:31], encoding, small, "fix it")
    with pytest.raises(ValueError, match="0 sample requests"):
        profiles([], encoding, 8)


@pytest.mark.parametrize(("page", "stored"), [(0, ""), (16, ""), (16, "int8")])
def test_the_last_layer_of_what_is_compiled_computes_candidates_alone(page: int, stored: str) -> None:
    """Attention by its queries and keys, projections by their operations. Each layer reads its own pages and scales."""
    calls: list[tuple[int, int]] = []
    read: list[list[int]] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append((q.shape[0], k.shape[0]))
        given = [options.get(name) for name in ("k_pages", "v_pages", "k_scales", "v_scales")]
        read.append([x.data_ptr() for x in given if x is not None])
        return eager_attention.hstu_attention(q, k, v, **options)

    model = dataclasses.replace(PAGED_MODEL, interaction=False)
    kernels = Operators.eager().replace(hstu_attention=attend)
    ranker = build_model(model, CATALOGUE, 5, "cpu", torch.float32, kernels)
    requests, cpu = requests_of([0, 45, 12], [2, 1, 6], seed=3), torch.device("cpu")
    tokens, candidates = 57 + 9, 9
    sizes = Sizes.of(requests, ranker.encoding)
    facts = Facts.here("0", "fp32", cpu, {"hstu_attention": "torch"}, model.heads, sizes, sizes, page, stored)
    batch = pack(requests, ranker.encoding, cached=[0] * 3 if page else None).to(cpu)
    module: ExportedRanker | PagedRanker
    if page:
        places, nothing = torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
        made = {"layers": model.layers, "heads": model.heads, "qk_dim": model.qk_dim, "v_dim": model.v_dim}
        pool = PagePool(**made, pages=1, page=page, dtype=EIGHT_BITS.get(stored, torch.float32), device=cpu)
        inputs = Inputs(facts, cpu).of(batch, PagedBatch(places, nothing, nothing, nothing), pool)
        module = PagedRanker(ranker, kernels)
    else:
        inputs = Inputs(facts, cpu).of(batch)
        module = ExportedRanker(ranker, adapted(attend), kernels)
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        found = module(*inputs)
    logits, made_keys = (found[0], found[1 : 1 + model.layers]) if page else (found, [])
    assert calls == [(tokens, tokens), (candidates, tokens)]
    stores = [pool.all_k, pool.all_v, *pool.all_scales] if page else []
    assert read == [[store[layer].data_ptr() for store in stores] for layer in range(model.layers)]
    assert [len(k) for k in made_keys] == [tokens] * len(made_keys)
    E, keys, values = model.embedding_dim, model.heads * model.qk_dim, model.heads * model.v_dim
    every = tokens * E * 2 * (keys + values)  # without the output's product, which is in place and not counted
    last = (tokens + candidates) * E * (keys + values)
    head = candidates * model.head_dim * (E + len(model.tasks))
    assert counted.get_flop_counts()["Global"][torch.ops.aten.addmm] == 2 * (every + last + head)
    expected = RankingReference(model, CATALOGUE, 5, "cpu").scores(requests)
    assert relative_error(logits.numpy(), np.concatenate(expected)) < 1e-5


TRACE_TRITON = f"""
import torch
from grengines.api import Catalogue
from grengines.models.hstu.config import HSTUConfig
from grengines.aoti import package
from grengines.export.attention import adapted
from grengines.export.module import ExportedRanker
from grengines.models.hstu.model import build_model
from grengines.runtime.profile import Sizes
from grkernels.operators import Operators
from grkernels.registry import FAMILIES

kernels = Operators.of(dict.fromkeys(FAMILIES, "triton"))
ranker = build_model({MODEL!r}, {CATALOGUE!r}, 0, "cpu", torch.bfloat16, kernels)
sizes, families = Sizes(8, 512, 64, 64, 64), dict.fromkeys(FAMILIES, "triton")
facts = package.Facts.here("0", "bf16", torch.device("cpu"), families, 2, sizes, sizes)
program = package.trace(ExportedRanker(ranker, adapted(kernels.hstu_attention), kernels), facts)
code = program.graph_module.code
print(code.count("triton_kernel_wrapper_mutation("), sorted(str(v) for v in program.range_constraints.values()))
"""


def test_triton_kernels_are_traced_with_symbolic_lengths() -> None:
    """The traced graph, which needs no GPU, holds the launches, with grids that follow the lengths."""
    sources = (*kept.SOURCES, "engines/**/*.py")
    printed = (kept.output_of("aoti_trace", TRACE_TRITON, sources, TRITON_INTERPRET="0") / kept.OUTPUT).read_text()
    # Embedding; norm, attention and gate of each layer; last norm; interaction.
    assert printed.startswith(f"{1 + 3 * MODEL.layers + 2} "), printed
    for most in ("512", "64", "8"):
        assert f"VR[1, {most}]" in printed, printed


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["false", "auto", "true"])
def test_triton_kernels_in_a_package_on_a_gpu(cache: Path, graphs: str) -> None:
    """In one precision and so one package, which takes a minute to build; the other one differs by the type alone."""
    made = engine(kernel="triton", device="cuda", precision="bf16", cuda_graphs=graphs, cpu_threads=0)
    reference = RankingReference(MODEL, CATALOGUE, 5, "cuda")
    made.prepare(SAMPLE, 4)
    for requests in (SAMPLE[:4], SAMPLE[:1], requests_of([0, 1, 45, 0], [1, 1, 9, 2], seed=1)):
        expected = reference.scores(requests)
        rounding = relative_error(np.concatenate(reference.scores(requests, "bf16")), np.concatenate(expected))
        assert error(made.rank(requests), expected) < max(2 * rounding, 2e-5)
    actual = made.actual()
    assert {c["family"] for c in actual["kernel_configs"]} >= {"hstu_attention", "norm_gate", "layer_norm"}
    made.close()


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "graphs"), [("engine", "false"), ("engine", "true"), ("fp8", "true")])
def test_a_package_appends_to_pages_on_a_gpu(cache: Path, kind: str, graphs: str) -> None:
    """Each kind of pages is a package of its own. int8 is read as fp8 is, and tests/kernels/test_kv8.py has both."""
    options: dict[str, Any] = {"device": "cuda", "precision": "bf16", "cuda_graphs": graphs, "cpu_threads": 0}
    made = engine(PAGED_MODEL, kernel="triton", cache=dataclasses.replace(PAGES, precision=kind), **options)
    made.prepare(visits(EVENTS, [1, 2, 3, 4]), 4)
    reference = RankingReference(PAGED_MODEL, CATALOGUE, 5, "cuda")
    made.reset_cache()
    made.rank(visits(30, [1, 2]))
    for events, users in ((45, [1, 2]), (45, [1, 2]), (EVENTS, [1, 2, 3])):
        requests = visits(events, users)
        expected = reference.scores(requests)
        rounded = reference.scores(requests, "bf16", stored="" if kind == "engine" else kind)
        allowed = 2 * relative_error(np.concatenate(rounded), np.concatenate(expected))
        result = made.rank(requests)
        assert result.cached[0].tokens and error(result, expected) < allowed
    assert made.user_cache is not None
    with torch.inference_mode():
        pool = made.user_cache.states.pool
        for stored in (pool.all_k,) if kind == "engine" else pool.all_scales:
            stored.zero_()  # the check can fail
    assert error(made.rank(requests), expected) > allowed
    made.close()


def test_facts_say_what_a_package_is() -> None:
    sizes = Sizes(1, 2, 3, 4, 5)
    facts = Facts.here("abc", "fp32", torch.device("cpu"), {"hstu_attention": "torch"}, 2, sizes, sizes)
    assert Facts.from_json(facts.json()) == facts
    other = dataclasses.replace(facts, most=Sizes(1, 2, 3, 4, 6))
    assert other.path() != facts.path() and facts.path().name.startswith("abc-fp32-")
