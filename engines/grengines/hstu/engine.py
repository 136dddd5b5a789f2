"""The native engine: HSTU in PyTorch on a CPU or one GPU, and the fp32 reference that engines are held to."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grengines.api import Catalogue, Float32Array, RankResult, Request, UnavailableError
from grengines.cache import policies
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.cache.pool import PagePool
from grengines.cache.states import Plan, UserStates
from grengines.hstu.batch import Bucket, HostBatch, JaggedBatch, pack
from grengines.hstu.config import INTERACTING, HSTUConfig, HSTUEngineConfig
from grengines.hstu.graphs import GraphRunner, choose_bucket, plan_buckets, token_count
from grengines.hstu.model import HSTURanker
from grkernels import registry as kernel_registry
from grkernels import tuning
from grkernels.operators import Operators

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_model(
    model: HSTUConfig,
    catalogue: Catalogue,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
    kernels: Operators | None = None,
) -> HSTURanker:
    """The model that every engine serves: weights from `model.weights`, or random ones from the seed, the
    same on every device. kernels: by default the fp32 references. fp32 products are exact from here on (no TF32).
    Raises ValueError for bad weights."""
    torch.set_float32_matmul_precision("highest")
    kernels = kernels or Operators.reference()
    return HSTURanker.build(model, catalogue, kernels, seed=seed, device=device, dtype=dtype)


class Reference:
    """What the scores should be: one request at a time, nothing cached, padded or captured.

    The fp32 weights are made once; memory is one model's, and for the time of a half-precision call its copy.
    """

    def __init__(self, model: HSTUConfig, catalogue: Catalogue, seed: int, device: torch.device | str) -> None:
        self._model = build_model(model, catalogue, seed, device, torch.float32)
        self._device = torch.device(device)

    @torch.inference_mode()
    def scores(
        self, requests: Sequence[Request], precision: str = "fp32", attention: Callable[..., Tensor] | None = None
    ) -> list[Float32Array]:
        """Logits [candidates, tasks] of each request.

        precision: fp32, by the kernels' references, or fp16 or bf16, by plain PyTorch in that precision (the
        variants `torch`): what tolerances are measured by. attention: in place of theirs.
        """
        model = self._model if precision == "fp32" else copy.deepcopy(self._model).to(DTYPES[precision])
        model.kernels = Operators.reference() if precision == "fp32" else Operators.plain()
        if attention is not None:
            model.kernels = model.kernels._replace(hstu_attention=attention)
        batches = (pack([r], model.encoding).to(self._device) for r in requests)
        return [model(batch).cpu().numpy() for batch in batches]


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
        if config.cuda_graphs and isinstance(cache, PagedCacheConfig):
            raise ValueError(
                f"engine.cuda_graphs=true and cache={cache.name}: graphs hold the full form only; set "
                "cuda_graphs=false or cache=none"
            )
        if config.cuda_graphs and config.candidate_microbatch:
            raise ValueError(
                f"engine.cuda_graphs=true and engine.candidate_microbatch={config.candidate_microbatch}: graphs hold "
                "the full form only; set cuda_graphs=false or candidate_microbatch=0"
            )
        self._config, self._model_config = config, model
        self._catalogue, self._seed, self._cache = catalogue, seed, cache
        self._device = _resolve_device(config)
        cuda = self._device.type == "cuda"
        self._precision = config.precision if config.precision != "auto" else "bf16" if cuda else "fp32"
        self._kernels = {family: kernels[family] for family in kernel_registry.FAMILIES}
        page = cache.page if isinstance(cache, PagedCacheConfig) else 0
        self._operators = _operators(self._kernels, model, self._device.type, self._precision, page)
        self._threads_before = torch.get_num_threads()
        self._ranker: HSTURanker | None = None
        self._graphs: GraphRunner | None = None
        self._states: UserStates | None = None
        self._buckets: list[Bucket] = []
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
        )
        encoding = self._ranker.encoding
        if isinstance(self._cache, PagedCacheConfig):
            self._states = self._make_states(self._cache, sample)
        if self._config.cuda_graphs:
            self._buckets = plan_buckets(sample, encoding, max_batch, self._config.graph_lengths)
            self._graphs = GraphRunner(self._ranker, self._buckets, encoding, self._device)
        self.rank(sorted(sample, key=lambda r: token_count(r, encoding))[-max_batch:])
        self.forget()

    @torch.inference_mode()
    def rank(self, requests: Sequence[Request]) -> RankResult:
        """As grengines.api.Engine. Raises ValueError for more than max_batch requests, RuntimeError unprepared."""
        ranker = self._ranker
        if ranker is None:
            raise RuntimeError("the engine is not prepared, or closed; call prepare() first")
        if not 0 < len(requests) <= self._max_batch:
            raise ValueError(f"{len(requests)} requests in one batch; allowed is 1 to max_batch={self._max_batch}")
        if self._states is not None:
            return self._rank_through_pages(ranker, self._states, requests)
        begun = time.perf_counter()
        bucket = choose_bucket(self._buckets, requests, ranker.encoding)
        hosts = self._pack(requests, bucket)
        batch_ms = (time.perf_counter() - begun) * 1e3

        marks = _Marks(self._device)
        if self._graphs is not None and bucket is not None:
            self._graphs.upload(hosts[0], bucket)
            marks.add()
            logits = self._graphs.replay(bucket)
        else:
            batches = [host.to(self._device) for host in hosts]
            marks.add()
            logits = self._forward(ranker, batches)
        marks.add()
        on_host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=self._pin)
        on_host.copy_(logits, non_blocking=True)
        marks.add()
        up_ms, compute_ms, down_ms = marks.spans_ms()  # waits for the device
        return RankResult(
            scores=_by_request(on_host.numpy(), hosts),
            batch_ms=batch_ms,
            transfer_ms=up_ms + down_ms,
            compute_ms=compute_ms,
            tokens=sum(host.tokens for host in hosts),
            padded_tokens=sum(host.padded_tokens for host in hosts),
            details={"eager_batches": float(bucket is None)} if self._config.cuda_graphs else {},
        )

    def actual(self) -> dict[str, Any]:
        """What really runs; JSON values."""
        cuda = self._device.type == "cuda"
        return {
            "engine": "hstu",
            "device": self._device.type,
            "device_name": torch.cuda.get_device_name(self._device) if cuda else "cpu",
            "precision": self._precision,
            "fp32_products": torch.get_float32_matmul_precision(),
            "kernels": self._kernels,
            "kernel_configs": tuning.provenance(),
            "graph_buckets": [list(b) for b in self._buckets],  # batch, length, candidates
            "candidate_microbatch": self._config.candidate_microbatch,
            "cache": dataclasses.asdict(self._cache),
            "timer": "CUDA events, one wait a batch" if cuda else "perf_counter",
            "cpu_threads": torch.get_num_threads(),
            "weights": self._model_config.weights or f"random, seed {self._seed}",
            "parameters": sum(p.numel() for p in self._ranker.parameters()) if self._ranker else 0,
            "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None,
        }

    def forget(self) -> None:
        """Drop every cached user state."""
        if self._states is not None:
            self._states.clear()

    def close(self) -> None:
        """Release the model, the graphs and their memory; give the thread count back. Safe to call twice."""
        self._ranker, self._graphs, self._states, self._buckets = None, None, None, []
        torch.set_num_threads(self._threads_before)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    @property
    def _pin(self) -> bool:
        return self._device.type == "cuda"

    def _pack(self, requests: Sequence[Request], bucket: Bucket | None) -> list[HostBatch]:
        """One batch in the full form; with microbatches the histories, then each slice of the candidates."""
        assert self._ranker is not None
        encoding, size = self._ranker.encoding, self._config.candidate_microbatch
        most = max(len(r.candidates) for r in requests)
        if not size or not most:
            return [pack(requests, encoding, bucket=bucket, pin=self._pin)]
        cached = [encoding.contextual_seq_len + len(r.history_items) for r in requests]
        slices = [slice(begin, begin + size) for begin in range(0, most, size)]
        return [
            pack(requests, encoding, candidates=slice(0), pin=self._pin),
            *(pack(requests, encoding, cached=cached, candidates=s, pin=self._pin) for s in slices),
        ]

    def _make_states(self, cache: PagedCacheConfig, sample: Sequence[Request]) -> UserStates:
        """An empty pool and its index. Raises ValueError where the longest history does not fit into all of it."""
        model = self._model_config
        pool = PagePool.within(
            int(cache.memory_gb * 1e9),
            device=self._device,
            layers=model.layers,
            page=cache.page,
            heads=model.heads,
            qk_dim=model.qk_dim,
            v_dim=model.v_dim,
            dtype=DTYPES[self._precision],
        )
        tokens = model.contextual_seq_len + max(len(r.history_items) for r in sample)
        if pool.pages_for(tokens) > pool.pages:
            needed = pool.pages_for(tokens) * pool.page_bytes / 1e9
            raise ValueError(
                f"cache.memory_gb={cache.memory_gb:g}: the longest history, {tokens} tokens, alone takes {needed:.3g} "
                "GB; give the cache more, or keep shorter histories (workload.max_history)"
            )
        return UserStates(pool, policies.make(cache.policy), contextual_seq_len=model.contextual_seq_len)

    def _rank_through_pages(self, ranker: HSTURanker, states: UserStates, requests: Sequence[Request]) -> RankResult:
        """As `rank`: of what is in pages nothing is computed again, and what is new goes there."""
        begun, before = time.perf_counter(), states.counters()
        plans = states.lookup(requests, now=max(r.arrival_s for r in requests))
        try:
            stored = [states.extend(plan) for plan in plans]
            hosts = self._pack_cached(requests, plans, all(stored))
            first_rows = hosts[0].first_rows()
            places = states.batch(plans, first_rows, pin=self._pin)
            batch_ms = (time.perf_counter() - begun) * 1e3
            marks = _Marks(self._device)
            batches = [host.to(self._device) for host in hosts]
            marks.add()
            parts = [ranker.paged(b, states.pool, places, write=i == 0) for i, b in enumerate(batches)]
            logits = torch.cat(parts)
            marks.add()
            on_host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=self._pin)
            on_host.copy_(logits, non_blocking=True)
            marks.add()
            up_ms, compute_ms, down_ms = marks.spans_ms()  # waits for the device
            for plan in plans:
                states.commit(plan)
        finally:
            for plan in plans:
                states.abort(plan)  # nothing for those that are committed
        after = states.counters()
        return RankResult(
            scores=_by_request(on_host.numpy(), hosts),
            batch_ms=batch_ms,
            transfer_ms=up_ms + down_ms,
            compute_ms=compute_ms,
            tokens=sum(host.tokens for host in hosts),
            padded_tokens=sum(host.padded_tokens for host in hosts),
            details={
                f"cache_{f.name}": float(getattr(after, f.name) - getattr(before, f.name))
                for f in dataclasses.fields(after)
            },
        )

    def _pack_cached(self, requests: Sequence[Request], plans: Sequence[Plan], stored: bool) -> list[HostBatch]:
        """What isn't cached, with the candidates; or with microbatches first the one, then slices of the other.

        Candidates on their own need the whole history in pages: where it is not stored, all go in one pass.
        """
        assert self._ranker is not None
        encoding, size = self._ranker.encoding, self._config.candidate_microbatch
        cached, whole = [plan.cached for plan in plans], [plan.tokens for plan in plans]
        most = max(len(r.candidates) for r in requests)
        if not size or not most or not stored:
            return [pack(requests, encoding, cached=cached, pin=self._pin)]
        slices = [slice(begin, begin + size) for begin in range(0, most, size)]
        return [
            pack(requests, encoding, cached=cached, candidates=slice(0), pin=self._pin),
            *(pack(requests, encoding, cached=whole, candidates=s, pin=self._pin) for s in slices),
        ]

    @staticmethod
    def _forward(ranker: HSTURanker, batches: list[JaggedBatch]) -> Tensor:
        """Logits of what `_pack` made, in its order."""
        if len(batches) == 1:
            logits: Tensor = ranker(batches[0])
            return logits
        state = ranker.prefill(batches[0])
        return torch.cat([ranker.delta(batch, state, keep=False)[0] for batch in batches[1:]])


class _Marks:
    """Points in time between pieces of work: device events on a GPU, the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self.add()

    def add(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def spans_ms(self) -> list[float]:
        """Milliseconds between marks; waits until the last one is reached."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not self._cuda:
            return [(b - a) * 1e3 for a, b in pairs]
        self._marks[-1].synchronize()
        return [float(a.elapsed_time(b)) for a, b in pairs]


def _by_request(logits: Float32Array, hosts: list[HostBatch]) -> list[Float32Array]:
    """Cut the batches' logits into each request's [candidates, tasks]; padding at the end is dropped."""
    parts: list[list[Float32Array]] = [[] for _ in hosts[0].candidate_counts]
    at = 0
    for host in hosts:
        for part, count in zip(parts, host.candidate_counts, strict=True):
            part.append(logits[at : at + count])
            at += count
    return [np.concatenate(part) for part in parts]  # copies: the page-locked buffer is free again


def _operators(kernels: dict[str, str], model: HSTUConfig, device: str, precision: str, page: int) -> Operators:
    """The variants that are named. Raises UnavailableError, naming those that would do, where one can't run."""
    keys, values = model.heads * model.qk_dim, model.heads * model.v_dim
    dims = {
        "hstu_attention": {"qk_dim": model.qk_dim, "v_dim": model.v_dim, "page": page},
        "norm_gate": {"width": values},
        "layer_norm": {"width": model.embedding_dim},
        "interaction": {"features": INTERACTING, "dim": model.embedding_dim},
        "jagged_concat": {"width": max(keys, values)},
        "jagged_split": {"width": max(keys, values)},
        "token_embedding": {"width": model.embedding_dim},
    }
    for family, sizes in dims.items():
        refusal = kernel_registry.refusal(family, kernels[family], device=device, dtype=precision, **sizes)
        if refusal is not None:
            raise UnavailableError(refusal)
    return Operators.of(kernels)


def _resolve_device(config: HSTUEngineConfig) -> torch.device:
    """Raises UnavailableError where what is asked for needs a GPU that PyTorch can't use."""
    usable = torch.cuda.is_available()
    if config.device == "cuda" and not usable:
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no NVIDIA GPU"
        raise UnavailableError(
            f"engine.device=cuda: {why}; use engine.device=cpu, or a CUDA build of torch and an NVIDIA GPU"
        )
    device = torch.device("cuda" if usable and config.device != "cpu" else "cpu")
    if config.cuda_graphs and device.type != "cuda":
        raise UnavailableError("engine.cuda_graphs=true: there are none on a CPU; set engine.cuda_graphs=false")
    return device
