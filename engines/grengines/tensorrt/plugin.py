"""HSTU attention as a TensorRT plugin: the Triton kernel, compiled ahead of time into the plan (TensorRT only).

It replaces the function `grbench::hstu_attention` of an exported model. It is written against the documented API of
`tensorrt.plugin` (register, autotune, aot_impl; TensorRT 10.13), and has not run with TensorRT yet. Tests check that
the kernel compiles, and that its parameters have TensorRT's order: inputs, integers, outputs.

All options of the model are constants of the kernel, so the plugin has no attributes. aot_impl would have to take all
of them, in register's order, and a parser may pass a float as a double.
"""

# No `from __future__ import annotations`: tensorrt.plugin reads the annotations themselves.

import functools
import re
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grengines.export.onnx_attention import DOMAIN, NAME
from grengines.models.hstu.config import HSTUConfig
from grengines.runtime.device import DTYPES
from grengines.runtime.profile import Sizes
from grkernels import tuning
from grkernels.hstu_attention.keys import tuning_key
from grkernels.hstu_attention.triton import attention_kernel, default_config

_attention = attention_kernel.kernel
POINTERS = ("q", "k", "v", "q_offsets", "offsets", "num_targets", "tiles", "columns")


class Compiled(NamedTuple):
    """A compiled kernel and its launch sizes."""

    name: str
    ptx: str
    threads: int  # of a block
    shared: int  # bytes of a block
    rows: int  # query rows of a block


class Target(NamedTuple):
    """The model, the largest batch and the GPU that the kernel is compiled for."""

    model: HSTUConfig
    most: Sizes
    capability: str  # for instance 9.0


_target: Target | None = None  # of the last call of `register`


@triton.jit
def hstu_attention_plugin(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q_offsets: tl.tensor,
    offsets: tl.tensor,
    num_targets: tl.tensor,
    tiles: tl.tensor,
    columns: tl.tensor,
    total_rows: tl.tensor,
    out: tl.tensor,
    HEADS: tl.constexpr,
    CONTEXT: tl.constexpr,
    WINDOW: tl.constexpr,
    HALF_ALPHA: tl.constexpr,
    SCALE: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    QK_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """The kernel with its parameters in TensorRT's order. TensorRT's tensors are contiguous."""
    _attention(
        q, k, v, out, k, v, k, v, q_offsets, offsets, num_targets, offsets, offsets,
        HEADS * QK, QK, HEADS * QK, QK, HEADS * V, V, 0, 0, 0, 0, 0, 0, HEADS, CONTEXT, WINDOW,
        0, total_rows, HALF_ALPHA, SCALE,
        True, CONTEXT > 0, WINDOW > 0, 0, 0, QK, V, QK_BLOCK, V_BLOCK, M, N,
    )  # fmt: skip


def compile_kernel(model: HSTUConfig, dtype: str, target: str, most: Sizes) -> Compiled:
    """Compile the plugin's kernel for a compute capability ("9.0"), without a GPU. dtype: fp32, fp16 or bf16."""
    config = _launch_configuration(model, DTYPES[dtype], most)
    constants = {
        "HEADS": model.heads,
        "CONTEXT": model.contextual_seq_len,
        "WINDOW": model.max_attn_len,
        "HALF_ALPHA": (model.alpha if model.alpha is not None else model.qk_dim**-0.5) / 2,
        "SCALE": 1.0 / model.scaling_seqlen,
        "QK": model.qk_dim,
        "V": model.v_dim,
        "QK_BLOCK": triton.next_power_of_2(max(model.qk_dim, 16)),
        "V_BLOCK": triton.next_power_of_2(max(model.v_dim, 16)),
        "M": config["m"],
        "N": config["n"],
    }
    kinds = dict.fromkeys(POINTERS, "*i64") | dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")
    names = hstu_attention_plugin.arg_names
    signature = {name: kinds.get(name, "i32" if name == "total_rows" else "constexpr") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in kinds}
    source = ASTSource(hstu_attention_plugin, signature, constants, attributes)
    capability = int(target.replace(".", ""))
    options = {"num_warps": config["warps"], "num_stages": config["stages"]}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = _without_unused(made.asm["ptx"], made.metadata.name, len(POINTERS) + 2)
    return Compiled(made.metadata.name, ptx, made.metadata.num_warps * 32, made.metadata.shared, config["m"])


def _launch_configuration(model: HSTUConfig, dtype: torch.dtype, most: Sizes) -> tuning.Config:
    """Return the kernel's tiles, warps and stages for batches of these sizes."""
    with torch.device("meta"):  # the key takes a call's arguments
        q = torch.empty(most.tokens, model.heads, model.qk_dim, dtype=dtype)
        v = torch.empty(most.tokens, model.heads, model.v_dim, dtype=dtype)
        offsets, targets = torch.empty(most.batch + 1), torch.empty(most.batch)
    key = tuning_key(
        q=q,
        v=v,
        q_offsets=offsets,
        num_targets=targets,
        max_q_len=most.longest,
        max_kv_len=most.longest,
        contextual_seq_len=model.contextual_seq_len,
        max_attn_len=model.max_attn_len,
    )
    default = default_config(max(model.qk_dim, model.v_dim), most.longest, dtype)
    return tuning.choose("hstu_attention", "triton", key, default)


def substitute(onnx: Path, out: Path) -> Path:
    """Write the model to `out` with the plugin's nodes instead of the function's. Returns `out`."""
    from onnx import helper, load, save

    model = load(str(onnx))
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, NAME):
            node.domain = ""  # the parser finds a plugin by the operator's name and the namespace
            del node.attribute[:]
            node.attribute.extend([helper.make_attribute("plugin_namespace", DOMAIN), helper.make_attribute("aot", 1)])
    functions = [f for f in model.functions if (f.domain, f.name) != (DOMAIN, NAME)]
    del model.functions[:]
    model.functions.extend(functions)
    save(model, str(out), save_as_external_data=True, location=f"{out.name}.data")
    return out


def register(model: HSTUConfig, most: Sizes, target: str) -> None:
    """Register `grbench::hstu_attention` with TensorRT; plans that are built from now on have this model's kernel."""
    global _target
    _target = Target(model, most, target)
    _register_once()


@functools.cache
def _register_once() -> None:
    """Register the plugin, which TensorRT accepts once in a process."""
    import tensorrt as trt
    import tensorrt.plugin as trtp

    names = {trt.DataType.FLOAT: "fp32", trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}

    @trtp.register(f"{DOMAIN}::{NAME}")
    def describe(
        q: trtp.TensorDesc,
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        q_offsets: trtp.TensorDesc,
        offsets: trtp.TensorDesc,
        num_targets: trtp.TensorDesc,
        tiles: trtp.TensorDesc,
        columns: trtp.TensorDesc,
    ) -> trtp.TensorDesc:
        shape = q.shape_expr[0], v.shape_expr[1], v.shape_expr[2]
        described: trtp.TensorDesc = trtp.from_shape_expr(shape, dtype=v.dtype)
        return described

    @trtp.autotune(f"{DOMAIN}::{NAME}")
    def formats(
        q: trtp.TensorDesc,
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        q_offsets: trtp.TensorDesc,
        offsets: trtp.TensorDesc,
        num_targets: trtp.TensorDesc,
        tiles: trtp.TensorDesc,
        columns: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        return [
            trtp.AutoTuneCombination(", ".join([t, t, t, *["INT64"] * 5, t]), "LINEAR")
            for t in ("FP32", "FP16", "BF16")
        ]

    @trtp.aot_impl(f"{DOMAIN}::{NAME}")
    def compiled(
        q: trtp.TensorDesc,
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        q_offsets: trtp.TensorDesc,
        offsets: trtp.TensorDesc,
        num_targets: trtp.TensorDesc,
        tiles: trtp.TensorDesc,
        columns: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        assert _target is not None
        made = compile_kernel(_target.model, names[q.dtype], _target.capability, _target.most)
        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.cdiv(tiles.shape_expr.numel(), made.rows)
        launch.grid_y = _target.model.heads
        launch.grid_z = offsets.shape_expr[0]  # the last one zeroes the rows after the sequences
        launch.block_x = made.threads
        launch.shared_mem = made.shared
        integers = trtp.SymIntExprs(1)
        integers[0] = trtp.SymInt32(q.shape_expr[0])
        return made.name, made.ptx, launch, integers


def _without_unused(ptx: str, kernel: str, count: int) -> str:
    """Return the PTX with only the first `count` parameters of its entry.

    Triton adds pointers to scratch memory, which TensorRT does not pass and this kernel does not use. Raises
    RuntimeError if it does.
    """
    head = re.search(rf"\.entry {kernel}\((.*?)\)", ptx, re.DOTALL)
    if head is None:
        raise RuntimeError(f"Triton's PTX has no entry {kernel}")
    parameters = [p.strip() for p in head.group(1).split(",")]
    kept = parameters[:count]
    for parameter in parameters[count:]:
        name = parameter.split()[-1]
        if len(re.findall(rf"\b{name}\b", ptx)) > 1:
            raise RuntimeError(f"Triton's kernel {kernel} uses {name}, which TensorRT does not pass")
    return ptx[: head.start(1)] + "\n\t" + ",\n\t".join(kept) + "\n" + ptx[head.end(1) :]
