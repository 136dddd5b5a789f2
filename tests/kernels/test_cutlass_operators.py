"""The small operator families in CuTe DSL.

Without a GPU they are compiled for Hopper. On a GPU they must pass the check of the other variants.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import kept
from helpers import kernel_cases as operators
from helpers.kernel_cases import DTYPES, RAGGED, Arguments, agrees, converted
from torch import Tensor

from grkernels import tuning

needs_cutlass = pytest.mark.skipif(find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed")
FAMILIES = ("norm_gate", "layer_norm", "interaction", "jagged_concat", "jagged_split", "token_embedding")
MANY = (1, 0, 2) * 400, (0, 1, 1) * 400  # sequences that take three steps to search

# Widths that are whole vectors or not whole rounds of a warp's vectors; results that begin anywhere in a vector;
# samples in several steps, and more of them than warps.
CASES: dict[str, list[Callable[[], Arguments]]] = {
    "norm_gate": [
        lambda: operators.norm_gate(5, 2, 256),
        lambda: operators.norm_gate(7, 1, 40, scale=1e-5, mean=10.0),
        lambda: operators.norm_gate(6, 4, 256, scale=1e-5),
        lambda: operators.norm_gate(3, 1, 3000),
        lambda: operators.norm_gate(2, 4, 4096),
        lambda: operators.norm_gate(0, 1, 16),
    ],
    "layer_norm": [
        lambda: operators.layer_norm(5, 512),
        lambda: operators.layer_norm(3, 104, scale=1e-2, mean=20.0),
        lambda: operators.layer_norm(9, 1024),
        lambda: operators.layer_norm(2, 4104),
        lambda: operators.layer_norm(0, 16),
    ],
    "interaction": [
        lambda: operators.interaction(3000, 32, 128),
        lambda: operators.interaction(2999, 27, 64),
        lambda: operators.interaction(33, 4, 512),
        lambda: operators.interaction(9, 64, 128),
        lambda: operators.interaction(7, 33, 304),
        lambda: operators.interaction(11, 2, 8),
        lambda: operators.interaction(9, 1, 104),
        lambda: operators.interaction(3, 9, 4096),
        lambda: operators.interaction(0, 4, 16),
    ],
    "jagged_concat": [
        lambda: operators.jagged_concat(*RAGGED, 2, 256),
        lambda: operators.jagged_concat(*RAGGED, 1, 1104, padding=3),
        lambda: operators.jagged_concat(*MANY, 1, 16, padding=3),
        lambda: operators.jagged_concat((0,), (0,), 1, 16, padding=2),
        lambda: operators.jagged_concat((), (), 1, 16, padding=2),
    ],
    "jagged_split": [
        lambda: operators.jagged_split(*RAGGED, 2, 256),
        lambda: operators.jagged_split(*RAGGED, 1, 1104, padding=3),
        lambda: operators.jagged_split(*MANY, 1, 16, padding=3),
        lambda: operators.jagged_split((0,), (0,), 1, 16, padding=2),
        lambda: operators.jagged_split((), (), 1, 16, padding=2),
    ],
    "token_embedding": [
        lambda: operators.token_embedding(7, 512, 4),
        lambda: operators.token_embedding(33, 1104, 1),
        lambda: operators.token_embedding(5, 48, 0),
        lambda: operators.token_embedding(0, 16, 2),
    ],
}

COMPILE = """
import json
import sys
from pathlib import Path
from cutlass import BFloat16, Float16, Float32
from grkernels.cute_common import compile_kernel
from grkernels.interaction.cutlass import Interaction
from grkernels.jagged_concat.cutlass import Concat
from grkernels.jagged_split.cutlass import Split
from grkernels.layer_norm.cutlass import LayerNorm
from grkernels.norm_gate.cutlass import NormGate
from grkernels.token_embedding.cutlass import TokenEmbedding
wide = ("ld.global.v4.b32", "st.global.v4.b32")
for number, (kernel, wanted) in enumerate((
    (NormGate(BFloat16, 512, 1, 4), ("ex2.approx", *wide)),
    (NormGate(Float32, 3000, 4, 1), ("bar.sync", *wide)),
    (LayerNorm(Float16, 1024, 1, 4), ("shfl.sync", *wide)),
    (Interaction(BFloat16, 32, 128, 4), ("mma.sync.aligned.m16n8k16", *wide)),
    (Interaction(Float16, 27, 64, 4), ("mma.sync.aligned.m16n8k16", *wide)),
    (Interaction(BFloat16, 64, 4096, 1), ("mma.sync.aligned.m16n8k16", *wide)),
    (Concat(BFloat16, 1024, 2, 1, 4), ("vote.sync.ballot", *wide)),
    (Split(Float32, 40, 1, 2, 4), ("vote.sync.ballot", *wide)),
    (TokenEmbedding(BFloat16, 512, 4, 2, 2, 2), wide),
)):
    made = compile_kernel(kernel, options="--keep-ptx --keep-cubin --dump-dir " + sys.argv[1])
    Path(sys.argv[1], f"{number}.ptx").write_text(made.__ptx__)
    print(json.dumps([repr(kernel), wanted, len(made.__cubin__)]))
"""


@needs_cutlass
def test_kernels_compile_for_hopper() -> None:
    folder = kept.output_of("cute_operators", COMPILE, CUTE_DSL_ARCH="sm_90a")
    made = [json.loads(line) for line in (folder / kept.OUTPUT).read_text().splitlines()]
    assert len(made) == 9
    for number, (kernel, wanted, cubin_bytes) in enumerate(made):
        ptx = (folder / f"{number}.ptx").read_text()
        assert all(instruction in ptx for instruction in wanted), kernel
        assert ".local" not in ptx, kernel  # everything is in registers
        assert cubin_bytes > 1000


KEPT = """
import torch
from pathlib import Path
from grkernels import cute_cache
from grkernels.cute_common import ELEMENTS, compile_kernel
from grkernels.layer_norm.cutlass import LayerNorm

def made(width: int) -> bool:
    kernel = LayerNorm(ELEMENTS[torch.bfloat16], width, 4, 1)
    kernel, new = cute_cache.compiled(kernel, "sm_90a", lambda: compile_kernel(kernel))
    assert "rows1" in kernel.function_name and f"width{width}" in kernel.function_name
    return new

folder = Path(os.environ["GRBENCH_CACHE"]) / "kernels"
print(made(64), made(64), made(128), len(list(folder.iterdir())))
for file in folder.iterdir():
    file.write_bytes(file.read_bytes()[:1000])
print(made(64), made(64), len(list(folder.iterdir())))
folder.joinpath("x").mkdir()
os.environ["GRBENCH_CACHE"] = str(folder / "x" / "y.o")
(folder / "x" / "y.o").write_bytes(b"a file, no folder")
print(made(64), made(64))
"""


@needs_cutlass
def test_compiled_kernels_are_kept(tmp_path: Path) -> None:
    """A kernel is compiled once, again if its file is damaged, and always where no file can be written."""
    env = {**os.environ, "CUTE_DSL_ARCH": "sm_90a", "GRBENCH_CACHE": str(tmp_path)}
    code = "import os\n" + KEPT
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["True False True 2", "True False 2", "True True"], done.stderr[-2000:]


LAUNCHED = """
import torch
from grkernels import registry, tuning
x = torch.arange(640, device="cuda", dtype=torch.float32).sin().reshape(10, 64).bfloat16()
weight = torch.ones(64, device="cuda", dtype=torch.bfloat16)
out = registry.get("layer_norm", "cutlass").fn(x, weight, weight, eps=1e-6)
print(len(tuning.compiled()), out.float().sum().item(), out.float().std().item() > 0.5)
"""


@needs_cutlass
@pytest.mark.gpu
def test_a_kept_kernel_gives_the_same_result(tmp_path: Path) -> None:
    env = {**os.environ, "GRBENCH_CACHE": str(tmp_path)}
    runs = [subprocess.run([sys.executable, "-c", LAUNCHED], env=env, capture_output=True, text=True) for _ in range(2)]
    (first, *answer), (second, *again) = (run.stdout.split() or [run.stderr[-2000:]] for run in runs)
    assert (first, second) == ("1", "0") and answer == again and answer[1] == "True"


@needs_cutlass
@pytest.mark.parametrize("family", FAMILIES)
def test_supports_says_why_not(family: str) -> None:
    from grkernels.cute_common import supports

    bench = importlib.import_module(f"grkernels.{family}.bench")
    refuses = importlib.import_module(f"grkernels.{family}.cutlass").supports
    sizes = bench.supports_args(next(iter(bench.SHAPES.values())))
    last = list(sizes)[-1]
    reasons = {
        "capability 9.0": refuses(device="cpu", dtype="bf16", **sizes),
        "not a multiple of 8": refuses(device="cuda", dtype="bf16", **{**sizes, last: 12}),
        "is over": refuses(device="cuda", dtype="bf16", **{**sizes, last: 2**20}),
    }
    if family == "interaction":
        reasons["65 features are over 64"] = refuses(device="cuda", dtype="bf16", features=65, dim=8)
        reasons["TF32"] = refuses(device="cuda", dtype="fp32", **sizes)
    for part, reason in reasons.items():
        assert reason and part in reason and "torch" in reason
    assert "fp8 is none of" in refuses(device="cuda", dtype="fp8", **sizes)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    assert (supports(device="cuda", dtype="bf16", width=8) is None) == hopper


def strided(arguments: Arguments) -> Arguments:
    """The same problem with the rows of every stream a view of wider ones."""

    def widen(x: Tensor) -> Tensor:
        wider = x.new_full((*x.shape[:-1], x.shape[-1] + 8), torch.nan)
        wider[..., :-8] = x
        return wider[..., :-8]

    streams = ("u", "a", "x", "first", "second")
    return {name: widen(x) if name in streams else x for name, x in arguments.items()}


EACH_CASE = [pytest.param(family, case, id=f"{family}{i}") for family in CASES for i, case in enumerate(CASES[family])]


@pytest.mark.gpu
@needs_cutlass
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "case"), EACH_CASE)
def test_on_a_gpu(
    family: str, case: Callable[[], Arguments], dtype: str, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """Under every candidate configuration, since the tuner may pick any of them."""
    module = importlib.import_module(f"grkernels.{family}.cutlass")
    if family == "interaction" and dtype == "fp32":
        pytest.skip("fp32 is refused")
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(1)
    arguments = converted(case(), DTYPES[dtype], "cuda")
    for problem in arguments, strided(arguments):
        assert agrees(family, module.VARIANT.fn(**problem), problem)
    for config in module.CANDIDATES:
        with tuning.forced(family, "cutlass", config):
            assert agrees(family, module.VARIANT.fn(**arguments), arguments), config


@pytest.mark.gpu
@needs_cutlass
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_at_real_sizes_and_in_a_graph(family: str, dtype: str) -> None:
    variant = importlib.import_module(f"grkernels.{family}.cutlass").VARIANT
    bench = importlib.import_module(f"grkernels.{family}.bench")
    for shape in bench.SHAPES.values():
        arguments = bench.inputs(shape, dtype=DTYPES[dtype], device="cuda", seed=3)
        assert agrees(family, variant.fn(**arguments), arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = variant.fn(**arguments)
    for x in captured if isinstance(captured, tuple) else (captured,):
        x.fill_(torch.nan)
    graph.replay()
    assert agrees(family, captured, arguments)
