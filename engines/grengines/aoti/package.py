"""AOTInductor packages (.pt2): built from the model, kept in a cache, identified by the metadata in them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.export import Dim

from grengines.aoti.paged import PagedRanker
from grengines.api import UnavailableError
from grengines.cache.places import PagedBatch
from grengines.cache.pool import PagePool
from grengines.export.identity import source_digest
from grengines.export.module import INPUTS, ExportedRanker
from grengines.runtime import atomic_io
from grengines.runtime.batch import JaggedBatch
from grengines.runtime.profile import Sizes
from grkernels import tuning
from grkernels.cache_folder import cache_folder
from grkernels.hstu_attention.torch import tiles_needed
from grkernels.pages import EIGHT_BITS

FORMAT = "grbench-aoti-2"
MOST_PAGES = 1 << 31
# Further inputs of a package that appends: names in the order of PagedRanker.forward, element types (None: the model's)
# and dimensions, P pages of the longest history, S pages of the pool. N columns are those of the longest sequence.
PAGED_INPUTS: dict[str, tuple[torch.dtype | None, tuple[str, ...]]] = {
    "page_table": (torch.int32, ("B", "P")),
    "paged_lengths": (torch.int64, ("B",)),
    "k_pages": (None, ("layers", "S", "page", "H", "dqk")),
    "v_pages": (None, ("layers", "S", "page", "H", "dv")),
}
SCALES = (torch.float32, ("layers", "S", "page", "H"))  # of pages in 8 bits, further inputs: of keys, of values


@dataclass(frozen=True)
class Facts:
    """Metadata of a package: everything that decides whether an engine can use it."""

    model_hash: str
    precision: str
    device: str  # a CPU's instruction set, a GPU's name
    threads: int  # of a CPU, for which the code is generated; 0 on a GPU
    kernels: dict[str, str]  # the variant of each family
    versions: dict[str, str]  # of torch and Triton
    source: str  # digest of the code that the package is made from
    most: Sizes  # the largest batch
    typical: Sizes  # the batch that its kernels' launch configurations are chosen for
    tiles: int  # that eager attention processes one after another
    page: int = 0  # tokens of a page of the KV cache that it appends to; 0: it computes whole histories
    stored: str = ""  # int8 or fp8: the pages are in 8 bits
    format: str = FORMAT

    @classmethod
    def here(
        cls,
        model_hash: str,
        precision: str,
        device: torch.device,
        kernels: dict[str, str],
        heads: int,
        most: Sizes,
        typical: Sizes,
        page: int = 0,
        stored: str = "",
    ) -> Facts:
        """Describe a package for this machine, with the current number of threads."""
        cuda = device.type == "cuda"
        eager = kernels["hstu_attention"] == "torch"
        return cls(
            model_hash=model_hash,
            precision=precision,
            device=torch.cuda.get_device_name(device) if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}",
            threads=0 if cuda else torch.get_num_threads(),
            kernels=kernels,
            versions={"torch": torch.__version__, "triton": triton.__version__},
            source=source_digest(),
            most=most,
            typical=typical,
            tiles=tiles_needed(most.batch, heads, most.longest, most.longest) if eager else 1,
            page=page,
            stored=stored,
        )

    @classmethod
    def from_json(cls, text: str) -> Facts:
        """Parse what `json` returned. Raises ValueError, KeyError or TypeError for anything else."""
        values = json.loads(text)
        return cls(**{**values, **{name: Sizes(**values[name]) for name in ("most", "typical")}})

    def json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def path(self) -> Path:
        """Return the package's path in the cache."""
        digest = hashlib.sha256(self.json().encode()).hexdigest()[:12]
        return cache_folder() / "packages" / f"{self.model_hash}-{self.precision}-{digest}.pt2"


@dataclass(frozen=True)
class Package:
    """A loaded package."""

    path: Path
    facts: Facts
    configs: list[dict[str, Any]]  # launch configurations of its kernels, as in `grkernels.tuning.provenance`
    # The inputs in the order of INPUTS, or of PAGED_INPUTS -> logits fp32 [M, tasks], and what else the module returns.
    run: Callable[[list[Tensor]], list[Tensor]]


class Inputs:
    """The inputs of a package, made from a batch without copies."""

    def __init__(self, facts: Facts, device: torch.device) -> None:
        self._tiles, self._longest = facts.tiles, facts.most.longest
        rows = -(-facts.most.longest // facts.tiles)
        self._ruler = torch.arange(max(facts.tiles * rows, facts.most.history), device=device)

    def of(self, batch: JaggedBatch, places: PagedBatch | None = None, pool: PagePool | None = None) -> list[Tensor]:
        """Return the inputs in the order of INPUTS, on the batch's device. Weights stay fp64.

        places, pool: those of a package that appends, and then its inputs in the order of PAGED_INPUTS.
        """
        rows, candidates = (-(-n // self._tiles) for n in (batch.max_q_len, batch.max_candidates))
        inputs = [
            batch.token_rows,
            batch.actions,
            batch.weights,
            batch.positions,
            batch.time_buckets,
            batch.q_offsets,
            batch.num_targets,
            batch.candidate_rows,
            batch.candidate_offsets,
            self._ruler[: self._tiles * rows].view(self._tiles, rows),
            self._ruler[: self._tiles * candidates].view(self._tiles, candidates),
            self._ruler[:1],
        ]
        if places is not None and pool is not None:
            inputs[-1] = self._ruler[: min(batch.max_kv_len, self._longest)]
            inputs += [places.page_table, places.paged_lengths, pool.all_k, pool.all_v, *pool.all_scales]
        return inputs


def build(module: ExportedRanker | PagedRanker, facts: Facts) -> Path:
    """Compile the module into the cache, which takes about a minute.

    Raises UnavailableError if there is no working C++ compiler, and OSError.
    """
    path = facts.path()
    tuning.reset()
    program = trace(module, facts)
    metadata = {"grbench": facts.json(), "kernel_configs": json.dumps(tuning.provenance())}
    with atomic_io.scratch(path) as folder:
        scratch = folder / path.name  # AOTInductor names a folder in the package after the file
        with _one_line_errors(), toolchain(module.ranker.token_table.device, folder) as libraries:
            configs = {
                "aot_inductor.metadata": metadata,
                "aot_inductor.custom_op_libs": libraries,
                "aot_inductor.precompile_headers": False,  # it takes ten seconds, and saves a package two
            }
            torch._inductor.aoti_compile_and_package(program, package_path=str(scratch), inductor_configs=configs)
        scratch.replace(path)
    return path


def load(path: Path, wanted: Facts, device: torch.device) -> Package:
    """Load a package. Its code runs only after its metadata is checked.

    Raises ValueError, one line, for a file that is missing, damaged or not a package, or that was built for another
    model, precision, device, version or kernels.
    """
    facts, configs = _read(path)
    for name in ("model_hash", "precision", "device", "threads", "page", "stored", "kernels", "versions"):
        found, expected = getattr(facts, name), getattr(wanted, name)
        if found != expected:
            raise ValueError(f"{path}: made for {name} {found}, this run has {expected}; {_hint(path)}")
    device_index = -1 if device.type == "cpu" else device.index
    # Single-threaded: an engine's batches take turns, and the runtime's locks can't be in a CUDA graph.
    model = torch._inductor.aoti_load_package(str(path), run_single_threaded=True, device_index=device_index)
    return Package(path, facts, configs, model.loader.boxed_run)


def trace(module: ExportedRanker | PagedRanker, facts: Facts) -> torch.export.ExportedProgram:
    """Export the module with symbolic lengths up to `most`, from an example of the typical sizes."""
    most, typical, tiles = facts.most, facts.typical, facts.tiles
    limits, sizes = (
        {
            "L": some.tokens,
            "B": some.batch,
            "M": some.candidates,
            "R": -(-some.longest // tiles),
            "RC": -(-min(some.candidates, some.longest) // tiles),
        }
        for some in (most, typical)
    )
    static = {"T": tiles, "TC": tiles, "N": 1}
    inputs = {**INPUTS, "weights": (torch.float64, ("L",))}
    if facts.page:
        config, table = module.ranker.config, module.ranker.token_table
        limits |= {"N": most.longest, "P": -(-most.history // facts.page), "S": MOST_PAGES}
        sizes |= {"N": typical.longest, "P": -(-typical.history // facts.page), "S": 3}
        static = {"T": tiles, "TC": tiles, "layers": config.layers, "page": facts.page, "H": config.heads}
        static |= {"dqk": config.qk_dim, "dv": config.v_dim}
        pages = EIGHT_BITS.get(facts.stored, table.dtype)
        inputs |= {name: (dtype or pages, shape) for name, (dtype, shape) in PAGED_INPUTS.items()}
        inputs |= {"k_scales": SCALES, "v_scales": SCALES} if facts.stored else {}
    dims: dict[str, Any] = {d: Dim(d, min=1, max=n) if n > 1 else Dim.STATIC for d, n in limits.items()}
    dims |= {"B + 1": dims["B"] + 1 if most.batch > 1 else Dim.STATIC, **dict.fromkeys(static, Dim.STATIC)}
    sizes = {d: max(n, min(2, limits[d])) for d, n in sizes.items()}  # export takes 1 for a constant
    sizes |= {"B + 1": sizes["B"] + 1, **static}
    device = module.ranker.token_table.device
    example = tuple(_unaligned([sizes[d] for d in shape], dtype, device) for dtype, shape in inputs.values())
    shapes = tuple({i: dims[d] for i, d in enumerate(shape)} for _, shape in inputs.values())
    with torch.inference_mode(False), torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)


def _unaligned(shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros that begin 8 bytes off a 16-byte boundary, as the arrays of a packed batch may.

    The generated code then expects such arrays. Otherwise it would copy each input first.
    """
    return torch.zeros(math.prod(shape) + 1, dtype=dtype, device=device)[1:].view(shape)


def _read(path: Path) -> tuple[Facts, list[dict[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such package; {_hint(path)}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith("wrapper_metadata.json")]
            metadata = json.loads(archive.read(names[0]))
            facts, configs = Facts.from_json(metadata["grbench"]), json.loads(metadata["kernel_configs"])
            if facts.format != FORMAT:
                raise ValueError(f"format {facts.format}, expected {FORMAT}")
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, IndexError, TypeError) as e:
        reason = " ".join(str(e).split())
        raise ValueError(f"{path}: not a complete package of this engine ({reason}); {_hint(path)}") from None
    return facts, configs


def _hint(path: Path) -> str:
    if path.is_relative_to(cache_folder()):
        return f"delete it and it is built again: rm {path}"
    return "set engine.package=null, and one is built"


@contextmanager
def toolchain(device: torch.device, folder: Path) -> Iterator[list[str]]:
    """Set the search paths of the C++ compiler and linker in the environment. Gives the libraries to link.

    A package links the C++ library that this process has loaded. Where only the static library is installed for
    development, the package would bring its own, and two C++ libraries in one process crash. For a GPU it finds the
    driver and CUDA's headers, which Inductor looks for beside nvcc only.
    """
    found: dict[str, list[str]] = {"CPATH": [], "LIBRARY_PATH": [str(folder)]}
    libraries = []
    if runtime := _loaded("libstdc++.so.6"):
        (folder / "libstdc++.so.6").symlink_to(runtime)
        libraries.append(":libstdc++.so.6")
    if device.type == "cuda":
        local = Path("/usr/local")
        homes = [Path(os.environ.get("CUDA_HOME", "")), local / "cuda", *sorted(local.glob("cuda-*"), reverse=True)]
        found["CPATH"] = [str(home / "include") for home in homes if (home / "include" / "cuda.h").is_file()][:1]
        if driver := _loaded("libcuda.so"):
            (folder / "libcuda.so").symlink_to(driver)
    before = {name: os.environ.get(name) for name in found}
    try:
        for name, paths in found.items():
            if paths:
                os.environ[name] = os.pathsep.join([*paths, *filter(None, [before[name]])])
        yield libraries
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _loaded(name: str) -> str | None:
    """Return the file of a loaded library. None if the process has none of that name, or there is no /proc."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    return next((path for line in lines if Path(path := line.split()[-1]).name.startswith(name)), None)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn the errors of a C++ compiler or linker into one line."""
    try:
        yield
    except Exception as e:
        text = str(e)
        if "CppCompileError" not in text and type(e).__name__ != "CppCompileError":
            raise
        complaints: Sequence[str] = [s.strip() for s in text.splitlines() if "error:" in s or "cannot find" in s]
        why = complaints[0] if complaints else text.splitlines()[0]
        raise UnavailableError(
            f"AOTInductor's C++ code does not compile here ({why}); "
            "install g++ and, for a GPU, the CUDA toolkit (CUDA_HOME)"
        ) from e
