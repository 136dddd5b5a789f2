"""Precisions on a CPU, native and in ONNX Runtime: python experiments/precisions.py --out reports/compiled_cpu.md

Engines side by side in one process, in turns, with the same weights and requests. Times are wall clock around `rank`:
packing, copies, computation, scores on the host. A cell whose scores fail the rule of the gate (twice the error of
plain PyTorch in its precision) has no time. --weights adds what each precision costs in ranking quality
(grbench/gate/quality.py) with a model that experiments/train_ranker.py made, TensorRT's int8 and fp8 among them: their
Q/DQ models run in ONNX Runtime. GPUs: experiments/compiled.py.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.execution.environment import describe_environment
from grbench.gate import quality
from grengines import registry
from grengines.api import Catalogue, Request, UnavailableError
from grengines.export import exporter
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.reference import RankingReference
from grengines.numerics import SUMMATION_FLOOR, relative_error
from grengines.runtime.batch import Encoding
from grengines.tensorrt import sample as samples
from grengines.tensorrt.quantise import quantise

CATALOGUE = Catalogue(num_users=100, num_items=20_000, num_actions=4)
MID = ["layers=4", "embedding_dim=256", "heads=4", "qk_dim=64", "v_dim=64", "scaling_seqlen=2048", "head_dim=256"]
MODELS = {"mid": ["model=hstu_tiny", *(f"model.{option}" for option in MID)]}  # any other is a name of conf/model/
TRAINED = ["workload=ml_100k", "workload.max_history=128", "model=hstu_tiny", "model.tasks=[rated,liked]"]
CELLS = ["hstu fp32", "hstu fp16", "hstu bf16", "onnxruntime fp32", "onnxruntime fp16", "onnxruntime int8"]
UNAVAILABLE = ["onnxruntime bf16"]  # the page has their reasons
SECONDS = 20.0  # no cell is timed longer
QUIET = 1.5  # load average up to which nothing else ran; what came just before counts in it
CALIBRATION = 16  # requests, as engine.calibration


def requests_of(batch: int, history: int, candidates: int, seed: int) -> list[Request]:
    """The first history is of full length, the others of a quarter of it and more."""
    rng, made = np.random.default_rng(seed), []
    for user in range(batch):
        events = history if user == 0 else int(rng.integers(history // 4, history + 1))
        made.append(
            Request(
                request_id=user,
                user_id=user,
                history_items=rng.integers(0, CATALOGUE.num_items, events),
                history_actions=rng.integers(1, 2**CATALOGUE.num_actions, events),
                history_weights=rng.random(events, dtype=np.float32),
                history_timestamps=np.cumsum(rng.integers(1, 1000, events)),
                num_seen=0,
                candidates=rng.integers(0, CATALOGUE.num_items, candidates),
                timestamp=events * 1000,
                arrival_s=0.0,
                deadline_ms=80.0,
            )
        )
    return made


def build(cell: str, model: HSTUConfig, catalogue: Catalogue, threads: int, *more: str) -> Any:
    name, precision = cell.split()
    options = [f"engine={name}", f"engine.precision={precision}", "engine.device=cpu", f"engine.cpu_threads={threads}"]
    spec, _ = compose_spec([*options, *more, "workload=synthetic"])
    return registry.build(spec.engine, model, spec.kernel, catalogue, 0)


def refusal(cell: str, args: argparse.Namespace) -> str:
    """Why the cell can't be measured here, in the engine's words."""
    try:
        build(cell, HSTUConfig(), CATALOGUE, args.threads)
    except UnavailableError as e:
        return f"{cell} is UNAVAILABLE: {e}."
    raise AssertionError(f"{cell} can be measured here: list it in CELLS")


def speed(name: str, args: argparse.Namespace) -> list[str]:
    """A row of the first table for each cell at each shape and batch."""
    spec, _ = compose_spec([*MODELS.get(name, [f"model={name}"]), "workload=synthetic"])
    reference, lines = RankingReference(spec.model, CATALOGUE, 0, "cpu"), []
    for shape in args.shapes:
        history, candidates = map(int, shape.split("x"))
        for batch in args.batches:
            batches = [requests_of(batch, history, candidates, seed) for seed in range(4)]
            expected = np.concatenate(reference.scores(batches[0]))
            plain = {
                precision: relative_error(np.concatenate(reference.scores(batches[0], precision)), expected)
                for precision in {cell.split()[1] for cell in CELLS}
            }
            engines: dict[str, Any] = {}
            facts: dict[str, list[str]] = {}
            for cell in CELLS:
                begun = time.perf_counter()
                engine = build(cell, spec.model, CATALOGUE, args.threads)
                engine.prepare([r for one in batches for r in one], batch)
                start_s = time.perf_counter() - begun
                error = relative_error(np.concatenate(engine.rank(batches[0]).scores), expected)
                usual = plain[cell.split()[1]]
                if error <= max(2 * usual, SUMMATION_FLOOR):
                    engines[cell], facts[cell] = engine, [f"{error:.0e}", f"{start_s:.1f}"]
                else:
                    facts[cell] = [f"INCORRECT: error {error:.1e}, plain PyTorch's {usual:.1e}", "", "", "", "", ""]
                    engine.close()
            taken = measure(engines, batches, args.repeats)
            for cell, engine in engines.items():
                p50, least = float(np.median(taken[cell])), min(taken[cell])
                times = [f"{p50:.2f}", f"{least:.2f}", f"{batch / p50 * 1e3:,.1f}"]
                facts[cell] = [*times, f"{min(taken[CELLS[0]]) / least:.2f}x", *facts[cell]]
                engine.close()
            gc.collect()
            for cell in CELLS:
                lines.append(f"| {name} | {history} | {candidates} | {batch} | {cell} | {' | '.join(facts[cell])} |")
                print(lines[-1], flush=True)
    return lines


def measure(engines: dict[str, Any], batches: list[list[Request]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, the engines in turns; the first two turns warm up."""
    taken: dict[str, list[float]] = {cell: [] for cell in engines}
    for turn in range(repeats + 2):
        for cell, engine in engines.items():
            if sum(taken[cell]) > SECONDS * 1e3:
                continue
            begun = time.perf_counter()
            engine.rank(batches[turn % len(batches)])
            if turn > 1:
                taken[cell].append((time.perf_counter() - begun) * 1e3)
    return taken


def costs(args: argparse.Namespace) -> list[str]:
    """The section on what each precision costs in quality with the trained model."""
    spec, _ = compose_spec([*TRAINED, f"model.weights={args.weights}"])
    trace, lines = workloads.build(spec.workload, 0, 80.0), []
    model, seen = spec.model, trace.requests[: -spec.gate.quality_requests]

    def row(name: str, engine: Any, precision: str) -> quality.Quality:
        engine.prepare(trace.requests[-spec.gate.quality_requests :], spec.scenario.max_batch)
        found = quality.measure(spec, trace, engine, precision, "cpu")
        engine.close()
        assert found is not None  # the model has weights and the workload labels
        losses = [f"{loss:+.3%}" for t in found.tasks.values() for loss in (t.auc_loss, t.ne_loss)]
        verdict = "passes" if found.worst_loss <= quality.MAX_LOSS else "INCORRECT unless allowed"
        lines.append(f"| {name} | {' | '.join(losses)} | {found.top_k_overlap:.1%} | {verdict} |")
        print(lines[-1], flush=True)
        return found

    for cell in CELLS:
        found = row(cell, build(cell, model, trace.catalogue, args.threads), cell.split()[1])
    half = exporter.cached(model, trace.catalogue, 0, "fp16").onnx
    feeds = samples.feeds(seen, Encoding.of(model, trace.catalogue), CALIBRATION, tile_rows=128)
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("int8", "fp8"):
            onnx = quantise(half, Path(folder) / f"{precision}.onnx", precision, feeds)
            engine = build("onnxruntime fp16", model, trace.catalogue, args.threads, f"engine.onnx={onnx}")
            row(f"Q/DQ {precision}", engine, precision)
    reference = ", ".join(f"{name} {t.auc_reference:.4f} / {t.ne_reference:.4f}" for name, t in found.tasks.items())
    heads = [f"{task} {what}" for task in found.tasks for what in ("AUC loss", "NE loss")]
    return [
        "## What a precision costs in ranking quality",
        "",
        "`hstu_tiny` trained on MovieLens-100K by `experiments/train_ranker.py`; the trace's last "
        f"{found.requests} requests, held out, {found.candidates:,} labelled candidates.",
        f"AUC / normalised entropy of the fp32 reference: {reference}.",
        f"Losses are shares of these, below 0 a gain; allowed is {quality.MAX_LOSS:.1%} of either.",
        "Q/DQ: what TensorRT's plans of that precision are built from, fp16 with the layers' projections in 8 bits,",
        f"scales from {CALIBRATION} earlier requests; run by ONNX Runtime in wider types, so with the plan's rounding "
        "and not with its kernels.",
        "",
        f"| engine | {' | '.join(heads)} | top-{quality.TOP_K} overlap | gate |",
        "|" + "---|" * (len(heads) + 3),
        *lines,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["hstu_tiny", "mid"], help="mid, or names of conf/model/")
    parser.add_argument("--shapes", nargs="+", default=["128x32", "512x128", "1024x256"], help="history x candidates")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=1, help="of each engine (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each cell (default: %(default)s)")
    parser.add_argument("--weights", help="safetensors file of experiments/train_ranker.py")
    parser.add_argument("--out", type=Path, help="page to write")
    args = parser.parse_args()
    begun, loads = time.strftime("%Y-%m-%d"), [os.getloadavg()[0]]
    tables = [line for name in args.models for line in speed(name, args)]
    loads.append(os.getloadavg()[0])
    shared = "other work shared the machine" if loads[0] > QUIET else "nothing else ran when it began"
    weights = f" --weights {Path(args.weights).name}" if args.weights else ""
    command = f"python experiments/precisions.py --threads {args.threads} --repeats {args.repeats}{weights}"
    env = describe_environment()
    page = [
        "# Compiled engines on a CPU",
        "",
        f"`{command}`, {begun},",
        f"{env['cpu']}, {env['cpu_cores']} cores, torch {torch.__version__}, onnxruntime {onnxruntime.__version__},",
        f"Python {platform.python_version()}, {args.threads} thread(s) an engine, {args.repeats} calls a cell "
        f"(fewer past {SECONDS:.0f} s),",
        f"engines in turns; load average {loads[0]:.1f} to {loads[1]:.1f}: {shared}.",
        "",
        "The first history of a batch has the length given, the others a quarter of it and more. "
        f"`mid`: {', '.join(MID)}.",
        "ms are wall clock around `rank`: p50, and the least, by which speed is compared. requests/s is by p50.",
        "error is relative to the fp32 reference. start s is building the engine, with the export where none was kept.",
        "",
        "| model | history | candidates | batch | engine | p50 ms | least ms | requests/s | speed | error | start s |",
        "|" + "---|" * 11,
        *tables,
        "",
        *(refusal(cell, args) for cell in UNAVAILABLE),
        *(["", *costs(args)] if args.weights else []),
    ]
    text = "\n".join(page) + "\n"
    if args.out:
        args.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
