"""The native engine with faults that a test switches on while it serves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from grengines.api import RankResult, Request
from grengines.hstu.config import HSTUEngineConfig
from grengines.hstu.engine import HSTUEngine
from grengines.options import option
from grengines.spec import EngineSpec

FAULTS: dict[str, str] = {}  # label of an engine: its fault
POISON, LOSES, STICKS = 7, 8, 9  # items: a request with one as its only candidate can't be answered, or breaks for good
SWITCHES = {LOSES: "lose the device", STICKS: "hang"}


@dataclass
class FaultyConfig(HSTUEngineConfig):
    name: str = option("faulty", "name of the engine")
    label: str = option("first", "which of several engines it is")
    delay_ms: float = option(0.0, "longer time of a batch")


SPEC = EngineSpec("faulty", FaultyConfig, {"rank": "helpers.faulty_engine:FaultyEngine"}, one_at_a_time=None)


class FaultyEngine(HSTUEngine):
    name = "faulty"

    def rank(self, requests: Sequence[Request]) -> RankResult:
        label = self._options.label
        for request in requests:
            if len(request.candidates) == 1 and (switched := SWITCHES.get(request.candidates[0])):
                FAULTS[label] = switched
        fault = FAULTS.get(label)
        if fault == "raise":
            raise RuntimeError("the engine is broken")
        if fault == "lose the device":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        while FAULTS.get(self._options.label) == "hang":
            time.sleep(0.01)
        delay_s = self._options.delay_ms / 1e3
        time.sleep(delay_s)
        if any(r.candidates.tolist() == [POISON] for r in requests):
            raise ValueError("one request can't be answered")
        result = super().rank(requests)
        result.compute_ms += delay_s * 1e3
        if fault == "scores of others":
            return replace(result, scores=[np.roll(s, 1, axis=0) + np.float32(0.5) for s in result.scores])
        if fault == "not finite":
            return replace(result, scores=[s * np.float32(np.nan) for s in result.scores])
        return result
