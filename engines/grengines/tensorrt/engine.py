"""engine=tensorrt: execution of plans, written against the documented API of TensorRT 10.13+ and TensorRT for RTX.

This engine has not run yet: no machine of the project has had both a library and a GPU that it supports. Tests cover
the building of plans (plan.py). `requires` in the registry and the gate of every cell guard the rest.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from grengines import registry
from grengines.api import RankResult, Request, Setup, UnavailableError
from grengines.base import RankingEngine
from grengines.export import exporter
from grengines.fallback import OutsideError
from grengines.runtime.batch import Bucket, Layout, pack
from grengines.runtime.buckets import Buckets, plan_buckets
from grengines.runtime.device import Placement
from grengines.runtime.profile import Sizes, check, profiles
from grengines.runtime.results import collect
from grengines.runtime.timing import Marks
from grengines.tensorrt import plan as plans
from grengines.tensorrt import sample as samples
from grengines.tensorrt.config import TensorRTConfig
from grengines.tensorrt.execution import Execution, Graph, Staged
from grengines.tensorrt.library import find


class TensorRTEngine(RankingEngine):
    """Ranking with the exported model as a TensorRT plan.

    Raises UnavailableError if the library or a GPU that it executes on is missing.
    """

    name = "tensorrt"

    def __init__(self, options: TensorRTConfig, setup: Setup) -> None:
        self._options = options
        self._library = find(options.library)
        if not torch.cuda.is_available():
            raise UnavailableError(
                "engine=tensorrt executes on an NVIDIA GPU, and PyTorch finds none; plans can be built here: "
                "python -m grbench build-plan --out PLAN"
            )
        device = torch.device("cuda", torch.cuda.current_device())
        super().__init__(setup, Placement(device, registry.precision_of(options, gpu=True)))
        self._target = "{}.{}".format(*torch.cuda.get_device_capability(self._device))
        if reason := self._library.refusal(self._target):
            raise UnavailableError(f"{reason}; use engine=aoti here")
        self._plan: plans.Plan | None = None
        self._execution: Execution | None = None
        self._staged: Staged | None = None
        self._graphs: dict[Bucket, Graph] = {}
        self._refitted = False  # True: the plan was built with other weights
        self._seconds = {"build_s": 0.0, "load_s": 0.0}

    @torch.inference_mode()
    def _load(self, sample: Sequence[Request], max_batch: int) -> None:
        """Load the plan, which is built if it is missing, and capture the graphs.

        Raises ValueError for a plan of another model, precision, library or GPU.
        """
        facts, feeds = self._facts(sample, max_batch)
        begun = time.perf_counter()
        self._plan = self._find(facts, feeds)
        loading = time.perf_counter()
        graphs, setup = self._options.cuda_graphs, self._setup
        self._execution = Execution(self._plan, self._library, len(self._model_config.tasks), self._device, graphs)
        self._refitted = self._plan.facts.model_hash != facts.model_hash
        if self._refitted:
            base = exporter.cached(self._model_config, setup.catalogue, setup.seed, plans.BASE[self._precision])
            self._execution.refit(base.onnx)
        self._staged = Staged(self._execution.capacity, pin=True)
        if graphs and not self._library.rtx:  # TensorRT for RTX captures by itself
            for bucket in plan_buckets(sample, self._encoding, max_batch, packed=False):
                self._capture(bucket)
        self._seconds = {"build_s": loading - begun, "load_s": time.perf_counter() - loading}

    @torch.inference_mode()
    def _warm_up(self, sample: Sequence[Request], max_batch: int) -> None:
        execution, largest = self._ready(self._execution), self._largest(sample, max_batch)
        try:
            self.rank(largest)
            if self._options.cuda_graphs and self._library.rtx:
                execution.check_captured(Sizes.of(largest, self._encoding))
        except OutsideError:  # engine.plan may hold less than the sample
            if not self._options.fallback:
                raise
        execution.save_runtime_cache()

    @torch.inference_mode()
    def rank(self, requests: Sequence[Request]) -> RankResult:
        """Score every candidate of every request. Threads take turns.

        Raises OutsideError for a batch that no profile of the plan holds, RuntimeError before `prepare`.
        """
        execution, staged = self._ready(self._execution), self._ready(self._staged)
        with self._lock, torch.cuda.stream(execution.stream):
            begun = time.perf_counter()
            needed = check(requests, self._encoding, execution.facts.profiles[-1], _hint(self._options))
            layout = Layout.of(requests, self._encoding)
            bucket = Buckets(self._graphs).choose(layout.needed)
            host = layout.pack(bucket)
            staged.fill(host, needed.history if bucket is None else self._columns(bucket), execution.facts.tile_rows)
            batch_ms = (time.perf_counter() - begun) * 1e3
            marks = Marks(self._device)
            execution.upload(staged)
            marks.add()
            if bucket is None:
                logits = execution.run(staged, needed)
            else:
                self._graphs[bucket].graph.replay()
                logits = self._graphs[bucket].logits
            graphs = self._options.cuda_graphs and not self._library.rtx
            details = {"eager_batches": float(bucket is None)} if graphs else {}
            return collect(logits, [host], marks, batch_ms, details)()

    def _describe(self) -> dict[str, Any]:
        plan, graphs = self._plan, self._options.cuda_graphs
        return {
            "library": f"{self._library.name} {self._library.version}",
            "compute_capability": self._target,
            "kernels": {},
            "plan": str(plan.folder) if plan else None,
            "plan_bytes": plan.manifest["bytes"] if plan else 0,
            "facts": asdict(plan.facts) if plan else {},
            "refitted": self._refitted,
            "graph_buckets": [list(b) for b in self._graphs],
            "cuda_graphs": "by TensorRT for RTX" if graphs and self._library.rtx else len(self._graphs),
            **self._seconds,
            "cache": {"name": "none"},
        }

    def _unload(self) -> None:
        self._graphs = {}
        if self._execution is not None:
            self._execution.close()
        self._execution, self._staged, self._plan = None, None, None

    def _facts(self, sample: Sequence[Request], max_batch: int) -> tuple[plans.Facts, list[dict[str, Any]]]:
        """Return the facts of the plan to load, and the calibration set to build it with."""
        sizes = profiles(sample, self._encoding, max_batch, self._options.profiles)
        options = {
            "precision": self._precision,
            "target": self._target,
            "profiles": sizes,
            "refit": self._options.refit,
            "plugin": self._options.plugin,
        }
        setup = self._setup
        facts = plans.Facts.of(self._library, self._model_config, setup.catalogue, setup.seed, **options)  # type: ignore[arg-type]
        if plans.BASE[self._precision] == self._precision:
            return facts, []
        feeds = samples.feeds(sample, self._encoding, self._options.calibration, facts.tile_rows)
        return replace(facts, calibration=samples.digest(feeds)), feeds

    def _find(self, facts: plans.Facts, feeds: list[dict[str, Any]]) -> plans.Plan:
        if self._options.plan is None:
            setup = self._setup
            return plans.cached(self._library, facts, self._model_config, setup.catalogue, setup.seed, feeds)
        build = f"python -m grbench build-plan --out {shlex.quote(self._options.plan)}"
        return plans.load(
            Path(self._options.plan), facts, f"set engine.plan=null, and one is built, or build it: {build}"
        )

    def _columns(self, bucket: Bucket) -> int:
        """Return the keys to which attention pads in a bucket: the most that a batch of it may need."""
        assert self._execution is not None
        return min(bucket.length, self._execution.facts.profiles[-1].history)

    def _capture(self, bucket: Bucket) -> None:
        """Capture the bucket's graph, if the plan holds a batch of its sizes."""
        assert self._execution is not None and self._staged is not None
        columns = self._columns(bucket)
        needed = Sizes(bucket.batch, bucket.tokens, bucket.length, columns, bucket.candidates)
        if not needed.fits(self._execution.facts.profiles[-1]):
            return
        self._staged.fill(pack([], self._encoding, bucket=bucket), columns, self._execution.facts.tile_rows)
        with torch.cuda.stream(self._execution.stream):
            self._graphs[bucket] = self._execution.capture(self._staged, needed)


def _hint(config: TensorRTConfig) -> str:
    if config.plan is not None:
        build = f"python -m grbench build-plan --out {shlex.quote(config.plan)}"
        return f"build a larger one ({build}), or set engine.fallback=[hstu]"
    return "prepare it with requests as large, or set engine.fallback=[hstu]"
