"""The fp32 reference's answers that the cells of a search share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grbench.quality.references import References
from grengines.api import Catalogue, Request
from grengines.models.hstu.config import HSTUConfig

CATALOGUE = Catalogue(3, 9, 1)


def request_of(number: int, items: int, candidates: int) -> Request:
    events = np.arange(items)
    return Request(
        request_id=number,
        user_id=number,
        history_items=events,
        history_actions=events,
        history_weights=events.astype(np.float32),
        history_timestamps=events,
        num_seen=0,
        candidates=np.arange(candidates),
        timestamp=items,
        arrival_s=0.5,
        deadline_ms=80.0,
    )


REQUESTS = [request_of(0, 3, 2), request_of(1, 4, 3)]


class Asked:
    """The answers of a search's cells. times: the reference was asked."""

    def __init__(self, folder: Path) -> None:
        self.weights, self.times = folder / "weights.safetensors", 0
        self.weights.write_bytes(b"first")
        self.spec: Any = SimpleNamespace(
            task="rank", seed=0, model=HSTUConfig(weights=str(self.weights)), retrieval=None, engine="hstu"
        )
        self.references = References(folder / "search", "code of today")

    def __call__(self, requests: list[Request] = REQUESTS) -> list[Any]:
        def compute() -> list[Any]:
            self.times += 1
            return [np.full((len(r.candidates), 2), self.times + r.request_id, np.float32) for r in requests]

        return self.references.of(self.spec, CATALOGUE, None, "cpu", requests, compute)


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


def test_configurations_of_one_model_share_the_answers(asked: Asked) -> None:
    first = asked()
    asked.spec.engine = "onnxruntime"
    again = asked()
    assert asked.times == 1
    for one, other in zip(first, again, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("changed", ["weights", "code", "model", "seed", "history", "candidates"])
def test_what_decides_the_answers_makes_new_ones(asked: Asked, changed: str) -> None:
    first, requests = asked(), list(REQUESTS)
    if changed == "weights":
        asked.weights.write_bytes(b"other weights")
    elif changed == "code":
        asked.references = replace(asked.references, code="code of tomorrow")
    elif changed == "model":
        asked.spec.model = replace(asked.spec.model, layers=asked.spec.model.layers + 1)
    elif changed == "seed":
        asked.spec.seed = 1
    elif changed == "history":
        requests[1] = replace(requests[1], history_items=requests[1].history_items[::-1])
    else:
        requests[1] = replace(requests[1], candidates=requests[1].candidates + 1)
    other = asked(requests)
    assert asked.times == 2 and other[0][0, 0] == first[0][0, 0] + 1
    assert asked(requests)[0][0, 0] == other[0][0, 0] and asked.times == 2


def test_a_damaged_file_is_made_anew(asked: Asked) -> None:
    first = asked()
    [file] = asked.references.folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole.replace(first[0].tobytes(), (first[0] + 1).tobytes()))
    assert asked()[0][0, 0] == 2.0 and asked.times == 2
    file.write_bytes(whole[: len(whole) // 2])
    assert asked()[0][0, 0] == 3.0 and asked.times == 3


@pytest.mark.parametrize("why", ["no folder", "unknown code"])
def test_answers_that_are_not_kept_are_those_of_the_reference(asked: Asked, why: str) -> None:
    if why == "no folder":
        asked.references.folder.write_text(why)
    else:
        asked.references = replace(asked.references, code=None)
    assert [asked()[0][0, 0], asked()[0][0, 0]] == [1.0, 2.0]
