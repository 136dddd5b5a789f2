"""The gate passes what is right and fails what is wrong, on the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.config.schema import RunSpec
from grbench.execution.retrieval import build_retrieval
from grbench.gate.base import sample
from grbench.gate.generate import GenerateGate, _Finding
from grbench.gate.measured import Answer
from grbench.gate.rank import RankGate
from grbench.workloads.trace import Trace
from grengines import registry
from grengines.api import Cached, Engine, RankResult, Request
from grengines.numerics import IncorrectError, relative_error, require_contrast

SMALL = ["workload=synthetic", "workload.max_requests=40", "workload.max_history=96"]
OVERRIDES = [*SMALL, "engine=hstu", "engine.device=cpu"]


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    return compose_spec(OVERRIDES)[0]


@pytest.fixture(scope="module")
def trace(spec: RunSpec) -> Trace:
    return workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)


def engine_of(spec: RunSpec, trace: Trace) -> Engine:
    engine = registry.build(spec.engine, spec.model, spec.kernel, trace.catalogue, spec.seed)
    engine.prepare(trace.requests, 4)
    return engine


def gate_of(spec: RunSpec, trace: Trace, precision: str = "fp32") -> RankGate:
    return RankGate(spec, trace.catalogue, trace.requests, "cpu", precision)


class Wrong:
    """An engine whose answers are changed on their way out."""

    def __init__(self, engine: Engine, how: str) -> None:
        self.engine, self.how = engine, how
        self.kept: RankResult | None = None

    def rank(self, requests: Sequence[Request]) -> RankResult:
        result = self.engine.rank(requests)
        scores = result.scores
        if self.how == "zeros":
            scores = [np.zeros_like(s) for s in scores]
        elif self.how == "stale":
            scores = scores[-1:] + scores[:-1]
        elif self.how == "one candidate off":
            scores = [np.roll(s, 1, axis=0) for s in scores]
        elif self.how == "nan":
            scores = [s.copy() for s in scores]
            scores[0][0, 0] = np.nan
        elif self.how == "history ignored":
            short = [replace(r, **{f: getattr(r, f)[-1:] for f in HISTORY}) for r in requests]
            scores = self.engine.rank(short).scores
        return replace(result, scores=scores)


HISTORY = ("history_items", "history_actions", "history_weights", "history_timestamps")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_native_engine_passes_in_every_precision(trace: Trace, precision: str) -> None:
    spec = compose_spec([*OVERRIDES, f"engine.precision={precision}"])[0]
    result = gate_of(spec, trace, precision).check(engine_of(spec, trace), 4)
    assert result.passed
    assert result.error <= result.tolerance
    assert result.zero_attention_error > 2 * result.tolerance
    assert (result.error == 0) is False or precision == "fp32"


@pytest.mark.parametrize("how", ["zeros", "stale", "one candidate off", "nan", "history ignored"])
def test_a_wrong_answer_fails(spec: RunSpec, trace: Trace, how: str) -> None:
    with pytest.raises(IncorrectError, match=r"differ from the fp32 reference|not a finite number") as caught:
        gate_of(spec, trace).check(Wrong(engine_of(spec, trace), how), 4)  # type: ignore[arg-type]
    assert how == "nan" or (caught.value.result is not None and caught.value.result.passed is False)


def test_another_seeds_weights_fail(spec: RunSpec, trace: Trace) -> None:
    other = registry.build(spec.engine, spec.model, spec.kernel, trace.catalogue, spec.seed + 1)
    other.prepare(trace.requests, 4)
    with pytest.raises(IncorrectError):
        gate_of(spec, trace).check(other, 4)


def test_a_gate_that_could_not_fail_is_refused(spec: RunSpec, trace: Trace) -> None:
    blind = gate_of(spec, trace)
    blind.tolerance = 1.0
    with pytest.raises(IncorrectError, match="can't tell right from wrong"):
        blind.check(engine_of(spec, trace), 4)


def test_requests_of_one_number_have_their_own_reference(spec: RunSpec, trace: Trace) -> None:
    """LoadGen's accuracy mode numbers its requests anew, and cells of one engine share the reference's answers."""
    gate, engine = gate_of(spec, trace), engine_of(spec, trace)
    first = trace.requests[0]
    for request in (first, replace(trace.requests[1], request_id=first.request_id, candidates=first.candidates)):
        [scores] = engine.rank([request]).scores  # type: ignore[attr-defined]
        [verdict] = gate.judge([Answer(request, None, scores, 0, 1, 0, Cached(), "")])
        assert verdict.problem is None


def test_the_sample_has_the_shortest_and_the_longest_history(trace: Trace) -> None:
    lengths = [len(r.history_items) for r in trace.requests]
    chosen = sample(trace.requests, 4, seed=1)
    assert {min(lengths), max(lengths)} <= {len(r.history_items) for r in chosen}
    assert len({r.request_id for r in chosen}) == 4


def test_relative_error_of_nan_is_infinite() -> None:
    one = np.ones(3, np.float32)
    assert relative_error(np.array([1, np.nan, 1], np.float32), one) == float("inf")
    assert relative_error(2 * one, one) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_relative_error_is_not_rounded_to_the_type_of_the_outputs(dtype: torch.dtype) -> None:
    exact = torch.linspace(1, 2, 1000, dtype=torch.float64)
    out = (exact * (1 + 2**-6)).to(dtype)
    expected = float((out.double() - exact).norm() / exact.norm())
    assert expected == pytest.approx(2**-6, rel=0.05)
    assert relative_error(out, exact) == pytest.approx(expected, rel=1e-12)
    assert relative_error(out, exact.float()) == pytest.approx(expected, rel=1e-4)


def test_relative_error_of_what_cannot_be_compared_is_infinite() -> None:
    one, zero = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    infinite = float("inf")
    assert relative_error(one.T, one) == infinite
    assert relative_error(one[:1], one) == infinite  # NumPy would broadcast
    assert relative_error(one, zero) == infinite
    assert relative_error(one * np.float32(np.inf), one) == infinite
    assert relative_error(one, one * np.float32(np.nan)) == infinite
    assert relative_error(zero, zero) == 0.0
    assert relative_error(one[:0], one[:0]) == 0.0


def test_wrong_answers_must_lie_outside_twice_the_tolerance() -> None:
    require_contrast({"zeros": 1.0, "stale answers": 0.21}, 0.1)
    for error in (0.2, float("nan")):
        with pytest.raises(IncorrectError, match="can't tell right from wrong here: the error of stale answers is"):
            require_contrast({"zeros": 1.0, "stale answers": error}, 0.1)


def test_every_answer_is_judged_by_what_rounding_costs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong answer leaves none unjudged, so the number of wrong ones is right."""
    errors, own = [9.0, 0.5, 2.0, 3.0], [1.0, 1.0, 4.0, 1.0]

    def compare(gate: GenerateGate, expected: int, i: int, *answer: object, tolerance: float = 1.0) -> _Finding:
        return _Finding("wrong" if errors[i] > tolerance else None, errors[i])

    monkeypatch.setattr(GenerateGate, "_find", lambda gate, requests: requests)
    monkeypatch.setattr(GenerateGate, "_own_tolerance", lambda gate, request: own[request])
    monkeypatch.setattr(GenerateGate, "_compare", compare)
    gate: Any = GenerateGate.__new__(GenerateGate)
    gate._exactly, gate.tolerance = False, 1.0
    verdicts = gate.judge_items(range(4), [(None, None)] * 4)
    assert [v.problem for v in verdicts] == ["wrong", None, None, "wrong"]
    assert [v.tolerance for v in verdicts] == [1.0, 1.0, 4.0, 1.0]


def test_near_ties_of_an_answer_count_as_those_that_rounding_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of all answers together counts them too."""

    def compare(gate: GenerateGate, expected: int, i: int, *answer: object, tolerance: float = 1.0) -> _Finding:
        return _Finding(None, 2.0, sure=1.0 if tolerance == 4.0 else 0.5)

    monkeypatch.setattr(GenerateGate, "_find", lambda gate, requests: requests)
    monkeypatch.setattr(GenerateGate, "_own_tolerance", lambda gate, request: 4.0)
    monkeypatch.setattr(GenerateGate, "_compare", compare)
    gate: Any = GenerateGate.__new__(GenerateGate)
    gate._exactly, gate.tolerance = False, 1.0
    assert [v.problem for v in gate.judge_items(range(2), [(None, None)] * 2)] == [None, None]


@pytest.mark.parametrize(
    "rounded, refused",
    [([np.nan] * 8, "by nan"), ([np.inf] * 8, "by inf"), ([50.0] * 8, "plausible for"), ([40.0] + [0.0] * 10**6, "")],
    ids=["nan", "infinite", "huge", "one huge"],
)
def test_arbitrary_items_fail_whatever_rounding_costs_their_request(
    monkeypatch: pytest.MonkeyPatch, rounded: list[float], refused: str
) -> None:
    """A measured answer may differ by what rounding costs its request: by a plausible cost, and up to a bound."""
    small = ["workload.items=500", "retrieval.k=5", "retrieval.beam_width=12"]
    spec, _ = compose_spec([*OVERRIDES, *small, "model=hstu_tiny", "task=generate", "engine.precision=bf16"])
    trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
    assert spec.retrieval is not None
    retrieval = build_retrieval(spec.retrieval, spec.workload, trace.events, spec.seed)
    gate = GenerateGate(spec, trace.catalogue, trace.requests, retrieval, "cpu", "bf16")
    monkeypatch.setattr(gate, "_rounded", lambda requests: np.array(rounded, np.float32))
    request = trace.requests[5]
    others = np.setdiff1d(np.arange(500), gate.reference.search([request]).items)[:5]
    arbitrary = [(others, np.linspace(-1.0, -2.0, 5, dtype=np.float32))]
    if refused:
        with pytest.raises(IncorrectError, match=f"rounding the fp32 reference to bf16 changes .*{refused}"):
            gate.judge_items([request], arbitrary)
        return
    [verdict] = gate.judge_items([request], arbitrary)
    assert verdict.problem and gate.tolerance < verdict.tolerance < 40
