"""engine=aoti: HSTU as a package of machine code, with the project's kernels in it; no Python runs between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grengines.aoti import package as packages
from grengines.aoti.config import AOTIEngineConfig
from grengines.aoti.package import Facts, Inputs, Package
from grengines.api import Catalogue, RankResult, Request, UnavailableError
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.export.identity import model_hash
from grengines.export.module import ExportedRanker
from grengines.fallback import OutsideError
from grengines.hstu.engine import build_model
from grengines.models.hstu.config import HSTUConfig
from grengines.runtime import kernels as kernel_choice
from grengines.runtime.batch import Bucket, Encoding, JaggedBatch, pack
from grengines.runtime.device import DTYPES, resolve_device, resolve_precision
from grengines.runtime.graphs import GraphRunner, choose_bucket, plan_buckets, token_count
from grengines.runtime.profile import check, profiles
from grengines.runtime.results import Marks, collect
from grkernels.families import AUTO
from grkernels.operators import Operators


class AOTIEngine:
    """Satisfies grengines.api.Ranker. Raises UnavailableError for a device, precision or variant that can't be had
    here, and ValueError for options that contradict each other."""

    def __init__(
        self,
        config: AOTIEngineConfig,
        model: HSTUConfig,
        kernels: dict[str, str],
        catalogue: Catalogue,
        seed: int,
        cache: CacheConfig | PagedCacheConfig,
    ) -> None:
        if cache.name != "none" or cache.item_memory_gb:
            raise ValueError("engine=aoti computes whole histories with the whole model; set cache=none")
        self._config, self._model, self._catalogue, self._seed = config, model, catalogue, seed
        self._device = resolve_device(config.device)
        if config.cuda_graphs and self._device.type != "cuda":
            raise UnavailableError("engine.cuda_graphs=true: there are none on a CPU; set engine.cuda_graphs=false")
        self._precision = resolve_precision(config.precision, self._device)
        for family, variant in kernels.items():
            if variant not in (AUTO, *packages.VARIANTS):
                raise UnavailableError(
                    f"kernel.{family}={variant} can't be part of a package; those that can: "
                    f"{', '.join(packages.VARIANTS)}"
                )
        self._choice = kernel_choice.choose(
            kernels, model, self._device.type, self._precision, allowed=packages.VARIANTS
        )
        self._kernels = self._choice.variants
        self._operators = Operators.of(self._kernels)
        self._encoding = Encoding.of(model, catalogue)
        self._threads_before = torch.get_num_threads()
        self._lock = threading.Lock()
        self._package: Package | None = None
        self._inputs: Inputs | None = None
        self._graphs: GraphRunner | None = None
        self.buckets: list[Bucket] = []
        self._build_s = 0.0

    @torch.inference_mode()
    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        """Load the package, after building it where there is none yet, capture the graphs, run the largest batch.

        Raises ValueError for an empty sample, bad weights or a package that does not belong here, UnavailableError.
        """
        if self._config.cpu_threads:
            torch.set_num_threads(self._config.cpu_threads)
        sizes = profiles(sample, self._encoding, max_batch, 2)
        digest = model_hash(self._model, self._catalogue, self._seed)
        facts = Facts.here(digest, self._precision, self._device, self._kernels, self._model.heads, sizes[-1], sizes[0])
        path = facts.path()
        if self._config.package is not None:
            path = packages.Path(self._config.package)
        elif not path.exists():
            begun = time.perf_counter()
            self._build(facts)
            self._build_s = time.perf_counter() - begun
        self._package = packages.load(path, facts, self._device)
        self._inputs = Inputs(self._package.facts, self._device)
        if self._config.cuda_graphs:
            self.buckets = plan_buckets(sample, self._encoding, max_batch, self._config.graph_lengths)
            self._graphs = GraphRunner(
                self._run,
                self.buckets,
                lambda bucket: [pack([], self._encoding, bucket=bucket, pin=True)],
                self._device,
            )
        try:
            self.rank(sorted(sample, key=lambda r: token_count(r, self._encoding))[-max_batch:])
        except OutsideError:  # of a package that was given
            if not self._config.fallback:
                raise

    @torch.inference_mode()
    def rank(self, requests: Sequence[Request]) -> RankResult:
        """As grengines.api.Ranker; calls from several threads take turns until a batch's work is queued. Raises
        OutsideError for a batch that the package was not built for, RuntimeError unprepared."""
        if self._package is None:
            raise RuntimeError("the engine is not prepared, or closed; call prepare() first")
        begun = time.perf_counter()
        check(requests, self._encoding, self._package.facts.most, _mend(self._config.package))
        counts = [token_count(r, self._encoding) for r in requests]
        bucket = choose_bucket(self.buckets, counts, [len(r.candidates) for r in requests])
        host = pack(requests, self._encoding, bucket=bucket, pin=self._device.type == "cuda")
        batch_ms = (time.perf_counter() - begun) * 1e3
        with self._lock:
            marks = Marks(self._device)
            if self._graphs is not None and bucket is not None:
                self._graphs.upload(bucket, host)
                marks.add()
                logits = self._graphs.replay(bucket)
            else:
                batch = host.to(self._device)
                marks.add()
                logits = self._run(batch)
            details = {"eager_batches": float(bucket is None)} if self._config.cuda_graphs else {}
            queued = collect(logits, [host], marks, batch_ms, details)
        return queued()

    def actual(self) -> dict[str, Any]:
        """What really runs; JSON values."""
        cuda = self._device.type == "cuda"
        package = self._package
        return {
            "engine": "aoti",
            "device": self._device.type,
            "device_name": torch.cuda.get_device_name(self._device) if cuda else "cpu",
            "precision": self._precision,
            "fp32_products": torch.get_float32_matmul_precision(),
            **self._choice.actual(),
            "kernel_configs": package.configs if package else [],
            "graph_buckets": [list(b) for b in self.buckets],
            "package": str(package.path) if package else None,
            "package_bytes": package.path.stat().st_size if package else 0,
            "package_build_s": self._build_s,  # 0: it was there
            "built_for": package.facts.most.__dict__ if package else {},
            "cache": {"name": "none"},
            "timer": "CUDA events, one wait a batch" if cuda else "perf_counter",
            "cpu_threads": torch.get_num_threads(),
            "weights": self._model.weights or f"random, seed {self._seed}",
            "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None,
        }

    def reset_cache(self, keep_host: bool = False) -> None:
        """Nothing is cached."""

    def close(self) -> None:
        """Release the package, the graphs and their memory; give the thread count back. Safe to call twice."""
        self._package, self._inputs, self._graphs, self.buckets = None, None, None, []
        torch.set_num_threads(self._threads_before)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _build(self, facts: Facts) -> None:
        ranker = build_model(
            self._model, self._catalogue, self._seed, self._device, DTYPES[self._precision], self._operators
        )
        plain = self._kernels["hstu_attention"] == "torch"
        attend = packages.attention(self._operators.hstu_attention, facts.tiles if plain else 0)
        packages.build(ExportedRanker(ranker, attend, self._operators), facts)

    def _run(self, batch: JaggedBatch) -> Tensor:
        """Logits fp32 [M, tasks]."""
        assert self._package is not None and self._inputs is not None
        return self._package.run(self._inputs.of(batch))[0]


def _mend(package: str | None) -> str:
    if package is not None:
        return "set engine.package=null, or engine.fallback=[hstu]"
    return "prepare it with requests as large, or set engine.fallback=[hstu]"
