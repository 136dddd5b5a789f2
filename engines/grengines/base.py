"""Base classes of the engines: device, threads, checks, common facts and close, each stated once."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch

from grengines import registry
from grengines.api import RANDOM, BatchResult, GenerateResult, RankResult, Request, Setup, Tier, UnavailableError
from grengines.models.hstu.config import HSTUConfig
from grengines.options import DeviceOptions
from grengines.runtime.batch import Encoding
from grengines.runtime.buckets import token_count
from grengines.runtime.device import DTYPES, PRODUCTS, Placement, chosen_device
from grengines.runtime.native import native
from grengines.runtime.timing import Turn, Turns
from grengines.semantic.search import check_width

Part = TypeVar("Part")
Result = TypeVar("Result", bound=BatchResult)


def placement_of(options: DeviceOptions) -> Placement:
    """Resolve `auto`: cuda if there is a GPU, and the precision by the engine's row.

    Raises UnavailableError for cuda if PyTorch can't use a GPU.
    """
    device = chosen_device(options)
    return Placement(device, registry.precision_of(options, device.type == "cuda"), options.cpu_threads)


class EngineBase(ABC):
    """An engine on one device. Satisfies grengines.api.Engine.

    A subclass implements `_load`, `_warm_up`, `_describe` and `_unload`, and the method of its task. cuda_graphs:
    whether its options ask for them. Raises UnavailableError for CUDA graphs on a CPU.
    """

    name: ClassVar[str]  # in grengines.registry
    task: ClassVar[str]

    def __init__(self, setup: Setup, placement: Placement, *, cuda_graphs: bool = False) -> None:
        if cuda_graphs and placement.device.type != "cuda":
            raise UnavailableError("engine.cuda_graphs=true: a CPU has no CUDA graphs; set engine.cuda_graphs=false")
        self._setup = setup
        self._device, self._precision, self._cpu_threads = placement.device, placement.precision, placement.cpu_threads
        self._cuda = self._device.type == "cuda"
        self._lock = threading.Lock()  # held while the engine is used, or until a batch's work is queued
        self._turns = Turns(self._lock)
        self._max_batch = 0
        self.start_s: dict[str, float] = {}  # seconds of the parts of `prepare`
        self._threads_before: int | None = None  # PyTorch's, from `prepare` until `close`

    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        """Load the engine for requests like `sample` and batches of at most `max_batch`, then warm it up.

        Raises ValueError for an empty sample or bad weights, UnavailableError for what this machine lacks, and
        PyTorch's OutOfMemoryError.
        """
        if not sample or max_batch < 1:
            raise ValueError(f"{len(sample)} sample requests, max_batch={max_batch}: both must be at least 1")
        if self._threads_before is None:
            self._threads_before = torch.get_num_threads()
        if self._cpu_threads:
            torch.set_num_threads(self._cpu_threads)
        torch.set_float32_matmul_precision("highest")  # no TF32
        self._max_batch = max_batch
        begun = time.perf_counter()
        self._load(sample, max_batch)
        loaded = time.perf_counter()
        self._warm_up(sample, max_batch)
        own_s = loaded - begun - self.start_s.get("graphs", 0.0)
        self.start_s |= {"load": own_s, "warm_up": time.perf_counter() - loaded}

    def actual(self) -> dict[str, Any]:
        """Return what really runs, as JSON values."""
        common = {
            "engine": self.name,
            "task": self.task,
            "device": self._device.type,
            "device_name": torch.cuda.get_device_name(self._device) if self._cuda else "cpu",
            "precision": self._precision,
            "fp32_products": torch.get_float32_matmul_precision(),
            "cpu_threads": torch.get_num_threads(),
            "timer": "CUDA events, one wait a batch" if self._cuda else "perf_counter",
            "weights": self._weights() or f"{RANDOM}{self._setup.seed}",
            "torch": torch.__version__,
            "cuda": torch.version.cuda if self._cuda else None,
        }
        return common | self._describe()

    def reset_cache(self, keep: Tier = Tier.NONE) -> None:  # noqa: B027
        """Drop cached user states. This engine caches none."""

    def close(self) -> None:
        """Release the model and its device memory, and restore PyTorch's threads. A second call does nothing more."""
        self._unload()
        self._max_batch = 0
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    @abstractmethod
    def _load(self, sample: Sequence[Request], max_batch: int) -> None:
        """Make everything that answers batches: model, memory, graphs."""

    @abstractmethod
    def _warm_up(self, sample: Sequence[Request], max_batch: int) -> None:
        """Answer the largest batches once."""

    @abstractmethod
    def _describe(self) -> dict[str, Any]:
        """Return the engine's own facts; they win over the common ones of `actual`."""

    @abstractmethod
    def _unload(self) -> None:
        """Drop what `_load` made, as far as it came."""

    @abstractmethod
    def _weights(self) -> str | None:
        """Return the weights file; None for random weights."""

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self._base]

    @property
    def _base(self) -> str:
        """The precision of everything but the products."""
        return PRODUCTS.get(self._precision, self._precision)

    @staticmethod
    def _ready(part: Part | None) -> Part:
        """Return something that `_load` made. Raises RuntimeError before `prepare` and after `close`."""
        if part is None:
            raise RuntimeError("the engine is not prepared, or closed; call prepare() first")
        return part

    def _ended(self, queued: Callable[[], Result], begun: float, turn: Turn) -> Result:
        """Wait for a batch whose work is queued. Returns its result with its wait for the batches before it.

        begun: start of the call (seconds, time.perf_counter). If a GPU still had an earlier batch when this one's turn
        came, the wait is what the call took beyond the parts of this batch. Otherwise it is the wait for the turn, and
        time that is in no part stays visible as such.
        """
        try:
            result = queued()
        finally:
            self._turns.end()
        result.wait_ms = turn.waited_ms
        if self._cuda and turn.behind:
            took_ms = (time.perf_counter() - begun) * 1e3
            result.wait_ms = max(took_ms - result.batch_ms - result.transfer_ms - result.compute_ms, 0.0)
        return result

    def _check_size(self, requests: Sequence[Request]) -> None:
        """Raise ValueError for an empty batch or one of more than max_batch requests."""
        if not 0 < len(requests) <= self._max_batch:
            raise ValueError(f"{len(requests)} requests in one batch; allowed is 1 to max_batch={self._max_batch}")


class RankingEngine(EngineBase):
    """An engine that ranks with HSTU. Satisfies grengines.api.Ranker."""

    task = "rank"

    def __init__(self, setup: Setup, placement: Placement, *, cuda_graphs: bool = False) -> None:
        super().__init__(setup, placement, cuda_graphs=cuda_graphs)
        assert isinstance(setup.model, HSTUConfig), "the registry refuses other models"
        self._model_config = setup.model
        self._encoding = Encoding.of(setup.model, setup.catalogue)

    @abstractmethod
    def rank(self, requests: Sequence[Request]) -> RankResult:
        """Score every candidate of every request."""

    def actual(self) -> dict[str, Any]:
        """Return what really runs, as JSON values."""
        return super().actual() | native().actual()

    def _largest(self, sample: Sequence[Request], max_batch: int) -> list[Request]:
        """Return the `max_batch` requests of most tokens, the largest last."""
        return sorted(sample, key=lambda r: token_count(r, self._encoding))[-max_batch:]

    def _weights(self) -> str | None:
        return self._model_config.weights


class GeneratingEngine(EngineBase):
    """An engine that generates items by beam search. Satisfies grengines.api.Generator.

    Raises ValueError for a beam narrower than k.
    """

    task = "generate"

    def __init__(self, setup: Setup, placement: Placement, *, cuda_graphs: bool = False) -> None:
        assert setup.retrieval is not None, "a task that generates has semantic IDs"
        self._retrieval, self._model_config = setup.retrieval, setup.model
        check_width(self._retrieval.beam_width, self._retrieval.k)
        super().__init__(setup, placement, cuda_graphs=cuda_graphs)

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> GenerateResult:
        """Find the most likely next items of every request."""

    def actual(self) -> dict[str, Any]:
        """Return what really runs, as JSON values."""
        search = {
            "beam_width": self._retrieval.beam_width,
            "k": self._retrieval.k,
            "semantic_ids": list(self._retrieval.ids.sizes),
        }
        return super().actual() | search

    def _longest(self, sample: Sequence[Request], max_batch: int) -> list[Request]:
        """Return the `max_batch` requests of the longest histories, the longest last."""
        return sorted(sample, key=lambda r: len(r.history_items))[-max_batch:]

    def _weights(self) -> str | None:
        return self._retrieval.weights
