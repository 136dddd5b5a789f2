"""An engine whose behaviour is known, driven through the real LoadGen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grbench.scenarios import Measurement, run_scenario
from grbench.scenarios.config import (
    ScenarioConfig,
)
from grengines.api import RankResult, Request, Tier

EMPTY = np.zeros(0, np.int64)


def make_requests(count: int, interval_s: float = 0.01) -> list[Request]:
    return [
        Request(i, i % 7, EMPTY, EMPTY, EMPTY.astype(np.float32), EMPTY, 0, EMPTY, 0, i * interval_s, 80.0)
        for i in range(count)
    ]


class SleepyEngine:
    """Takes `seconds` a batch and remembers its batches."""

    def __init__(self, seconds: float = 0.001, fail_at: int | None = None) -> None:
        self.seconds, self.fail_at = seconds, fail_at
        self.batches: list[list[int]] = []

    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        pass

    def rank(self, requests: Sequence[Request]) -> RankResult:
        if self.fail_at is not None and len(self.batches) >= self.fail_at:
            raise RuntimeError("the device fell off the bus")
        self.batches.append([r.request_id for r in requests])
        begun = time.perf_counter()
        time.sleep(self.seconds)
        took_ms = (time.perf_counter() - begun) * 1e3
        return RankResult(
            scores=[],
            batch_ms=0.1 * took_ms,
            transfer_ms=0.2 * took_ms,
            compute_ms=0.7 * took_ms,
            tokens=3 * len(requests),
            padded_tokens=4 * len(requests),
        )

    def actual(self) -> dict[str, Any]:
        return {}

    def reset_cache(self, keep: Tier = Tier.NONE) -> None:
        pass

    def close(self) -> None:
        pass


def drive(config: ScenarioConfig, engine: SleepyEngine, folder: Path, requests: int = 100) -> Measurement:
    return run_scenario(config, engine, make_requests(requests), latency_limit_ms=80, seed=3, folder=folder)
