"""The native engine: HSTU in PyTorch on a CPU or one GPU, and the fp32 reference that engines are held to."""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grengines.api import Catalogue, Float32Array, RankResult, Request, UnavailableError
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.cache.items import HotRows
from grengines.hstu.cached import CachedRanking
from grengines.hstu.config import HSTUEngineConfig
from grengines.models.hstu import quantised
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import HSTURanker
from grengines.runtime import kernels as kernel_choice
from grengines.runtime.batch import Bucket, HostBatch, JaggedBatch, pack, pack_slices
from grengines.runtime.device import DTYPES, resolve_device, resolve_precision
from grengines.runtime.graphs import GraphRunner, choose_bucket, first_batches, plan_buckets, token_count
from grengines.runtime.results import Marks, collect
from grkernels import tuning
from grkernels.operators import Operators


def build_model(
    model: HSTUConfig,
    catalogue: Catalogue,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
    kernels: Operators | None = None,
    *,
    host_table: bool = False,
) -> HSTURanker:
    """The model that every engine serves: weights from `model.weights`, or random ones from the seed, the
    same on every device. kernels: by default the fp32 references. host_table: as `HSTURanker.build`. fp32
    products are exact from here on (no TF32). Raises ValueError for bad weights."""
    torch.set_float32_matmul_precision("highest")
    kernels = kernels or Operators.reference()
    return HSTURanker.build(model, catalogue, kernels, seed=seed, device=device, dtype=dtype, host_table=host_table)


class Reference:
    """What the scores should be: one request at a time, nothing cached, padded or captured.

    The fp32 weights are made once; memory is one model's, and for the time of a half-precision call its copy. The
    token table stays on the host, however large it is: each request brings its own rows.
    """

    def __init__(self, model: HSTUConfig, catalogue: Catalogue, seed: int, device: torch.device | str) -> None:
        self._model = build_model(model, catalogue, seed, device, torch.float32, host_table=True)
        self._device = torch.device(device)
        self._table = self._model.token_table.data
        self._model.use_table(torch.empty(0))

    @torch.inference_mode()
    def scores(
        self, requests: Sequence[Request], precision: str = "fp32", attention: Callable[..., Tensor] | None = None
    ) -> list[Float32Array]:
        """Logits [candidates, tasks] of each request.

        precision: fp32, by the kernels' references, or fp16, bf16, int8 or fp8, by plain PyTorch in that precision (the
        variants `torch`; 8 bits as grengines/models/hstu/quantised.py says): what tolerances are measured by.
        attention: in place of theirs.
        """
        dtype = DTYPES["fp32" if precision in quantised.KINDS else precision]
        model = self._model if precision == "fp32" else copy.deepcopy(self._model).to(dtype)
        model.kernels = Operators.reference() if precision == "fp32" else Operators.eager()
        if precision in quantised.KINDS:
            quantised.quantise(model, precision)
        if attention is not None:
            model.kernels = model.kernels.replace(hstu_attention=attention)
        answers = []
        for request in requests:
            host = pack([request], model.encoding)
            rows, host.token_rows[:] = np.unique(host.token_rows, return_inverse=True)
            model.use_table(self._table[torch.from_numpy(rows)].to(self._device, dtype))
            answers.append(model(host.to(self._device)).cpu().numpy())
        return answers


class HSTUEngine:
    """HSTU with the kernel variants that were asked for. Satisfies grengines.api.Engine.

    Raises UnavailableError for a device, precision or variant that can't be had here, and ValueError for
    options that contradict each other.
    """

    def __init__(
        self,
        config: HSTUEngineConfig,
        model: HSTUConfig,
        kernels: dict[str, str],
        catalogue: Catalogue,
        seed: int,
        cache: CacheConfig | PagedCacheConfig,
    ) -> None:
        if config.cuda_graphs and config.candidate_microbatch:
            raise ValueError(
                f"engine.cuda_graphs=true and engine.candidate_microbatch={config.candidate_microbatch}: graphs hold "
                "one pass over all candidates; set cuda_graphs=false or candidate_microbatch=0"
            )
        self._config, self._model_config = config, model
        self._catalogue, self._seed, self._cache = catalogue, seed, cache
        self._device = resolve_device(config.device)
        check_graphs(config, self._device)
        self._precision = resolve_precision(config.precision, self._device)
        page = cache.page if isinstance(cache, PagedCacheConfig) else 0
        self._kernels = kernel_choice.choose(kernels, model, self._device.type, self._precision, page=page)
        self._operators = Operators.of(self._kernels.variants)
        self._threads_before = torch.get_num_threads()
        self._ranker: HSTURanker | None = None
        self._graphs: GraphRunner | None = None
        self._cached: CachedRanking | None = None
        self._lock = threading.Lock()
        self._items: HotRows | None = None
        self.buckets: list[Bucket] = []
        self._max_batch = 0

    @torch.inference_mode()
    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        """Put the model on the device, capture the graphs, and run the largest batch once.

        Raises ValueError for an empty sample or bad weights; out of memory shows here.
        """
        if not sample or max_batch < 1:
            raise ValueError(f"{len(sample)} sample requests, max_batch={max_batch}: both must be at least 1")
        if self._config.cpu_threads:
            torch.set_num_threads(self._config.cpu_threads)
        self._max_batch = max_batch
        self._ranker = build_model(
            self._model_config,
            self._catalogue,
            self._seed,
            self._device,
            DTYPES[self._precision],
            self._operators,
            host_table=self._cache.item_memory_gb > 0,
        )
        if self._cache.item_memory_gb:
            self._items = HotRows.within(
                int(self._cache.item_memory_gb * 1e9),
                self._ranker.token_table.data,
                device=self._device,
                dtype=DTYPES[self._precision],
            )
            self._ranker.use_table(self._items.table)
        encoding = self._ranker.encoding
        largest = sorted(sample, key=lambda r: token_count(r, encoding))[-max_batch:]
        if isinstance(self._cache, PagedCacheConfig):
            self._cached = CachedRanking(self._ranker, self._config, self._cache, sample, max_batch, self._place)
        elif self._config.cuda_graphs:
            self.buckets = plan_buckets(sample, encoding, max_batch, self._config.graph_lengths)
            self._graphs = GraphRunner(
                self._ranker,
                self.buckets,
                lambda bucket: [pack([], encoding, bucket=bucket, pin=True)],
                self._device,
            )
        if self._cached is not None:
            self._cached.measure(largest)
        else:
            for n in first_batches(max_batch, self._device):
                self.rank(largest[-n:])

    @torch.inference_mode()
    def rank(self, requests: Sequence[Request]) -> RankResult:
        """As grengines.api.Engine. Calls from several threads take turns until a batch's work is queued, then wait
        for it side by side. What fails in the cache is counted, logged, and answered without it. Raises ValueError for
        more than max_batch requests, RuntimeError unprepared."""
        ranker, cached = self._ranker, self._cached
        if ranker is None:
            raise RuntimeError("the engine is not prepared, or closed; call prepare() first")
        if not 0 < len(requests) <= self._max_batch:
            raise ValueError(f"{len(requests)} requests in one batch; allowed is 1 to max_batch={self._max_batch}")
        with self._lock:
            queued = self._queue_cached(ranker, cached, requests) if cached else self._queue_whole(ranker, requests)
        return queued()

    def _queue_cached(
        self, ranker: HSTURanker, cached: CachedRanking, requests: Sequence[Request]
    ) -> Callable[[], RankResult]:
        """As `rank`, through the user-state cache. What is returned waits for the device."""
        before, failed = vars(cached.states.counters()), False
        try:
            queued = cached.queue(requests)
        except Exception as error:
            cached.states.fault(f"{len(requests)} requests failed with the cache", error)
            if self._pin:
                torch.cuda.synchronize()  # what was under way may still write to memory that it gave back
            queued, failed = self._queue_whole(ranker, requests), True
        changes = {name: count - before[name] for name, count in vars(cached.states.counters()).items()}
        if failed:  # whatever was found, it was not used
            found = ("hits", "partial_hits", "host_hits", "bypassed", "cached_tokens", "loaded_tokens")
            changes |= {**dict.fromkeys(found, 0), "misses": len(requests)}
        counted = {f"cache_{name}": float(change) for name, change in changes.items()}

        def answer() -> RankResult:
            result = queued()
            result.details.update(counted)
            return result

        return answer

    def _queue_whole(self, ranker: HSTURanker, requests: Sequence[Request]) -> Callable[[], RankResult]:
        """As `rank`, from the whole histories. What is returned waits for the device."""
        begun = time.perf_counter()
        counts = [token_count(r, ranker.encoding) for r in requests]
        bucket = choose_bucket(self.buckets, counts, [len(r.candidates) for r in requests])
        size = self._config.candidate_microbatch
        hosts = pack_slices(requests, ranker.encoding, size, bucket=bucket, pin=self._pin)
        batch_ms = (time.perf_counter() - begun) * 1e3

        marks = Marks(self._device)
        details = self._place(hosts)
        if self._graphs is not None and bucket is not None:
            self._graphs.upload(bucket, hosts[0])
            marks.add()
            logits = self._graphs.replay(bucket)
        else:
            batches = [host.to(self._device) for host in hosts]
            marks.add()
            logits = self._forward(ranker, batches)
        if self._config.cuda_graphs:
            details["eager_batches"] = float(bucket is None)
        return collect(logits, hosts, marks, batch_ms, details)

    def actual(self) -> dict[str, Any]:
        """What really runs; JSON values."""
        cuda = self._device.type == "cuda"
        return {
            "engine": "hstu",
            "device": self._device.type,
            "device_name": torch.cuda.get_device_name(self._device) if cuda else "cpu",
            "precision": self._precision,
            "fp32_products": torch.get_float32_matmul_precision(),
            **self._kernels.actual(),
            "kernel_configs": tuning.provenance(),
            "graph_buckets": [list(b) for b in (self._cached or self).buckets],  # batch, length, candidates, cached
            "candidate_microbatch": self._config.candidate_microbatch,
            "cache": dataclasses.asdict(self._cache),
            **(self._cached.actual() if self._cached else {}),
            "timer": "CUDA events, one wait a batch" if cuda else "perf_counter",
            "cpu_threads": torch.get_num_threads(),
            "weights": self._model_config.weights or f"random, seed {self._seed}",
            "parameters": self._parameters(),
            "item_slots": self._items.slots if self._items else 0,  # rows of the token table on the device; 0: all
            "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None,
        }

    def reset_cache(self, keep_host: bool = False) -> None:
        """Drop every cached user state; keep_host: those on the device go to the host tier, if there is one."""
        if self._cached is not None:
            with self._lock:
                self._cached.reset_cache(keep_host)

    def close(self) -> None:
        """Release the model, the graphs and their memory; give the thread count back. Safe to call twice."""
        if self._cached is not None:
            self._cached.close()
        self._ranker, self._graphs, self._cached, self._items, self.buckets = None, None, None, None, []
        torch.set_num_threads(self._threads_before)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    @property
    def _pin(self) -> bool:
        return self._device.type == "cuda"

    def _place(self, hosts: Sequence[HostBatch]) -> dict[str, float]:
        """With a token table on the host: the batches' rows to the device, and slots in the place of row numbers.

        One lookup for all batches of a request batch, since a lookup may evict what the one before fetched. Returns
        what it counted. Raises RuntimeError, having changed nothing, where they need more rows than the device holds.
        """
        if self._items is None:
            return {}
        before = dataclasses.asdict(self._items.counters)
        self._items.place([host.token_rows for host in hosts])
        return {f"items_{k}": float(v - before[k]) for k, v in dataclasses.asdict(self._items.counters).items()}

    def _parameters(self) -> int:
        """Of the whole model, wherever they are."""
        if self._ranker is None:
            return 0
        elsewhere = self._items.host.numel() - self._items.table.numel() if self._items else 0
        return sum(p.numel() for p in self._ranker.parameters()) + elsewhere

    @staticmethod
    def _forward(ranker: HSTURanker, batches: list[JaggedBatch]) -> Tensor:
        """Logits of what `pack_slices` made, in its order."""
        if len(batches) == 1:
            logits: Tensor = ranker(batches[0])
            return logits
        state = ranker.prefill(batches[0])
        return torch.cat([ranker.delta(batch, state, keep=False)[0] for batch in batches[1:]])


def check_graphs(config: HSTUEngineConfig, device: torch.device) -> None:
    """Raises UnavailableError where CUDA graphs are asked for on a CPU."""
    if config.cuda_graphs and device.type != "cuda":
        raise UnavailableError("engine.cuda_graphs=true: there are none on a CPU; set engine.cuda_graphs=false")
