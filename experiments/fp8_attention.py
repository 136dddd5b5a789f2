"""Attention in bf16 and with products in e4m3, its parts, and the projection before it.

    python experiments/fp8_attention.py [--rounds 30] [--only SUBSTRING ...] [--launches "n=64 chunk=128" ...] \
        [--projections "columns=128" ...]

The parts are rounding Q, K and V, and attention. The projection is PyTorch's product in bf16 or e4m3 ("+product"), or
the one that writes the operands of attention ("operands").

Calls are timed as `grbench kernels` times them: interleaved, on two sets of inputs, with the L2 cache full of other
data. `grbench kernels families=[hstu_attention] variants=[cutlass,fp8]` also checks the results.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from triton.runtime.errors import OutOfResources

from grbench.kernelbench.config import KernelBenchConfig, changes_of
from grbench.kernelbench.timing import interleaved
from grkernels import fp8, tuning
from grkernels.fp8 import Scaled
from grkernels.hstu_attention import bench

MASK = ("num_targets", "scaling_seqlen", "alpha")  # arguments of attention that rounding has no use for
Calls = dict[str, Callable[[], Any]]


def calls_of(given: dict[str, Any], changes: Sequence[dict[str, int]]) -> Calls:
    """The four calls for one set of inputs, and attention with each change to its launch configuration."""
    from grkernels.hstu_attention import cutlass
    from grkernels.hstu_attention import fp8 as attention_in_fp8
    from grkernels.hstu_attention.fp8_operands import quantised

    whole = {name: x for name, x in given.items() if name not in MASK}
    masked = {name: x for name, x in given.items() if name in (*MASK, "q_offsets", "max_q_len", "max_kv_len")}
    ready = quantised(**whole)

    def attention(change: dict[str, int]) -> Any:
        with tuning.changed("hstu_attention", "fp8", change):
            return attention_in_fp8.attend(ready, given["v"].dtype, **masked)

    return {
        "bf16": lambda: cutlass.hstu_attention(**given),
        "fp8": lambda: attention_in_fp8.hstu_attention(**given),
        "rounding": lambda: quantised(**whole),
        "attention": lambda: attention({}),
        **{f"attention {tuning.words(change)}": lambda c=change: attention(c) for change in changes},
    }


def projections_of(shape: bench.Shape, seed: int, changes: Sequence[dict[str, int]]) -> Calls:
    """The projection of whole histories, whose rows are as wide as all heads together."""
    from grkernels.hstu_attention.fp8_projection import blocks_of, project

    generator = torch.Generator("cuda").manual_seed(seed)
    rows, E = shape.batch * shape.length, shape.heads * shape.qk_dim

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16)

    x, weight, bias = random(rows, E), random(4 * E, E) * E**-0.5, random(4 * E)
    narrow, rounded = Scaled.of(x), Scaled.of(weight)
    scales = rounded.scales.t().contiguous()
    sizes = {"heads": shape.heads, "qk_dim": shape.qk_dim, "v_dim": shape.v_dim}
    offsets = torch.arange(shape.batch + 1, device="cuda") * shape.length

    def operands(in_fp8: bool, change: dict[str, int]) -> Any:
        given = (narrow, narrow, rounded.values, scales) if in_fp8 else (x, x, weight, None)
        with tuning.changed("hstu_attention", "fp8_projection", change):
            return project(*given, bias, **sizes, blocks=blocks_of(offsets, rows))

    calls: Calls = {
        "projection": lambda: F.linear(x, weight, bias),
        "projection+product": lambda: fp8.product(narrow, rounded.values, scales, bias),
    }
    for change in ({}, *changes):
        name = f"operands {tuning.words(change)}".strip()
        calls[name] = lambda c=change: operands(False, c)  # type: ignore[misc]
        calls[f"{name}+product"] = lambda c=change: operands(True, c)  # type: ignore[misc]
    return calls


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", rounds=30, overrides=False)
    parser.add_argument("--only", nargs="*", default=[""], metavar="SUBSTRING", help="of the names of shapes")
    parser.add_argument("--launches", nargs="*", default=[], metavar="CHANGE", help="such as 'n=64 chunk=128'")
    parser.add_argument("--projections", nargs="*", default=[], metavar="CHANGE", help="such as 'columns=128 warps=4'")
    args = parser.parse_args(arguments)
    common.need_gpu(parser)
    rows = common.Rows(args, __file__, arguments)
    changes = changes_of(KernelBenchConfig(launches=args.launches))
    projections = changes_of(KernelBenchConfig(launches=args.projections))
    for name, shape in bench.SHAPES.items():
        if not any(part in name for part in args.only):
            continue
        made = [bench.inputs(shape, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in range(2)]
        sets = [calls_of(given, changes) for given in made]
        if not shape.cached:
            for seed, each in enumerate(sets):
                each |= projections_of(shape, seed, projections)
        for part, call in [*sets[0].items()]:
            try:
                call()
            except (ValueError, OutOfResources) as e:  # tiles that don't fit
                rows.fail(e, shape=name, part=part)
                for each in sets:
                    del each[part]
        times = interleaved(
            {part: [each[part] for each in sets] for part in sets[0]}, "cuda", repeats=args.rounds, min_time_s=0.5
        )
        for error in times.failed.values():
            raise error
        gflop = {"attention": bench.cost(shape, "bf16").flops / 1e9, "rounding": 0.0}
        projected = 8e-9 * shape.batch * shape.length * (shape.heads * shape.qk_dim) ** 2
        gflop |= dict.fromkeys(("projection", "operands"), projected)
        for part, ms in times.ms.items():
            p50, work = float(np.median(ms)), gflop.get(re.split("[ +]", part)[0], gflop["attention"])
            rows.add(shape=name, part=part, p50_ms=p50, **({"tflops": work / p50} if work else {}))
    rows.close()


if __name__ == "__main__":
    common.run(main)
