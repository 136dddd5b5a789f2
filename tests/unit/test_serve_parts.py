"""The parts of the server by themselves: calls from damaged bytes, costs, users' histories, deployment files."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.checkout import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from grbench.serve.costs import Costs, Kind
from grbench.serve.errors import RefusedError
from grbench.serve.metrics import Metrics
from grbench.serve.protocol import parse_call
from grbench.serve.requests import INPUTS, Bounds, decode
from grbench.serve.state import Histories, History
from grengines.api import Catalogue

BOUNDS = Bounds("rank", Catalogue(10, 50, 3), max_users=4, max_history=8, max_candidates=6)
NUMBERS = st.one_of(st.integers(-2, 60), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=2))
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from([*INPUTS, "OTHER"]),
        "shape": st.one_of(st.lists(st.integers(-1, 9), max_size=2), NUMBERS),
        "datatype": st.sampled_from(["INT64", "FP32", "UINT8", "BOOL", "BYTES", ""]),
        "data": st.one_of(st.lists(NUMBERS, max_size=9), NUMBERS),
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": NUMBERS}),
    },
)
CALL = st.fixed_dictionaries({}, optional={"inputs": st.lists(TENSOR, max_size=8), "id": NUMBERS, "outputs": NUMBERS})


def answer(body: bytes, length: str | None) -> str:
    """Take a call as the server does; return the refusal, or nothing."""
    try:
        call = parse_call(body, length)
        for request in decode(call.tensors, BOUNDS, Histories(4, 8)):
            assert 1 <= len(request.history_items) <= 8 and 1 <= len(request.candidates) <= 6
            assert np.isfinite(request.history_weights).all()
    except RefusedError as e:
        assert 400 <= e.status < 500
        return str(e)
    return ""


@given(CALL, st.binary(max_size=40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_random_calls_are_refused_in_one_line(call: Any, rest: bytes, binary: bool) -> None:
    body = json.dumps(call).encode()
    refused = answer(body + (rest if binary else b""), str(len(body)) if binary else None)
    assert refused and "\n" not in refused


@given(st.integers(0, 400), st.binary(min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_damaged_calls_are_answered_or_refused(at: int, damage: bytes) -> None:
    tensors = {"USER_IDS": [1], "TOKEN_LENGTHS": [3], "TOKENS": [1, 2, 3], "NUM_CANDIDATES": [1]}
    inputs = [{"name": n, "shape": [len(d)], "datatype": "INT64", "data": d} for n, d in tensors.items()]
    body = json.dumps({"inputs": inputs}).encode()
    assert answer(body, None) == ""
    answer(body[:at] + damage + body[at + len(damage) :], None)


def history(*items: int) -> History:
    column = np.array(items, np.int64)
    return History(column, column, column.astype(np.float32), column)


def test_a_history_has_the_events_once_and_in_order() -> None:
    kept = Histories(max_users=2, max_history=4)
    assert kept.append(1, 0, history(1, 2, 3)) == (3, False)
    assert kept.append(1, 0, history(1, 2, 3)) == (3, True)
    assert kept.append(1, 1, history(2)) == (3, True)
    assert kept.append(1, 3, history(4, 5)) == (5, False)
    assert kept.at(1, 5).items.tolist() == [2, 3, 4, 5]  # the newest
    for version, items, status in [(6, (6,), 409), (3, (4, 9), 409), (3, (4, 5, 6), 409), (0, (1,), 409)]:
        with pytest.raises(RefusedError, match="has version 5") as refused:
            kept.append(1, version, history(*items))
        assert refused.value.status == status
    kept.append(2, 0, history(1))
    kept.append(3, 0, history(1))
    with pytest.raises(RefusedError, match="user 1 has no state here") as refused:
        kept.at(1, 5)
    assert refused.value.status == 404 and len(kept) == 2


def test_costs_follow_what_batches_take() -> None:
    costs = Costs(0.010, {Kind(5): 0.001, Kind(7): 0.004})
    assert costs.batch_s([Kind(5), Kind(7)]) == pytest.approx(0.015)
    assert costs.each_s(Kind(8)) == pytest.approx(0.008)  # twice the tokens of the nearest kind
    assert costs.each_s(Kind(7, cached=True)) == pytest.approx(0.004)  # until one is measured
    for _ in range(200):
        costs.observe([Kind(5), Kind(7)], 0.030)
    assert costs.batch_s([Kind(5), Kind(7)]) == pytest.approx(0.030, rel=0.01)
    before = costs.batch_s([Kind(5)])
    costs.observe([Kind(5)], 100.0)  # a pause
    assert costs.batch_s([Kind(5)]) < 1.5 * before


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    metrics = Metrics(0.08)
    metrics.watch(lambda: [("a", "ready", "hstu", 0, 0)], lambda: 0)
    known = {family.name for family in metrics.registry.collect()}
    dashboard = json.loads((ROOT / "deployment" / "grafana" / "dashboard.json").read_text())
    asked = set(re.findall(r"grbench_\w+", str([t["expr"] for p in dashboard["panels"] for t in p["targets"]])))
    assert len(asked) >= 10
    assert {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked} <= known


def test_the_files_of_a_deployment_parse() -> None:
    files = sorted((ROOT / "deployment").rglob("*.yaml"))
    assert len(files) >= 5
    assert all(list(yaml.safe_load_all(path.read_text())) for path in files)
    compose = yaml.safe_load((ROOT / "deployment" / "compose.yaml").read_text())
    mounted = [v.split(":")[0] for s in compose["services"].values() for v in s.get("volumes", []) if v[0] == "."]
    assert mounted and all((ROOT / "deployment" / path).is_file() for path in mounted)
