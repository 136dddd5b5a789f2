"""Attention in bf16 and with products in e4m3, and the two parts of the latter: rounding Q, K and V, and attention.

    python experiments/fp8_attention.py [--rounds 30] [--only SUBSTRING ...] [--launches "n=64 chunk=128" ...]

Calls are timed as `grbench kernels` times them: interleaved, on two sets of inputs, with the L2 cache full of other
data. `grbench kernels families=[hstu_attention] variants=[cutlass,fp8]` also checks the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import common
import numpy as np
import torch

from grbench.kernelbench.config import KernelBenchConfig, changes_of
from grbench.kernelbench.timing import interleaved
from grkernels import tuning
from grkernels.hstu_attention import bench

MASK = ("num_targets", "scaling_seqlen", "alpha")  # arguments of attention that rounding has no use for
Calls = dict[str, Callable[[], Any]]


def calls_of(given: dict[str, Any], changes: Sequence[dict[str, int]]) -> Calls:
    """The four calls for one set of inputs, and attention with each change to its launch configuration."""
    from grkernels.hstu_attention import cutlass, fp8
    from grkernels.hstu_attention.fp8_operands import quantised

    whole = {name: x for name, x in given.items() if name not in MASK}
    ready = quantised(**whole)

    def attention(change: dict[str, int]) -> Any:
        with tuning.changed("hstu_attention", "fp8", change):
            return fp8.hstu_attention(**given, operands=ready)

    return {
        "bf16": lambda: cutlass.hstu_attention(**given),
        "fp8": lambda: fp8.hstu_attention(**given),
        "rounding": lambda: quantised(**whole),
        "attention": lambda: attention({}),
        **{f"attention {tuning.words(change)}": lambda c=change: attention(c) for change in changes},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", rounds=30, overrides=False)
    parser.add_argument("--only", nargs="*", default=[""], metavar="SUBSTRING", help="of the names of shapes")
    parser.add_argument("--launches", nargs="*", default=[], metavar="CHANGE", help="such as 'n=64 chunk=128'")
    args = parser.parse_args(arguments)
    common.need_gpu(parser)
    rows = common.Rows(args, __file__, arguments)
    changes = changes_of(KernelBenchConfig(launches=args.launches))
    for name, shape in bench.SHAPES.items():
        if not any(part in name for part in args.only):
            continue
        made = [bench.inputs(shape, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in range(2)]
        sets = [calls_of(given, changes) for given in made]
        for part, call in [*sets[0].items()]:
            try:
                call()
            except ValueError as e:  # tiles that don't fit
                rows.fail(e, shape=name, part=part)
                for each in sets:
                    del each[part]
        times = interleaved(
            {part: [each[part] for each in sets] for part in sets[0]}, "cuda", repeats=args.rounds, min_time_s=0.5
        )
        for error in times.failed.values():
            raise error
        gflop = bench.cost(shape, "bf16").flops / 1e9
        for part, ms in times.ms.items():
            p50 = float(np.median(ms))
            rows.add(shape=name, part=part, p50_ms=p50, **({} if part == "rounding" else {"tflops": gflop / p50}))
    rows.close()


if __name__ == "__main__":
    common.run(main)
