"""The operator families: one row each. A family is a folder, a variant is a module in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

AUTO = "auto"  # instead of a variant: the fastest one that can run
GROUP = "grbench.kernels"  # entry points of packages that bring families or variants


@dataclass(frozen=True)
class Needs:
    """Requirements of a variant: a package, and a device of one of these kinds.

    cpu: a CPU. sm90: an NVIDIA GPU of compute capability 9.0. cuda: any other NVIDIA GPU.
    """

    package: str  # import name
    install: str  # the command that installs it
    devices: tuple[str, ...] = ("cpu", "cuda", "sm90")


TORCH = Needs("torch", "pip install 'torch>=2.11'")
TRITON = Needs("triton", "pip install 'triton>=3.6'", ("cuda", "sm90"))
CUTLASS = Needs("cutlass", "pip install 'nvidia-cutlass-dsl[cu13]>=4.8'", ("sm90",))
EVERY = {"torch": TORCH, "compile": TORCH, "triton": TRITON, "cutlass": CUTLASS}

# The order in which `auto` tries variants, by kind of device. A variant that is in no order is used by name only.
FASTEST = {"sm90": ("cutlass", "triton", "torch"), "cuda": ("triton", "torch"), "cpu": ("compile", "torch")}
MEASURED = ("sm90",)  # kinds whose order is measured for the families below, the fastest first
# H200, bf16, commit 136674a: layer_norm 35.1 us in Triton and 35.6 us in CuTe at 34816x1024, token_embedding
# 6.5 and 6.8 us at 1280x512; equal elsewhere.
TRITON_FIRST = FASTEST | {"sm90": ("triton", "cutlass", "torch")}
# H200, commit 9c484bf, 8 x (3968 cached + 384) of 4x256: int8 pages 0.280 ms in Triton and 0.227 in CuTe, fp8 pages
# 0.243 and 0.245. An engine with CuTe's forms had not started after 60 s, and with Triton's ran through in 45 s.
SLOW_BYTES = (
    "over pages in 8 bits it is measured 1.23 times as fast as triton with int8 and no faster with fp8, and an engine "
    "with it had not started after 60 s; kernel.hstu_attention=cutlass takes it"
)
SLOW_START = {"compile": "an engine with it starts slowly (docs/design/kernels.md); kernel=compile takes it"}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, by which variants say whether they can run it, and of the batch at which they are timed."""

    embedding_dim: int = 512
    heads: int = 4
    qk_dim: int = 128  # of a head
    v_dim: int = 128
    features: int = 4  # vectors of a candidate that interact
    page: int = 0  # tokens of a page of the KV cache; 0: no pages
    stored: str = ""  # int8 or fp8: pages are in 8 bits with scales (grkernels.pages); "": in the dtype of the model
    captured: bool = False  # in a CUDA graph
    compiled: bool = False  # by Inductor, together with what is around it
    products: str = ""  # fp8: operands of products are in e4m3 with scales (grkernels.fp8); "": in the dtype
    attention: tuple[str, ...] = ()  # options of other HSTU models that its attention has, as "key=value"
    gate: tuple[str, ...] = ()  # those that its norm_gate has
    kv_heads: int = 0  # of keys and values; 0: as many as `heads`
    users: int = 8  # of the batch
    events: int = 1024  # of each user, as are candidates
    candidates: int = 64
    beams: int = 8  # of each user, where a search is timed

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.users * (self.events + self.candidates)


@dataclass(frozen=True)
class FamilySpec:
    """One operator family.

    The folder `package` (by default grkernels.<name>) holds reference.py with the fp32 reference, bench.py with the
    shapes it is measured at and the inputs of a model, and a module for each variant with its KernelVariant as VARIANT.
    """

    name: str
    summary: str
    variants: Mapping[str, Needs] = field(default_factory=lambda: EVERY)
    dims: Callable[[Sizes], dict[str, Any]] = lambda sizes: {}  # arguments of `supports` other than device and dtype
    fastest: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: FASTEST)
    measured: tuple[str, ...] = ()  # kinds of device whose order is measured; on the others auto times variants
    slow: Callable[[Sizes], dict[str, str]] = lambda sizes: SLOW_START  # what auto passes over, with the reason
    of_model: bool = True  # kernel=NAME sets it; False: auto chooses, unless kernel.<family> names a variant
    writes: tuple[str, ...] = ()  # arguments that are the outputs, written in place; (): what is returned
    package: str = ""
    modules: Mapping[str, str] = field(default_factory=dict)  # of variants that are not in the folder

    def folder(self) -> str:
        """Import name of the package with the reference and the bench."""
        return self.package or f"grkernels.{self.name}"

    def module(self, variant: str) -> str:
        """Import name of a variant's module."""
        return self.modules.get(variant, f"{self.folder()}.{variant}")


def _heads(sizes: Sizes) -> dict[str, int]:
    return {"width": sizes.heads * max(sizes.qk_dim, sizes.v_dim)}


def _embedding(sizes: Sizes) -> dict[str, int]:
    return {"width": sizes.embedding_dim}


def _of_pages(name: str, summary: str, *writes: str, dims: Callable[[Sizes], dict[str, Any]]) -> FamilySpec:
    """A row for what serves the KV cache's pages and beams, whatever operators of the model are compared."""
    variants = {"torch": TORCH, "triton": TRITON}
    return FamilySpec(name, summary, variants, dims, of_model=False, writes=writes)


_ROWS = (
    FamilySpec(
        "hstu_attention",
        "SiLU attention over jagged and paged sequences",
        EVERY | {"fp8": CUTLASS},  # with products in e4m3, which only its name chooses
        dims=lambda s: {
            "qk_dim": s.qk_dim,
            "v_dim": s.v_dim,
            "page": s.page,
            "stored": s.stored,
            "extras": s.attention,
        },
        slow=lambda s: SLOW_START | ({"cutlass": SLOW_BYTES} if s.stored else {}),
    ),
    FamilySpec(
        "norm_gate",
        "SiLU, LayerNorm, gate and concatenation between attention and the output projection",
        dims=lambda s: {"width": s.heads * s.v_dim, "extras": s.gate, "products": s.products},
    ),
    FamilySpec(
        "layer_norm",
        "LayerNorm over the last dimension",
        dims=lambda s: {"width": s.embedding_dim, "products": s.products},
        fastest=TRITON_FIRST,
    ),
    FamilySpec(
        "interaction",
        "pairwise dot products of a candidate's feature vectors",
        dims=lambda s: {"features": s.features, "dim": s.embedding_dim},
    ),
    FamilySpec("jagged_concat", "two jagged tensors into one, sequence by sequence", dims=_heads),
    FamilySpec("jagged_split", "a jagged tensor into two, sequence by sequence", dims=_heads),
    FamilySpec("token_embedding", "sum of a token's embeddings", dims=_embedding, fastest=TRITON_FIRST),
    FamilySpec(
        "quantise",
        "rows in e4m3, each with a scale, where no norm writes them so",
        {"torch": TORCH, "triton": TRITON},
        dims=lambda s: {"products": s.products},
        of_model=False,
    ),
    _of_pages(
        "paged_write",
        "new keys and values into their pages",
        "k_pages",
        "v_pages",
        dims=lambda s: {"captured": s.captured, "stored": s.stored},
    ),
    _of_pages(
        "beam_attention",
        "softmax attention of beams and prompts over pages",
        "out",
        dims=lambda s: {"captured": s.captured},
    ),
)


def load() -> dict[str, FamilySpec]:
    """Every family by its name: the rows above, and those of installed packages.

    An entry point of the group grbench.kernels named FAMILY refers to a FamilySpec. One named FAMILY.VARIANT refers to
    the module of a further variant of that family. Raises ValueError for a name that exists or a family that doesn't.
    """
    families = {row.name: dataclasses.replace(row, measured=MEASURED) for row in _ROWS}
    found = sorted(entry_points(group=GROUP), key=lambda point: ("." in point.name, point.name))
    for point in found:
        name, _, variant = point.name.partition(".")
        known = families.get(name)
        if variant and known and variant not in known.variants:
            needs = Needs(point.value.partition(".")[0], f"pip install {point.dist.name if point.dist else name}")
            families[name] = dataclasses.replace(
                known,
                variants={**known.variants, variant: needs},
                modules={**known.modules, variant: point.value},
            )
        elif not variant and not known:
            families[name] = point.load()
        else:
            why = "there is no such family" if not known else "the name is taken"
            raise ValueError(f"entry point {point.name} of group {GROUP} ({point.value}): {why}; fix or uninstall it")
    return families
