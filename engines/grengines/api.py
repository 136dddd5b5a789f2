"""The contract of an engine: the requests and the setup it is given, and the results it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from grengines.cache.config import CacheConfig, PagedCacheConfig
    from grengines.models.decoder.config import DecoderConfig
    from grengines.models.hstu.config import HSTUConfig
    from grengines.semantic.ids import SemanticIds

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Catalogue:
    """Counts of a workload's users, items and actions. Ids run from 0 to count - 1."""

    num_users: int
    num_items: int
    num_actions: int  # action bits in use; an event's actions are a bit mask over them


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One user's visit: rank `candidates` given the history so far.

    The four history arrays have one entry for each event, oldest first. Events from `num_seen` on are new since the
    user's last request in the trace. Arrays may be views. They are never written.
    """

    request_id: int
    user_id: int
    history_items: Int64Array  # [events] item ids
    history_actions: Int64Array  # [events] bit masks over Catalogue.num_actions
    history_weights: Float32Array  # [events] rating, watch time or the like, scaled to about [0, 1]
    history_timestamps: Int64Array  # [events] seconds
    num_seen: int  # events of the history that the user's previous request had; 0 for the first request
    candidates: Int64Array  # [num_candidates] item ids
    timestamp: int  # time of the visit, seconds on the clock of the history
    arrival_s: float  # arrival in the trace, seconds from the trace's start
    deadline_ms: float  # after its arrival; a later answer is useless

    def with_events(self, part: slice) -> Request:
        """Return the request with a part of the history."""
        return replace(
            self,
            history_items=self.history_items[part],
            history_actions=self.history_actions[part],
            history_weights=self.history_weights[part],
            history_timestamps=self.history_timestamps[part],
        )


@dataclass(frozen=True)
class Retrieval:
    """Semantic IDs of the items, and the beam search over them."""

    ids: SemanticIds
    k: int  # items to return
    beam_width: int  # at least k
    weights: str | None = None  # safetensors file of the generator; None: random weights from the seed

    def prompt(self, request: Request) -> Int64Array:
        """Return the codes of the items of the history, level by level, oldest item first: int64 [tokens]."""
        return self.ids.tokens(request.history_items).reshape(-1)


RANDOM = "random, seed "  # and the seed: an engine's `weights` that no file holds


@dataclass(frozen=True)
class Setup:
    """The model that an engine serves and its surroundings: everything but the engine's own options."""

    model: HSTUConfig | DecoderConfig
    kernels: dict[str, str]  # the variant of each operator family
    catalogue: Catalogue
    seed: int  # of random weights
    cache: CacheConfig | PagedCacheConfig
    retrieval: Retrieval | None = None  # for the tasks that generate
    report: Callable[[str], None] = lambda line: None  # takes a line for the user while the engine gets ready


class Tier(IntEnum):
    """The fastest memory that holds a user's state."""

    DEVICE = 0
    HOST = 1
    STORAGE = 2
    NONE = 3


class Cached(NamedTuple):
    """The part of a request's history that was not computed again."""

    tokens: int = 0
    from_host: int = 0  # those of them that were loaded from the host tier
    of: int = 0  # tokens of the history
    from_storage: int = 0  # those of `tokens` that were read from the storage tier


@dataclass(kw_only=True)
class BatchResult:
    """Times of one batch in host milliseconds, with device work synchronised."""

    batch_ms: float  # assembling the batch on the host
    transfer_ms: float  # copies to the device and back
    compute_ms: float  # everything on the device between the copies
    tokens: int  # real tokens in the batch
    padded_tokens: int  # tokens computed, padding included
    wait_ms: float = 0.0  # until the batches before this one let it on the device
    details: dict[str, float] = field(default_factory=dict)  # further figures; a run sums them by name
    stages: dict[str, float] = field(default_factory=dict)  # milliseconds of each stage of a pipeline, without waits
    cached: list[Cached] = field(default_factory=list)  # for each request; empty without a cache
    fallback: str = ""  # the engine behind the first one that answered, by its name in `engine.fallback`


@dataclass(kw_only=True)
class RankResult(BatchResult):
    """Scores of the candidates of every request."""

    scores: list[Float32Array]  # for each request [num_candidates, num_tasks] logits


@dataclass(kw_only=True)
class GenerateResult(BatchResult):
    """Generated items of every request."""

    items: list[Int64Array]  # for each request [k] item ids, best first; fewer where fewer exist
    scores: list[Float32Array]  # for each request [k] sums of the codes' log-probabilities


@dataclass(kw_only=True)
class RecommendResult(BatchResult):
    """Generated and ranked items of every request."""

    items: list[Int64Array]  # for each request [k] generated item ids, by the first task's score, best first
    scores: list[Float32Array]  # for each request [k, num_tasks] logits, in that order


@dataclass
class Finished:
    """The answer to one request of an engine with continuous batching."""

    key: int
    items: Int64Array  # as in the task's result
    scores: Float32Array
    tokens: int  # of its prompt
    details: dict[str, float] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    cached: Cached = field(default_factory=Cached)
    fallback: str = ""  # as in the task's result


class UnavailableError(RuntimeError):
    """This machine can't run the configuration. The message names what is missing and the command that installs it."""


class Engine(Protocol):
    """An engine answers batches of requests. It is built, prepared, used and closed.

    It has a method for each task of its row in `grengines.registry`: `rank`, `generate` or `recommend`. They take at
    most `max_batch` requests and return RankResult, GenerateResult or RecommendResult. Several threads may call them at
    once, except those of a ContinuousEngine. A call waits until the work of the call before it is queued on the device.
    """

    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        """Load, compile and warm up for requests like `sample`, which may be the whole trace."""

    def actual(self) -> dict[str, Any]:
        """Return what really runs: device, precision, kernel variants, graph buckets, library versions. JSON values."""

    def reset_cache(self, keep: Tier = Tier.NONE) -> None:
        """Drop cached user states: a measurement begins with an empty cache.

        keep: move the states to this tier, HOST or STORAGE, and keep what is there. Without a disk STORAGE is as HOST.
        """

    def close(self) -> None:
        """Release device memory and threads."""


@runtime_checkable
class CachingEngine(Engine, Protocol):
    """An engine that reports whose state it has."""

    def tier_of(self, user: int) -> Tier:
        """Return where the user's state is at this moment. Cheap, and never waits for a batch."""

    def state_bytes(self) -> dict[Tier, int]:
        """Return the bytes that users' states take at this moment, by tier; empty without a cache. As cheap."""


class Ranker(Engine, Protocol):
    """An engine with the task rank."""

    def rank(self, requests: Sequence[Request]) -> RankResult:
        """Score every candidate of every request."""


class Generator(Engine, Protocol):
    """An engine with the task generate."""

    def generate(self, requests: Sequence[Request]) -> GenerateResult:
        """Find the most likely next items of every request."""


@runtime_checkable
class ContinuousEngine(Engine, Protocol):
    """An engine that batches by itself, step by step: requests join and leave at any step. One thread calls it."""

    @property
    def unfinished(self) -> int:
        """Number of admitted requests without an answer."""

    def admit(self, key: int, request: Request) -> None:
        """Begin one request. Raises ValueError for a request that can never fit."""

    def step(self) -> list[Finished]:
        """Advance all requests by one step. Returns the answers that are complete, which may be of an earlier step."""
