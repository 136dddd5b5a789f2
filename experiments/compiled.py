"""The compiled engines beside the native one: python experiments/compiled.py [--device cpu --tiny]

One process, one model after another. Every engine is built once, for the largest batch, and ranks batches of every
shape, engines in turns so that all see the same clocks. Times are wall clock around `rank`: packing, copies,
computation, scores on the host. Every engine's scores of each shape are first checked against the fp32 reference; one
that is wrong has no times. An engine that can't be built is a line that says why. Prints a Markdown table; --output
writes it, and every sample.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from user_cache import requests_of

from grbench.config.compose import compose_spec
from grengines import registry
from grengines.aoti import package as packages
from grengines.aoti.config import AOTIEngineConfig
from grengines.aoti.engine import AOTIEngine
from grengines.aoti.package import Facts, Inputs, Package
from grengines.api import Catalogue, Request, Setup
from grengines.cache.config import CacheConfig
from grengines.export.module import ExportedRanker
from grengines.hstu.config import HSTUEngineConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import build_model
from grengines.models.hstu.reference import RankingReference
from grengines.onnxruntime.config import OnnxRuntimeConfig
from grengines.runtime.profile import profiles
from grkernels.config import KernelConfig, KernelGroup
from grkernels.operators import Operators

CATALOGUE = Catalogue(num_users=100, num_items=20_000, num_actions=8)
Shape = tuple[int, int, int]  # requests of a batch, history, candidates


_ATTENTION: dict[str, Callable[..., torch.Tensor]] = {}  # the variant that the operator below runs


@torch.library.custom_op("grbench_study::hstu_attention", mutates_args=())
def opaque_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    num_targets: torch.Tensor,
    tiles: torch.Tensor,
    columns: torch.Tensor,
    alpha: float,
    scaling_seqlen: int,
    contextual_seq_len: int,
    max_attn_len: int,
) -> torch.Tensor:
    """Attention as an operator that torch.compile calls as it is."""
    inputs = (q, k, v, offsets, num_targets, tiles, columns)
    return _ATTENTION["now"](*inputs, alpha, scaling_seqlen, contextual_seq_len, max_attn_len)


@opaque_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
    return v.new_empty(q.shape[0], v.shape[1], v.shape[2])


class TorchCompile(AOTIEngine):
    """torch.compile of the whole model, attention by the project's kernel, the rest by what Inductor makes of plain
    PyTorch."""

    def _load(self, sample: Any, max_batch: int) -> None:
        sizes, heads = profiles(sample, self._encoding, max_batch, 2), self._model_config.heads
        facts = Facts.here("", self._precision, self._device, self._kernels, heads, sizes[-1], sizes[0])
        facts = replace(facts, tiles=1)
        _ATTENTION["now"] = packages.attention(self._operators.hstu_attention, 0)
        ranker = build_model(self._model_config, CATALOGUE, 0, self._device, self._dtype)
        module = ExportedRanker(ranker, opaque_attention, Operators.eager())
        compiled = torch.compile(module, dynamic=True, fullgraph=True)
        self._package = Package(Path(), facts, [], lambda inputs: [compiled(*inputs)])
        self._inputs = Inputs(facts, self._device)

    def _warm_up(self, sample: Any, max_batch: int) -> None:
        self.rank(sample[-max_batch:])
        self.rank(sample[:1])


def kernels(name: str) -> KernelGroup:
    return KernelConfig(name=name)


class Study:
    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.args, self.name, gpu = args, name, args.device == "cuda"
        self.model: HSTUConfig = compose_spec([f"model={name}"])[0].model
        precision = "bf16" if gpu else "fp32"
        self.batches: dict[Shape, list[Request]] = {
            (b, h, c): requests_of(b, h, c) for b in args.batches for h in args.histories for c in args.candidates
        }
        self.sample = sorted((r for batch in self.batches.values() for r in batch), key=tokens)
        lengths = sorted({tokens(r) for r in self.sample})
        native = {"device": args.device, "precision": precision}
        graphs = {"cuda_graphs": True, "graph_lengths": lengths}
        best = "triton" if gpu else "torch"
        self.cases: dict[str, Callable[[], Any]] = {
            f"native {best}": lambda: self.build(HSTUEngineConfig(**native), best),
            f"torch.compile {best}": lambda: self.compiled(AOTIEngineConfig(**native), best),
            f"aoti {best}": lambda: self.build(AOTIEngineConfig(**native), best),
            "onnxruntime": lambda: self.build(
                OnnxRuntimeConfig(device=args.device, precision="fp16" if gpu else "fp32", onnx=self.onnx()), "torch"
            ),
        }
        if gpu:
            self.cases |= {
                "native cutlass": lambda: self.build(HSTUEngineConfig(**native), "cutlass"),
                "native triton, graphs": lambda: self.build(HSTUEngineConfig(**native, **graphs), "triton"),
                "native cutlass, graphs": lambda: self.build(HSTUEngineConfig(**native, **graphs), "cutlass"),
                "aoti triton, graphs": lambda: self.build(AOTIEngineConfig(**native, **graphs), "triton"),
            }
        self.reference = RankingReference(self.model, CATALOGUE, 0, args.device)
        self.engines: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []

    def build(self, config: Any, kernel: str) -> Any:
        return registry.build(config, self.model, kernels(kernel), CATALOGUE, 0)

    def compiled(self, config: AOTIEngineConfig, kernel: str) -> Any:
        return TorchCompile(config, Setup(self.model, kernels(kernel).requested(), CATALOGUE, 0, CacheConfig()))

    def onnx(self) -> str | None:
        found = Path(self.args.onnx) / self.name / "model.onnx" if self.args.onnx else None
        return str(found) if found is not None and found.is_file() else None

    def prepare(self) -> None:
        """Build every engine; what can't be built is a row of its own."""
        for case, make in self.cases.items():
            begun = time.perf_counter()
            try:
                engine = make()
                engine.prepare(self.sample, max(self.args.batches))
            except Exception as e:
                reason = " ".join(str(e).split())[:300] or type(e).__name__
                print(f"{self.name} {case}: FAILED after {time.perf_counter() - begun:.1f} s: {reason}", flush=True)
                self.rows.append({"model": self.name, "engine": case, "status": f"{type(e).__name__}: {reason}"})
                continue
            actual = engine.actual()
            # A package that was there is not built again: its own time is what it took when it was.
            took = time.perf_counter() - begun
            size = next((actual[k] for k in ("package_bytes", "onnx_bytes") if actual.get(k)), 0)
            self.engines[case] = engine, took, size
            print(f"{self.name} {case}: ready after {took:.1f} s, {size / 1e6:.1f} MB", flush=True)

    def measure(self, shape: Shape) -> None:
        """One shape, all engines in turns."""
        batch = self.batches[shape]
        expected = np.concatenate(self.reference.scores(batch[:2]))
        half = "bf16" if self.args.device == "cuda" else "fp32"
        plain = np.concatenate(self.reference.scores(batch[:2], half))
        allowed = max(2 * distance(plain, expected), 2e-5)
        samples: dict[str, list[float]] = {}
        facts: dict[str, dict[str, Any]] = {}
        for case, (engine, took, size) in self.engines.items():
            row = {"model": self.name, "engine": case, "batch": shape[0], "history": shape[1], "candidates": shape[2]}
            facts[case] = row | {"build_s": took, "bytes": size}
            try:
                error = distance(np.concatenate(engine.rank(batch).scores[:2]), expected)
                facts[case] |= {"error": error, "allowed": allowed}
                if not error <= allowed:  # NaN is no less wrong
                    self.rows.append(facts[case] | {"status": f"INCORRECT: error {error:.1e}, allowed {allowed:.1e}"})
                    continue
                for _ in range(2):
                    engine.rank(batch)
            except Exception as e:
                reason = " ".join(str(e).split())[:200] or type(e).__name__
                self.rows.append(facts[case] | {"status": f"{type(e).__name__}: {reason}"})
                continue
            samples[case] = []
        order = np.random.default_rng(0)
        for _ in range(self.args.rounds):
            for case in order.permutation(list(samples)):
                begun = time.perf_counter()
                self.engines[case][0].rank(batch)
                samples[case].append((time.perf_counter() - begun) * 1e3)
        for case, ms in samples.items():
            self.rows.append(
                facts[case]
                | {"status": "OK", "p50_ms": float(np.median(ms)), "rps": shape[0] * 1e3 / float(np.mean(ms))}
                | {"samples_ms": ms}
            )
        best = {case: f"{np.median(ms):.3f}" for case, ms in samples.items()}
        print(f"{self.name} {shape}: {best}", flush=True)

    def close(self) -> None:
        for engine, _, _ in self.engines.values():
            engine.close()


def tokens(request: Request) -> int:
    return len(request.history_items) + len(request.candidates)


def distance(scores: Any, expected: Any) -> float:
    return float(np.linalg.norm(scores - expected) / np.linalg.norm(expected))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the median latency of each shape by engine, the throughput, and what each engine took to be ready."""
    done = [row for row in rows if row["status"] == "OK"]
    engines = list(dict.fromkeys(row["engine"] for row in done))
    parts = [_by_shape(done, engines, f"p50 in ms, and times as fast as {engines[0]}", _latency)] if done else []
    parts += [_by_shape(done, engines, "Requests a second", lambda row, _: f"{row['rps']:.0f}")] if done else []
    ready = ["| model | engine | ready, s | MB | largest error | of allowed |", "|---|---|---|---|---|---|"]
    for model, engine in dict.fromkeys((row["model"], row["engine"]) for row in done):
        of = [row for row in done if (row["model"], row["engine"]) == (model, engine)]
        worst = max(of, key=lambda row: row["error"] / row["allowed"])
        size = f"{of[0]['bytes'] / 1e6:.0f}" if of[0]["bytes"] else "-"
        error = f"{worst['error']:.1e} | {worst['error'] / worst['allowed']:.0%}"
        ready.append(f"| {model} | {engine} | {of[0]['build_s']:.1f} | {size} | {error} |")
    parts.append("\n".join(ready))
    if failures := [row for row in rows if row["status"] != "OK"]:
        lines = [
            f"- {' '.join(map(str, [row['model'], *_shape(row)]))}, {row['engine']}: {row['status']}"
            for row in failures
        ]
        parts.append("\n".join(["Not measured:", "", *lines]))
    return "\n\n".join(parts)


def _by_shape(
    rows: list[dict[str, Any]], engines: list[str], title: str, cell: Callable[[dict[str, Any], dict[str, Any]], str]
) -> str:
    """A table with a row a shape and a column an engine; cell: what to say of a row beside the first engine's."""
    lines = [f"{title}:", "", f"| model | batch | history | candidates | {' | '.join(engines)} |"]
    lines.append("|" + "---|" * (4 + len(engines)))
    for place in dict.fromkeys((row["model"], *_shape(row)) for row in rows):
        of = {row["engine"]: row for row in rows if (row["model"], *_shape(row)) == place}
        first = next(iter(of.values()))
        cells = [cell(of[engine], first) if engine in of else "-" for engine in engines]
        lines.append(f"| {' | '.join(map(str, [*place, *cells]))} |")
    return "\n".join(lines)


def _latency(row: dict[str, Any], first: dict[str, Any]) -> str:
    ratio = "" if row is first else f", {first['p50_ms'] / row['p50_ms']:.2f}x"
    return f"{row['p50_ms']:.3f}{ratio}"


def _shape(row: dict[str, Any]) -> tuple[Any, ...]:
    """Nothing for an engine that wasn't built."""
    return tuple(row[key] for key in ("batch", "history", "candidates") if key in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dlrm_v3", "wide_heads"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--histories", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--candidates", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--onnx", help="folder with <model>/model.onnx, where onnxscript is not there to export one")
    parser.add_argument("--build-only", action="store_true", help="build what is kept: measuring later takes less time")
    parser.add_argument("--tiny", action="store_true", help="hstu_tiny and short batches: to try the script")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.tiny:
        args.models, args.histories, args.candidates, args.rounds = ["hstu_tiny"], [100, 200], [10], 5
    rows: list[dict[str, Any]] = []
    for name in args.models:
        study = Study(args, name)
        study.prepare()
        for shape in [] if args.build_only else study.batches:
            try:
                study.measure(shape)
            except Exception as e:  # the next shape may still fit
                print(f"{name} {shape}: FAILED: {' '.join(str(e).split())[:300]}", flush=True)
        study.close()
        rows += study.rows
        if args.output:  # after each model: what is measured is kept
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / "rows.json").write_text(json.dumps(rows) + "\n")
            (args.output / "table.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
