"""Benchmark shapes of hstu_attention, their inputs and their cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from grkernels.families import Sizes
from grkernels.hstu_attention import spec
from grkernels.hstu_attention.extras import Extras
from grkernels.pages import EIGHT_BITS, quantised
from grkernels.variant import Cost


@dataclass(frozen=True)
class Shape:
    """B users of `cached + new + targets` tokens each. Only the last new + targets are queries.

    page > 0: the keys and values of the cached tokens are in pages of `page` tokens. stored: int8 or fp8 for pages in 8
    bits.
    """

    batch: int
    new: int  # history tokens that are queries
    targets: int = 0
    cached: int = 0
    heads: int = 4
    qk_dim: int = 128
    v_dim: int = 128
    page: int = 0
    stored: str = ""

    @property
    def length(self) -> int:
        return self.cached + self.new + self.targets


SHAPES = {
    "4x128_b32_s4096": Shape(32, 4096),
    "4x128_b8_s8192": Shape(8, 8192),
    "4x128_b4_s16384": Shape(4, 16384),
    "4x128_b16_s1024": Shape(16, 1024),
    "4x128_b32_1024+2048": Shape(32, 1024, 2048),
    "4x128_b32_s3072": Shape(32, 3072),  # the same tokens as above: what a kernel that skips no target tile does
    "4x128_b1_1024+256": Shape(1, 1024, 256),
    "4x256_b32_s4096": Shape(32, 4096, qk_dim=256, v_dim=256),
    "4x256_b16_s1024": Shape(16, 1024, qk_dim=256, v_dim=256),
    "4x256_b8_delta_3968+384": Shape(8, 128, 256, 3968, qk_dim=256, v_dim=256),
    "4x256_b8_delta_3968+384_page64": Shape(8, 128, 256, 3968, qk_dim=256, v_dim=256, page=64),
    "4x256_b8_delta_3968+384_page32": Shape(8, 128, 256, 3968, qk_dim=256, v_dim=256, page=32),
    "4x256_b8_delta_3968+384_page128": Shape(8, 128, 256, 3968, qk_dim=256, v_dim=256, page=128),
    "4x256_b8_delta_3968+384_page64_int8": Shape(8, 128, 256, 3968, qk_dim=256, v_dim=256, page=64, stored="int8"),
    "4x256_b8_delta_3968+384_page64_fp8": Shape(8, 128, 256, 3968, qk_dim=256, v_dim=256, page=64, stored="fp8"),
    "4x128_b32_delta_8192+1": Shape(32, 1, 0, 8192),
    "4x128_b32_delta_8192+16": Shape(32, 16, 0, 8192),
}


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return keyword arguments of the family's functions.

    q, k and v are strided views of one projection, as in the layer. Values have unit scale, so scores are of order 1.
    """
    generator = torch.Generator(device).manual_seed(seed)
    H, dqk, dv, B = shape.heads, shape.qk_dim, shape.v_dim, shape.batch
    rows = shape.new + shape.targets

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    def offsets(length: int) -> torch.Tensor:
        return torch.arange(B + 1, device=device, dtype=torch.int64) * length

    v, q, k = random(B * rows, H * (dv + 2 * dqk)).split([H * dv, H * dqk, H * dqk], dim=1)
    q, k, v = (x.unflatten(1, (H, -1)) for x in (q, k, v))
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "q_offsets": offsets(rows),
        "num_targets": torch.full((B,), shape.targets, device=device, dtype=torch.int64) if shape.targets else None,
        "max_q_len": rows,
        "max_kv_len": shape.length,
        "scaling_seqlen": shape.length,
        "alpha": 1.0 / math.sqrt(dqk),
    }
    arguments["kv_offsets"] = arguments["q_offsets"]
    if shape.page:
        pages = -(-shape.cached // shape.page)
        arguments["k_pages"] = random(B * pages, shape.page, H, dqk)
        arguments["v_pages"] = random(B * pages, shape.page, H, dv)
        if shape.stored:
            for x in ("k", "v"):
                numbers, scales = quantised(arguments[f"{x}_pages"], EIGHT_BITS[shape.stored])
                arguments |= {f"{x}_pages": numbers, f"{x}_scales": scales}
        order = torch.randperm(B * pages, generator=generator, device=device)
        arguments["page_table"] = order.view(B, pages).to(torch.int32)
        arguments["paged_lengths"] = torch.full((B,), shape.cached, device=device, dtype=torch.int64)
    elif shape.cached:
        arguments["k"], arguments["v"] = random(B * shape.length, H, dqk), random(B * shape.length, H, dv)
        arguments["kv_offsets"] = offsets(shape.length)
    return arguments


def of_model(sizes: Sizes, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return `inputs` of a batch of a model: whole histories, or with pages new events behind those that are cached."""
    new = max(sizes.events // 8, 1) if sizes.page else sizes.events
    heads = sizes.heads, sizes.qk_dim, sizes.v_dim
    shape = Shape(sizes.users, new, sizes.candidates, sizes.events - new, *heads, sizes.page, sizes.stored)
    arguments = inputs(shape, dtype=dtype, device=device, seed=0)
    return arguments | ({"extras": _extras(sizes, len(arguments["q"]), dtype, device)} if sizes.attention else {})


def _extras(sizes: Sizes, rows: int, dtype: torch.dtype, device: str) -> Extras:
    """Return the options of other HSTU models. rows: tokens of the batch. Over pages no token has a time."""
    options = dict(option.removeprefix("model.").split("=") for option in sizes.attention)
    buckets = 0 if sizes.page else int(options.get("time_bias", 0))
    times = torch.arange(rows, device=device) if buckets else None
    return Extras(
        target_group_size=int(options.get("target_group_size", 1)),
        position_bias=torch.zeros(sizes.events, dtype=dtype, device=device) if "position_bias" in options else None,
        time_bias=torch.zeros(buckets, dtype=dtype, device=device) if buckets else None,
        row_times=times,
        column_times=times,
    )


def cost(shape: Shape, dtype: str) -> Cost:
    """Return mask-exact FLOPs and least bytes. dtype: fp32, fp16 or bf16."""
    rows = shape.new + shape.targets
    pairs = shape.batch * spec.visible_pairs(shape.length, shape.targets, delta=rows)
    heads = (shape.heads, shape.qk_dim, shape.v_dim)
    moved = spec.bytes_moved(shape.batch * rows, shape.batch * shape.length, *heads, dtype)
    if shape.stored:  # a byte a number and two scales, for each cached token and head
        a_head = (spec.BYTES[dtype] - 1) * (shape.qk_dim + shape.v_dim) - 8
        moved -= shape.batch * shape.cached * shape.heads * a_head
    return Cost(spec.flops(pairs, *heads), moved)


def supports_args(shape: Shape) -> dict[str, Any]:
    """Return keyword arguments of `KernelVariant.supports` besides device and dtype."""
    return {"qk_dim": shape.qk_dim, "v_dim": shape.v_dim, "page": shape.page, "stored": shape.stored}
