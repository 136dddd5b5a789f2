"""What the user-state cache saves, end to end in the engine: python experiments/user_cache.py [--device cpu]

Requests of returning users, ranked by engines side by side in one process, in turns: without a cache, with all or most
of the history in pages on the device, with all of it on the host, and with nothing cached (what the cache costs).
Times are wall clock around `rank`: packing, copies, computation, scores on the host. Every case's scores are first
checked against the fp32 reference; one that is wrong ends the run. Prints a table; --output writes every sample.
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

from grbench.config.compose import compose_spec
from grengines.api import Catalogue, RankResult, Request, Setup
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.hstu.config import HSTUEngineConfig
from grengines.hstu.engine import HSTUEngine
from grengines.models.hstu.reference import RankingReference
from grkernels.registry import requested

CATALOGUE = Catalogue(num_users=100, num_items=100_000, num_actions=8)
NEW = 128  # events since the last visit


def requests_of(users: int, history: int, candidates: int) -> list[Request]:
    rng, made = np.random.default_rng(0), []
    for user in range(users):
        made.append(
            Request(
                request_id=user,
                user_id=user,
                history_items=rng.integers(0, CATALOGUE.num_items, history),
                history_actions=rng.integers(1, 2**CATALOGUE.num_actions, history),
                history_weights=rng.random(history, dtype=np.float32),
                history_timestamps=np.cumsum(rng.integers(1, 1000, history)),
                num_seen=history - NEW,
                candidates=rng.integers(0, CATALOGUE.num_items, candidates),
                timestamp=history * 1000,
                arrival_s=0.0,
                deadline_ms=80.0,
            )
        )
    return made


def shortened(request: Request, events: int) -> Request:
    columns = [f for f in Request.__dataclass_fields__ if f.startswith("history_")]
    return replace(request, **{f: getattr(request, f)[:events] for f in columns})


class Study:
    def __init__(self, args: argparse.Namespace, batch: int) -> None:
        self.args, self.model = args, compose_spec([f"model={args.model}"])[0].model
        self.now = requests_of(batch, args.history, args.candidates)
        self.before = [shortened(r, args.history - NEW) for r in self.now]
        self.gpu = args.device == "cuda"
        reference = RankingReference(self.model, CATALOGUE, 0, args.device)
        self.expected = np.concatenate(reference.scores(self.now))
        plain = np.concatenate(reference.scores(self.now, "bf16" if self.gpu else "fp32"))
        self.allowed = max(2 * self.error(plain), 2e-5)
        state_gb = self.model.layers * self.model.heads * (self.model.qk_dim + self.model.v_dim) * args.history
        state_gb *= (2 if self.gpu else 4) / 1e9
        room, host = 3 * batch * state_gb, 2 * batch * state_gb
        self.engines = {
            "none": self.engine(CacheConfig()),
            "device": self.engine(PagedCacheConfig(memory_gb=room)),
            "part": self.engine(PagedCacheConfig(memory_gb=room, host_gb=host)),
            "whole": self.engine(PagedCacheConfig(memory_gb=20 * batch * state_gb, host_gb=host, onload_share=1.0)),
        }

    def engine(self, cache: CacheConfig | PagedCacheConfig) -> HSTUEngine:
        args, whole = self.args, self.args.history + self.args.candidates
        lengths = [args.candidates, args.candidates + NEW, whole] if isinstance(cache, PagedCacheConfig) else [whole]
        config = HSTUEngineConfig(
            device=args.device, precision="auto", cuda_graphs=bool(args.graphs) and self.gpu, graph_lengths=lengths
        )
        engine = HSTUEngine(config, Setup(self.model, requested(args.kernel), CATALOGUE, 0, cache))
        engine.prepare(self.now, len(self.now))
        return engine

    def error(self, scores: np.ndarray) -> float:
        return float(np.linalg.norm(scores - self.expected) / np.linalg.norm(self.expected))

    def cases(self) -> dict[str, tuple[str, Callable[[], Any]]]:
        """Of each case its engine, and what brings that into the state in which the requests find it."""
        device, part, whole = (self.engines[name] for name in ("device", "part", "whole"))

        def on_host(engine: HSTUEngine) -> Callable[[], Any]:
            return lambda: (engine.rank(self.now), engine.reset_cache(keep_host=True))

        def prefetched() -> None:
            on_host(whole)()
            assert whole._cached is not None and whole._cached.states.tier is not None
            for request in self.now:
                assert whole._cached.states.tier.prefetch(request.user_id)
            if self.gpu:
                torch.cuda.synchronize()

        history = self.args.history
        return {
            "no cache": ("none", lambda: None),
            "nothing cached": ("device", device.reset_cache),
            f"{history - NEW} of {history} on the device": ("device", lambda: device.rank(self.before)),
            f"{history} of {history} on the device": ("device", lambda: device.rank(self.now)),
            "on the host, all loaded": ("whole", on_host(whole)),
            "on the host, part loaded, the rest computed meanwhile": ("part", on_host(part)),
            "on the host, prefetched": ("whole", prefetched),
        }

    def run(self) -> dict[str, list[dict[str, float]]]:
        cases, samples = self.cases(), {}
        for name, (engine, ready) in cases.items():
            ready()
            error = self.error(np.concatenate(self.engines[engine].rank(self.now).scores))
            if not error <= self.allowed:
                raise SystemExit(f"{name}: scores differ from the fp32 reference by {error:.2e} > {self.allowed:.2e}")
            samples[name] = [{"error": error}]
        rng = np.random.default_rng(0)
        for _ in range(self.args.rounds):
            for name in rng.permutation(list(cases)):
                engine, ready = cases[name]
                ready()
                begun = time.perf_counter()
                result: RankResult = self.engines[engine].rank(self.now)
                wall_ms = (time.perf_counter() - begun) * 1e3
                samples[name].append({"wall_ms": wall_ms, "compute_ms": result.compute_ms, **result.details})
        return samples

    def report(self, samples: dict[str, list[dict[str, float]]]) -> None:
        def median(name: str, key: str) -> float:
            return float(np.median([s[key] for s in samples[name][1:] if key in s] or [0.0]))

        base = median("no cache", "wall_ms")
        print("\n| what is cached | p50 ms | times as fast | on the device ms | waited of copied ms | GB/s | error |")
        print("|---|---|---|---|---|---|---|")
        for name in samples:
            wall, compute = median(name, "wall_ms"), median(name, "compute_ms")
            wait, copy = median(name, "cache_host_wait_ms"), median(name, "cache_host_copy_ms")
            rate = f"{median(name, 'cache_host_bytes') / copy / 1e6:.1f}" if copy else ""
            waited = f"{wait:.2f} of {copy:.2f} ({100 * wait / copy:.0f}%)" if copy else ""
            error = samples[name][0]["error"]
            print(f"| {name} | {wall:.3f} | {base / wall:.2f} | {compute:.3f} | {waited} | {rate} | {error:.1e} |")
        actual = self.engines["part"].actual()
        print(
            f"\nplain copy of page-locked memory {actual['cache_copy_gb_s']:.1f} GB/s; "
            f"computing {actual['cache_compute_us_a_token']:.3f} us a token; without a graph at least "
            f"{actual['cache_launch_ms']:.2f} ms; allowed error {self.allowed:.1e}"
        )

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="wide_heads", help="a file of conf/model")
    parser.add_argument("--kernel", default="cutlass", help="variant of every operator")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--history", type=int, default=4096)
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--graphs", type=int, default=1, help="0: without CUDA graphs")
    parser.add_argument("--output", type=Path, help="JSON of every sample")
    args = parser.parse_args()
    samples = {}
    for batch in args.batches:
        print(f"\n{args.model}, {args.kernel}, {batch} x ({args.history} + {args.candidates} candidates)", flush=True)
        study = Study(args, batch)
        samples[batch] = study.run()
        study.report(samples[batch])
        study.close()
        if args.output:
            args.output.write_text(json.dumps(samples))


if __name__ == "__main__":
    main()
