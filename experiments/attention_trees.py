"""Compare the CUTLASS attention kernels of two source trees on one GPU, interleaved in one process.

    git worktree add /tmp/before REVISION
    python experiments/attention_trees.py /tmp/before/kernels kernels [--rounds 60] [--only SUBSTRING] [--json FILE]

Each tree's launches of a shape are captured in one CUDA graph of about 5 ms. Rounds replay both graphs in alternating
order. The table has the median of the rounds' ratios, its distribution-free 95% interval, and whether both results are
equal bit by bit. Host time is that of 300 queued calls on a tiny batch.

The exit code is 1 if a result differs or an interval of device time reaches beyond 1%.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import torch

TREES = ("old", "new")
HOST_CALLS = 300


@dataclass
class Tree:
    """One tree's attention function and the shapes and inputs of its bench module."""

    attention: Callable[..., torch.Tensor]
    bench: Any

    @classmethod
    def load(cls, kernels: Path) -> Tree:
        """Import grkernels from `kernels`, whichever tree was imported before."""
        for name in [name for name in sys.modules if name.split(".")[0] == "grkernels"]:
            del sys.modules[name]
        sys.path.insert(0, str(kernels))
        try:
            attention = importlib.import_module("grkernels.hstu_attention.cutlass").hstu_attention
            bench = importlib.import_module("grkernels.hstu_attention.bench")
        finally:
            sys.path.pop(0)
        return cls(attention, bench)


@dataclass
class Case:
    """One shape: arguments that both trees take, and what each tree made of them."""

    arguments: dict[str, Any]
    calls: int  # launches in a graph
    graphs: dict[str, torch.cuda.CUDAGraph] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


def shapes(bench: Any) -> Iterator[tuple[str, Any, torch.dtype, dict[str, int]]]:
    """The bench's own shapes in bf16, then fp16, windows, contextual tokens and split sequences."""
    for name, shape in bench.SHAPES.items():
        yield name, shape, torch.bfloat16, {}
    shape = bench.Shape
    wide = {"qk_dim": 256, "v_dim": 256}
    yield "4x128_b32_s4096_fp16", shape(32, 4096), torch.float16, {}
    yield "4x256_b16_s1024_fp16", shape(16, 1024, **wide), torch.float16, {}
    yield "4x128_b8_s8192_window512", shape(8, 8192), torch.bfloat16, {"max_attn_len": 512}
    yield "4x128_b16_s2048_contextual64", shape(16, 2048, 128), torch.bfloat16, {"contextual_seq_len": 64}
    yield "4x256_b1_append_3968+384", shape(1, 128, 256, 3968, **wide), torch.bfloat16, {}
    yield "4x256_b1_append_3968+384_page64", shape(1, 128, 256, 3968, page=64, **wide), torch.bfloat16, {}
    yield "4x128_b2_append_8192+1", shape(2, 1, 0, 8192), torch.bfloat16, {}


def prepare(folders: dict[str, Path], only: str) -> tuple[dict[str, Tree], dict[str, Case]]:
    """Load each tree, compile every shape with it and capture its graphs.

    A tree is complete before the next one is loaded: what it imports at its first call must be its own.
    """
    trees: dict[str, Tree] = {}
    cases: dict[str, Case] = {}
    for which, folder in folders.items():
        trees[which] = tree = Tree.load(folder)
        for arguments in host_cases(tree).values():
            tree.attention(**arguments)
        for name, shape, dtype, options in shapes(tree.bench):
            if only not in name:
                continue
            if name not in cases:
                arguments = {**tree.bench.inputs(shape, dtype=dtype, device="cuda", seed=1), **options}
                tree.attention(**arguments)
                calls = int(5.0 / max(milliseconds(lambda t=tree, a=arguments: t.attention(**a)), 1e-3))  # type: ignore[misc]
                cases[name] = Case(arguments, max(3, min(100, calls)))
            case = cases[name]
            case.outputs[which] = tree.attention(**case.arguments)
            case.graphs[which] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(case.graphs[which]):
                for _ in range(case.calls):
                    tree.attention(**case.arguments)
    return trees, cases


def host_cases(tree: Tree) -> dict[str, dict[str, Any]]:
    """Arguments of the tiny batches that host time is measured with."""
    shape, inputs = tree.bench.Shape, tree.bench.inputs
    tiny = {"host, dense": shape(8, 4, 2), "host, paged": shape(8, 4, 2, 256, page=64)}
    return {name: inputs(s, dtype=torch.bfloat16, device="cuda", seed=2) for name, s in tiny.items()}


def milliseconds(work: Callable[[], Any]) -> float:
    """Time `work` on the device."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def host_microseconds(tree: Tree, arguments: dict[str, Any]) -> float:
    """Time one call that only queues its work."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(HOST_CALLS):
        tree.attention(**arguments)
    return (time.perf_counter() - begin) / HOST_CALLS * 1e6


def alternate(time_of: Callable[[str], float], rounds: int) -> dict[str, Any]:
    """Time both trees in alternating order. Return their medians, the ratio new / old and its 95% interval."""
    times: dict[str, list[float]] = {which: [] for which in TREES}
    for which in TREES * 3:
        time_of(which)
    for i in range(rounds):
        for which in TREES if i % 2 else TREES[::-1]:
            times[which].append(time_of(which))
    ratios = sorted(new / old for old, new in zip(times["old"], times["new"], strict=True))
    end = max(int((len(ratios) - 1.96 * math.sqrt(len(ratios))) / 2) - 1, 0)
    medians = {which: statistics.median(values) for which, values in times.items()}
    return {**medians, "ratio": statistics.median(ratios), "low": ratios[end], "high": ratios[-1 - end]}


def compare(folders: dict[str, Path], rounds: int, only: str) -> list[dict[str, Any]]:
    """Return one row a shape (device milliseconds), then two of host microseconds, printed as they come."""
    trees, cases = prepare(folders, only)
    rows: list[dict[str, Any]] = []
    for name, case in cases.items():
        row = alternate(lambda w, c=case: milliseconds(c.graphs[w].replay) / c.calls, rounds)  # type: ignore[misc]
        equal = torch.equal(case.outputs["old"], case.outputs["new"])
        rows.append({"shape": name, "unit": "ms", **row, "equal": equal})
        show(rows[-1])
    for name, arguments in host_cases(trees["old"]).items():
        row = alternate(lambda w, a=arguments: host_microseconds(trees[w], a), rounds)  # type: ignore[misc]
        rows.append({"shape": name, "unit": "us", **row})
        show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    times = f"{row['old']:9.4f} {row['new']:9.4f} {row['unit']}"
    print(f"{row['shape']:36} {times}  {row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}]", end="  ")
    print({True: "equal", False: "DIFFERS", None: ""}[row.get("equal")], flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="folder that holds the first tree's grkernels")
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of the names of shapes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    common.need_gpu(parser)
    print(f"{torch.cuda.get_device_name()}, {options.rounds} rounds", flush=True)
    rows = compare({which: getattr(options, which) for which in TREES}, options.rounds, options.only)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    on_device = [row for row in rows if row["unit"] == "ms"]
    return 0 if all(row["equal"] and row["low"] >= 0.99 and row["high"] <= 1.01 for row in on_device) else 1


if __name__ == "__main__":
    common.run(main)
