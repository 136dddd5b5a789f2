"""The contract of an engine: the requests and the setup it is given, and the results it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from grengines.cache.config import CacheConfig, PagedCacheConfig
    from grengines.models.decoder.config import DecoderConfig
    from grengines.models.hstu.config import HSTUConfig
    from grengines.semantic.ids import SemanticIds

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Catalogue:
    """How many of each there are in a workload: ids run from 0 to count - 1."""

    num_users: int
    num_items: int
    num_actions: int  # action bits in use; an event's actions are a bit mask over them


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One user's visit: rank `candidates` given the history so far.

    The four history arrays have one entry an event, oldest first. Events from `num_seen` on came
    since the user's last request in the trace: the delta. Arrays may be views; they are never written.
    """

    request_id: int
    user_id: int
    history_items: Int64Array  # [events] item ids
    history_actions: Int64Array  # [events] bit masks over Catalogue.num_actions
    history_weights: Float32Array  # [events] rating, watch time or the like, scaled to about [0, 1]
    history_timestamps: Int64Array  # [events] seconds
    num_seen: int  # events of the history that the user's previous request held; 0 at the first
    candidates: Int64Array  # [num_candidates] item ids
    timestamp: int  # when the visit was made, seconds on the clock of the history
    arrival_s: float  # when it arrives in the trace, seconds from the trace's start
    deadline_ms: float  # an answer later than this after its arrival is worth nothing


@dataclass(frozen=True)
class Retrieval:
    """What an engine needs to generate: the items' semantic IDs, and how it searches them."""

    ids: SemanticIds
    k: int  # items to return
    beam_width: int  # at least k
    weights: str | None = None  # safetensors file of the generator; None: random weights from the seed

    def prompt(self, request: Request) -> Int64Array:
        """Return the codes of the items of the history, level by level, oldest item first: int64 [tokens]."""
        return self.ids.tokens(request.history_items).reshape(-1)


@dataclass(frozen=True)
class Setup:
    """The model that an engine serves and its surroundings: everything but the engine's own options."""

    model: HSTUConfig | DecoderConfig
    kernels: dict[str, str]  # the variant of each operator family
    catalogue: Catalogue
    seed: int  # of random weights
    cache: CacheConfig | PagedCacheConfig
    retrieval: Retrieval | None = None  # for the tasks that generate


@dataclass(kw_only=True)
class BatchResult:
    """Where one batch's time went (host milliseconds, device work synchronised)."""

    batch_ms: float  # assembling the batch on the host
    transfer_ms: float  # copies to the device and back
    compute_ms: float  # everything on the device between the copies
    tokens: int  # real tokens in the batch
    padded_tokens: int  # tokens computed on, padding included
    details: dict[str, float] = field(default_factory=dict)  # further figures, summed over a run by name
    stages: dict[str, float] = field(default_factory=dict)  # milliseconds of each stage, where there are several


@dataclass(kw_only=True)
class RankResult(BatchResult):
    scores: list[Float32Array]  # a request: [num_candidates, num_tasks] logits


@dataclass(kw_only=True)
class GenerateResult(BatchResult):
    items: list[Int64Array]  # a request: [k] item ids, best first; fewer where fewer exist
    scores: list[Float32Array]  # a request: [k] sums of the codes' log-probabilities


@dataclass(kw_only=True)
class RecommendResult(BatchResult):
    items: list[Int64Array]  # a request: [k] generated item ids in the order of the first task's score, best first
    scores: list[Float32Array]  # a request: [k, num_tasks] logits, in that order


@dataclass
class Finished:
    """One request's end in an engine with continuous batching."""

    key: int
    items: Int64Array  # as in the task's result
    scores: Float32Array
    tokens: int  # of its prompt
    details: dict[str, float] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)


class UnavailableError(RuntimeError):
    """This machine can't run what was asked; the message says what is missing and how to get it."""


class Engine(Protocol):
    """An engine answers batches of requests. It is built, prepared once, used, closed.

    It has a method for each task that `grengines.registry` says it has: `rank`, `generate` or `recommend`, which take
    at most `max_batch` requests and return RankResult, GenerateResult or RecommendResult. Several threads may call them
    at once, but for a ContinuousEngine's: what is not queued on a device by one is not begun by the next.
    """

    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        """Load, compile and warm up for requests like `sample` (the whole trace may be passed)."""

    def actual(self) -> dict[str, Any]:
        """What really runs: device, precision, kernel variants, graph buckets, library versions."""

    def reset_cache(self, keep_host: bool = False) -> None:
        """Drop what is cached of users: a measurement begins with an empty cache. keep_host: what is on the device goes
        to the host tier, where there is one, and what is there stays."""

    def close(self) -> None:
        """Release device memory and threads."""


class Ranker(Engine, Protocol):
    def rank(self, requests: Sequence[Request]) -> RankResult:
        """Score every candidate of every request."""


class Generator(Engine, Protocol):
    def generate(self, requests: Sequence[Request]) -> GenerateResult:
        """The most likely next items of every request."""


@runtime_checkable
class ContinuousEngine(Engine, Protocol):
    """Batches by itself, step by step: requests join and leave while others are under way. One thread calls it."""

    @property
    def unfinished(self) -> int:
        """Requests under way."""

    def admit(self, key: int, request: Request) -> None:
        """Begin one request. Raises ValueError for one that can never fit."""

    def step(self) -> list[Finished]:
        """Go one step on with what is under way; returns what ended with it."""
