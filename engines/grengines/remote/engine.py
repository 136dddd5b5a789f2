"""The remote engine: a batch is one call to a server, or to one of several."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from grengines.api import GenerateResult, RankResult, RecommendResult, Request, Setup, Tier, UnavailableError
from grengines.numerics import UNIT
from grengines.remote.client import NO_ANSWER, UNKNOWN_CALLER, Answers, Client, ServerError
from grengines.remote.config import RemoteConfig
from grengines.remote.served import differences, overrides, refusal, strategies

START = "start one: grbench serve engine=hstu"
KEY = "set engine.api_key_file=FILE, with one of its keys"
RESTART = "look into the server's log, start it if it has ended, and type the command again"


def clients_of(options: RemoteConfig) -> list[Client]:
    """Return a client of each server that the options name. Raises ValueError for a URL that is none."""
    key = Path(options.api_key_file).read_text().strip() if options.api_key_file else None
    return [Client(url, key, options.timeout_s) for url in (options.url, *options.more_urls)]


def key_of(place: int) -> str:
    """Return the option that names a server, by its place among `clients_of`."""
    return "engine.more_urls" if place else "engine.url"


class Servers:
    """Servers of the same strategies, and the requests that each has. A call goes to the one that has the fewest."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self.clients = clients
        self._has = [0] * len(clients)  # requests
        self._last = 0  # the server of the call before: of equal ones the next is taken
        self._lock = threading.Lock()

    @contextmanager
    def least_loaded(self, requests: int) -> Iterator[int]:
        """Give a call's requests to a server, and return its place."""
        with self._lock:
            count = len(self._has)
            turn = [(self._last + 1 + i) % count for i in range(count)]
            chosen = self._last = min(turn, key=self._has.__getitem__)
            self._has[chosen] += requests
        try:
            yield chosen
        finally:
            with self._lock:
                self._has[chosen] -= requests


def _coarsest(strategies: Sequence[dict[str, Any]], name: str) -> str:
    """Return the coarsest of the precisions that strategies, and their stages, have for something; "" for none."""
    found = {one for strategy in strategies for one in strategy.get(name, "").split("/")}
    return max(found & UNIT.keys(), key=UNIT.__getitem__, default="")


class RemoteEngine:
    """A server of grbench, or several; each task has a class.

    Its calls are due at the time limit, so the server refuses none for its own latency limit, and late answers count.
    """

    task: ClassVar[str]

    def __init__(self, options: RemoteConfig, setup: Setup) -> None:
        """Raises ValueError for a URL that is none."""
        self._options, self._setup = options, setup
        self._servers = Servers(clients_of(options))
        self._max_batch = 0
        self._status: dict[str, Any] = {}

    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        """Wait until the servers are ready. Raises UnavailableError if one is not, ValueError if one serves others."""
        self._max_batch = max_batch
        longest = max((len(request.history_items) for request in sample), default=0)
        for place, client in enumerate(self._servers.clients):
            try:
                client.wait_until_ready(self._options.timeout_s, self._setup.report)
                status = client.status()
            except ServerError as e:
                raise UnavailableError(
                    f"{key_of(place)}: {e}; {KEY if e.status == UNKNOWN_CALLER else START}"
                ) from None
            mine = self._setup
            its = (mine.catalogue, longest, mine.seed, mine.model, mine.retrieval)
            if asked := differences(status, self.task, *its):
                words = shlex.join(overrides(asked))
                raise ValueError(f"{key_of(place)}: {refusal(client.url, status, asked)}; set {words}")
            self._status = self._status or status
            if (there := strategies(status)) != (first := strategies(self._status)):
                raise ValueError(
                    f"engine.more_urls: {self._options.more_urls[place - 1]} serves {there}, and {self._options.url} "
                    f"serves {first}; start both with the same words"
                )

    def actual(self) -> dict[str, Any]:
        """Return the facts of the server. The gate's reference runs here, so `device` is this machine's."""
        strategies = self._status["strategies"]
        stored = {name: _coarsest(strategies, name) for name in ("cache_precision", "attention_precision")}
        coarsest = _coarsest(strategies, "precision") or "fp32"
        stage = {"device": "cpu", "precision": coarsest, **stored}
        return {
            "engine": "remote",
            "task": self.task,
            "device": "cpu",
            "device_name": "of the server",
            "precision": coarsest,
            **stored,
            **({"retrieve": stage, "rank": stage} if self.task == "recommend" else {}),
            "url": self._options.url,
            "more_urls": self._options.more_urls,
            "kernels": {},
            "server": {key: self._status[key] for key in ("version", "model", "limits", "strategies")},
        }

    def reset_cache(self, keep: Tier = Tier.NONE) -> None:
        """Do nothing: the cache is the server's, and other clients may use it."""

    def close(self) -> None:
        """Do nothing: connections end with their threads."""

    def _ask(self, requests: Sequence[Request]) -> tuple[Answers, dict[str, Any]]:
        """Return the answers of a server, and its wait and compute; the transfer is everything else.

        Of several servers `details` counts the requests of each.
        """
        begun = time.perf_counter()
        with self._servers.least_loaded(len(requests)) as place:
            try:
                answers = getattr(self._servers.clients[place], self.task)(requests, self._options.timeout_s * 1e3)
            except ServerError as e:
                raise e if e.status != NO_ANSWER else ServerError(NO_ANSWER, f"{e}; {RESTART}") from None
        took_ms = (time.perf_counter() - begun) * 1e3
        wait_ms, compute_ms = answers.parameters["queue_ms"], answers.parameters["compute_ms"]
        times = {
            "batch_ms": 0.0,
            "wait_ms": wait_ms,
            "compute_ms": compute_ms,
            "transfer_ms": max(took_ms - wait_ms - compute_ms, 0.0),
        }
        several = len(self._servers.clients) > 1
        return answers, times | ({"details": {f"server_{place + 1}": float(len(requests))}} if several else {})

    def _lists(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the fields of a result that has items for every request."""
        answers, times = self._ask(requests)
        tokens = sum(len(r.history_items) for r in requests)
        return {"items": answers.items, "scores": answers.scores, "tokens": tokens, "padded_tokens": tokens, **times}


class RemoteRanker(RemoteEngine):
    """Servers that rank. Satisfies grengines.api.Ranker."""

    task = "rank"

    def rank(self, requests: Sequence[Request]) -> RankResult:
        """Score every candidate of every request. Raises ServerError."""
        answers, times = self._ask(requests)
        tokens = sum(len(r.history_items) + len(r.candidates) for r in requests)
        return RankResult(scores=answers.scores, tokens=tokens, padded_tokens=tokens, **times)


class RemoteGenerator(RemoteEngine):
    """Servers that generate. Satisfies grengines.api.Generator."""

    task = "generate"

    def generate(self, requests: Sequence[Request]) -> GenerateResult:
        """Find the most likely next items of every request. Raises ServerError."""
        return GenerateResult(**self._lists(requests))


class RemoteRecommender(RemoteEngine):
    """Servers that find items and rank them."""

    task = "recommend"

    def recommend(self, requests: Sequence[Request]) -> RecommendResult:
        """Find and rank items for every request. Raises ServerError."""
        return RecommendResult(**self._lists(requests))
