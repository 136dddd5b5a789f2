"""The remote engine: a batch is one call to a server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grengines.api import GenerateResult, RankResult, RecommendResult, Request, Setup, UnavailableError
from grengines.remote.client import Answers, Client, ServerError
from grengines.remote.config import RemoteConfig

COARSEST = ("fp8", "int8", "bf16", "fp16", "fp32")
START = "start one: grbench serve engine=hstu"


def client_of(options: RemoteConfig) -> Client:
    """Return a client of the server that the options name. Raises ValueError for a URL that is none."""
    key = Path(options.api_key_file).read_text().strip() if options.api_key_file else None
    return Client(options.url, key, options.timeout_s)


class RemoteEngine:
    """A server of grbench. Satisfies grengines.api.Ranker and Generator, and recommends, by the server's task.

    Its calls are due at the time limit, so the server refuses none for its own latency limit, and late answers count.
    """

    def __init__(self, options: RemoteConfig, setup: Setup) -> None:
        """Raises ValueError for a URL that is none."""
        self._options, self._setup = options, setup
        self._client = client_of(options)
        self._max_batch = 0
        self._status: dict[str, Any] = {}

    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        """Wait until the server is ready. Raises UnavailableError if it is not, ValueError if it serves other items."""
        self._max_batch = max_batch
        try:
            self._client.wait_until_ready(self._options.timeout_s, self._setup.report)
            self._status = self._client.status()
        except ServerError as e:
            raise UnavailableError(f"engine.url: {e}; {START}") from None
        served, own = self._status["items"], self._setup.catalogue.num_items
        if served != own:
            raise ValueError(
                f"workload: it has {own} items, and the server's has {served}; give the options of the server"
            )

    def rank(self, requests: Sequence[Request]) -> RankResult:
        """Score every candidate of every request. Raises ServerError."""
        begun = time.perf_counter()
        answers = self._client.rank(requests, self._options.timeout_s * 1e3)
        times = self._times(answers, begun)
        tokens = sum(len(r.history_items) + len(r.candidates) for r in requests)
        return RankResult(scores=answers.scores, tokens=tokens, padded_tokens=tokens, **times)

    def generate(self, requests: Sequence[Request]) -> GenerateResult:
        """Find the most likely next items of every request. Raises ServerError."""
        begun = time.perf_counter()
        answers = self._client.generate(requests, self._options.timeout_s * 1e3)
        times = self._times(answers, begun)
        tokens = sum(len(r.history_items) for r in requests)
        return GenerateResult(items=answers.items, scores=answers.scores, tokens=tokens, padded_tokens=tokens, **times)

    def recommend(self, requests: Sequence[Request]) -> RecommendResult:
        """Find and rank items for every request. Raises ServerError."""
        begun = time.perf_counter()
        answers = self._client.recommend(requests, self._options.timeout_s * 1e3)
        times = self._times(answers, begun)
        tokens = sum(len(r.history_items) for r in requests)
        return RecommendResult(items=answers.items, scores=answers.scores, tokens=tokens, padded_tokens=tokens, **times)

    def actual(self) -> dict[str, Any]:
        """Return the facts of the server. The gate's reference runs here, so `device` is this machine's."""
        strategies = self._status["strategies"]
        precisions = {s["precision"] for s in strategies}
        coarsest = next((p for p in COARSEST if p in precisions), "fp32")
        states = {s.get("cache_precision", "") for s in strategies}
        stored = {"cache_precision": next((p for p in COARSEST if p in states), "")}
        attention = {s.get("attention_precision", "") for s in strategies}
        stored["attention_precision"] = next((p for p in COARSEST if p in attention), "")
        stage = {"device": "cpu", "precision": coarsest, **stored}
        return {
            "engine": "remote",
            "task": self._status["task"],
            "device": "cpu",
            "device_name": "of the server",
            "precision": coarsest,
            **stored,
            **({"retrieve": stage, "rank": stage} if self._status["task"] == "recommend" else {}),
            "url": self._options.url,
            "kernels": {},
            "server": {key: self._status[key] for key in ("version", "model", "limits", "strategies")},
        }

    def reset_cache(self, keep_host: bool = False) -> None:
        """Do nothing: the cache is the server's, and other clients may use it."""

    def close(self) -> None:
        """Do nothing: connections end with their threads."""

    @staticmethod
    def _times(answers: Answers, begun: float) -> dict[str, Any]:
        """Return the server's wait and compute; the transfer is everything else."""
        took_ms = (time.perf_counter() - begun) * 1e3
        wait_ms, compute_ms = answers.parameters["queue_ms"], answers.parameters["compute_ms"]
        transfer_ms = max(took_ms - wait_ms - compute_ms, 0.0)
        return {"batch_ms": 0.0, "wait_ms": wait_ms, "compute_ms": compute_ms, "transfer_ms": transfer_ms}
