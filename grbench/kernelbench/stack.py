"""A stack of HSTU layers as one more family of the benchmark, which measures the operators together.

Its variants are those that every operator of a layer has, these with products in fp8 (+fp8), and fp8, each eager and as
a CUDA graph. Only the layers are timed, from embedded tokens to the last layer's output. Weights and inputs are random.

+fp8 is what the engine runs with engine.precision=fp8: norms in Triton, or in PyTorch for torch+fp8, write rows in
e4m3, and both projections multiply them. fp8 is that with kernel.hstu_attention=fp8: the first projection writes the
operands of attention in e4m3, too. The tolerance is that of the engine's gate: twice what the fp32 reference loses with
these operands in e4m3, since all else is in bf16, whose rounding is a sixteenth of that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.fp8 import round_layers
from grengines.models.hstu.model import HSTULayer
from grengines.models.hstu.quantised import quantise_layers
from grkernels import registry
from grkernels.families import Sizes
from grkernels.hstu_attention import spec
from grkernels.operators import Operators
from grkernels.rounding import with_fp8_products
from grkernels.variant import Cost

FAMILY = "hstu_stack"
LAYER = ("hstu_attention", "norm_gate", "layer_norm")  # the families that a layer calls
FP8, GRAPH = "fp8", "+graph"
WHOLE = [name for name in registry.variant_names() if all(name in registry.variants(family) for family in LAYER)]
PRODUCTS = tuple(f"{name}+{FP8}" for name in ("torch", "triton", "cutlass"))  # attention is that of the name
VARIANTS = tuple(name + graph for name in (*WHOLE, *PRODUCTS, FP8) for graph in ("", GRAPH))


@dataclass(frozen=True)
class Shape:
    """`batch` users of `history` events and `targets` candidates each. Sizes of the layers are dlrm_v3's by default."""

    batch: int
    history: int
    targets: int
    layers: int = 5
    embedding_dim: int = 512
    heads: int = 4
    qk_dim: int = 128
    v_dim: int = 128

    @property
    def length(self) -> int:
        return self.history + self.targets


SHAPES = {
    "5x512_b1_1024+256": Shape(1, 1024, 256),
    "5x512_b32_1024+2048": Shape(32, 1024, 2048),
    "8x1024_4x256_b8_4096+256": Shape(8, 4096, 256, 8, 1024, 4, 256, 256),
    "tiny": Shape(2, 24, 8, 2, 32, 2, 16, 16),
}


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return x [L, E], the layers with their weights, and the batch's lengths."""
    generator = torch.Generator(device).manual_seed(seed)
    config = HSTUConfig(
        layers=shape.layers,
        embedding_dim=shape.embedding_dim,
        heads=shape.heads,
        qk_dim=shape.qk_dim,
        v_dim=shape.v_dim,
    )
    with torch.device(device):
        layers = nn.ModuleList(HSTULayer(config) for _ in range(shape.layers)).requires_grad_(False)
    for name, p in layers.named_parameters():
        # The same as in HSTURanker: scores of order 1, and a gate that changes the output.
        fan_in = p.shape[-1] / 3 if name.endswith("out.weight") else p.shape[-1]
        mean, std = (0.0, fan_in**-0.5) if p.dim() == 2 else (float(name.endswith("norm.weight")), 0.1)
        p.normal_(mean, std, generator=generator)
    offsets = torch.arange(shape.batch + 1, device=device, dtype=torch.int64) * shape.length
    return {
        "x": torch.randn(
            shape.batch * shape.length, shape.embedding_dim, generator=generator, device=device, dtype=dtype
        ),
        "layers": layers.to(dtype),
        "offsets": offsets,
        "num_targets": torch.full((shape.batch,), shape.targets, device=device, dtype=torch.int64),
        "length": shape.length,
    }


def cost(shape: Shape, dtype: str, variant: str = "") -> Cost:
    """Count mask-exact FLOPs of products and attention. Bytes: x once in and out of each layer, and the weights.

    They are in the dtype, but for the weights of fp8, which are in e4m3 with a scale for each output channel.
    """
    tokens, E = shape.batch * shape.length, shape.embedding_dim
    values, keys = shape.heads * shape.v_dim, shape.heads * shape.qk_dim
    outputs, wide = 2 * values + 2 * keys, spec.BYTES[dtype]
    weights = E * outputs + 3 * values * E
    read = weights + (outputs + E) * spec.BYTES["fp32"] if _in_fp8(variant) else weights * wide
    pairs = shape.batch * spec.visible_pairs(shape.length, shape.targets)
    flops = 2 * tokens * weights + spec.flops(pairs, shape.heads, shape.qk_dim, shape.v_dim)
    return Cost(shape.layers * flops, shape.layers * (read + 2 * tokens * E * wide))


def supports_args(shape: Shape) -> dict[str, int]:
    """Return keyword arguments of `refusal` other than device and dtype."""
    sizes = ("embedding_dim", "heads", "qk_dim", "v_dim")
    return {name: getattr(shape, name) for name in sizes}


def reference(*, x: Tensor, layers: nn.Module, **lengths: Any) -> Tensor:
    """Run the layers in fp32, by the operators' references."""
    return _run(Operators.reference(), x.float(), copy.deepcopy(layers).float(), **lengths)


def refusal(variant: str, *, device: str, dtype: str, **sizes: Any) -> str | None:
    """Return None if the variant can run here, else the reason."""
    if variant.endswith(GRAPH) and device != "cuda":
        return "CUDA graphs need an NVIDIA GPU"
    products = FP8 if _in_fp8(variant) else ""
    if products and dtype != "bf16":
        return f"dtype={dtype}: products in fp8 give bf16; set dtype=bf16"
    for family, kernel in _kernels(variant).items():
        dims = registry.family(family).dims(Sizes(**sizes, products=products))
        if why := registry.refusal(family, kernel, device=device, dtype=dtype, **dims):
            return why
    return None


def _in_fp8(variant: str) -> bool:
    return FP8 in variant.split("+")


def _kernels(variant: str) -> dict[str, str]:
    """Return the variant of each operator. The norms that write e4m3 are Triton's, which kernel=auto takes as well."""
    name = variant.partition("+")[0]
    norms = "triton" if _in_fp8(variant) and name != "torch" else name
    return {"hstu_attention": name, "norm_gate": norms, "layer_norm": norms}


def yardstick(variant: str) -> Callable[..., Tensor] | None:
    """Return the reference with the operands of fp8 in e4m3; None for a variant that rounds to its dtype only."""
    return partial(_rounded, variant.partition("+")[0] == FP8) if _in_fp8(variant) else None


def _rounded(attention: bool, *, x: Tensor, layers: nn.ModuleList, **lengths: Any) -> Tensor:
    layers, kernels = copy.deepcopy(layers).float(), Operators.reference()
    if attention:
        kernels = kernels.replace(hstu_attention=with_fp8_products(kernels.hstu_attention))
    return _run(quantise_layers(layers, kernels, FP8), x.float(), layers, **lengths)


def bind(variant: str, **given: Any) -> Callable[[], Tensor]:
    """Return the call that is timed: the layers, or one replay of their graph."""
    kernels = Operators.of(_kernels(variant))
    if _in_fp8(variant):
        given["layers"] = copy.deepcopy(given["layers"])
        round_layers(given["layers"])

    def call() -> Tensor:
        return _run(kernels, **given)

    if not variant.endswith(GRAPH):
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels compile and libraries initialise here, outside the capture
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay(_: object = given) -> Tensor:  # the graph has addresses only, and nobody else keeps rounded weights
        graph.replay()
        return out

    return replay


@torch.inference_mode()
def _run(kernels: Operators, x: Tensor, layers: nn.Module, offsets: Tensor, num_targets: Tensor, length: int) -> Tensor:
    x = x.clone()  # the layers work in place
    lengths = {"q_offsets": offsets, "num_targets": num_targets, "max_q_len": length, "max_kv_len": length}
    projected = kernels.projected_attention
    blocks = projected.blocks_of(offsets, x.shape[0]) if projected else None
    for layer in layers.children():
        assert isinstance(layer, HSTULayer)
        masks: dict[str, Any] = {**lengths, "scaling_seqlen": 1024, "alpha": layer.qk_dim**-0.5}
        if projected is not None:  # it writes the operands of attention, as HSTURanker has it without a cache
            u, operands = layer.project_operands(x, None, blocks, kernels, projected)
            a = projected.attend(operands, x.dtype, **masks)
        else:
            u, q, k, v = layer.project(x, kernels)
            a = kernels.hstu_attention(q, k, v, kv_offsets=offsets, **masks)
        x = layer.combine(x, u, a, kernels)
    return x
