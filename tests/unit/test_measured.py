"""The sample of measured answers: bounded, at random, with every class, and judged by the engine that answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.gate.form import Form
from grbench.gate.measured import EACH_CLASS, Answer, MeasuredAnswers, Verdict
from grbench.gate.rank import RankGate
from grengines.api import Cached, RankResult, Request
from grengines.numerics import IncorrectError, require_plausible


def request(number: int, events: int) -> Request:
    history = np.zeros(events, np.int64)
    weights = np.zeros(events, np.float32)
    return Request(number, number, history, history, weights, history, 0, np.arange(3), 0, 0.0, 80.0)


def result(scores: list[np.ndarray], cached: list[Cached] | None = None) -> RankResult:
    times = {"batch_ms": 0.0, "transfer_ms": 0.0, "compute_ms": 0.0}
    return RankResult(scores=scores, **times, tokens=0, padded_tokens=0, cached=cached or [])


def watched(count: int, batches: int, seed: int = 0, size: int = 10) -> MeasuredAnswers:
    """Make a sample of batches of `size`; one answer of the last batch but one comes from the host tier."""
    sample = MeasuredAnswers(Form(2), count, seed)
    for i in range(batches):
        requests = [request(i * size + place, 7 * i % 60) for place in range(size)]
        cached = [Cached(4, 4 * (i == batches - 2 and place == 5), 9) for place in range(size)]
        sample.watch(requests, result([np.full((3, 2), r.request_id, np.float32) for r in requests], cached), size)
    return sample


class Right:
    """Judge that finds these answers wrong."""

    def __init__(self, *wrong: int) -> None:
        self.wrong = wrong

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        return [Verdict(3.0, 1.0, "odd") if a.number in self.wrong else Verdict(0.5, 1.0) for a in answers]


def test_the_sample_is_bounded_and_has_every_class() -> None:
    found = watched(64, 500).compare(Right())
    assert found.passed and found.answers == 5000 and found.at_random == 64
    assert found.checked <= 64 + EACH_CLASS * (len(found.classes) + 4)  # and the first, last, shortest and longest
    assert found.classes["cache host hit, new events"] == [1, 1]
    assert found.classes["place last"] == [500, EACH_CLASS]
    assert found.classes["batch size 8-15"] == [5000, EACH_CLASS]
    assert all(checked == min(there, EACH_CLASS) for there, checked in found.classes.values())


def test_the_first_and_the_last_answers_and_the_extreme_lengths_are_in_it() -> None:
    sample = watched(1, 500).kept()
    numbers = [a.number for a in sample]
    assert numbers == sorted(numbers) and {0, 1, 2, 4997, 4998, 4999} <= set(numbers)
    lengths = [len(a.request.history_items) for a in sample]
    assert (min(lengths), max(lengths)) == (0, 59)


def test_every_answer_is_equally_likely_to_be_drawn() -> None:
    drawn: Counter[int] = Counter()
    for seed in range(400):
        drawn.update(a.number for a in watched(10, 10, seed)._from_all)
    assert sum(drawn.values()) == 4000
    assert len(drawn) == 100 and min(drawn.values()) > 15 and max(drawn.values()) < 70  # 40 expected, 6 its deviation


def test_an_answer_is_kept_as_it_came() -> None:
    sample, scores = MeasuredAnswers(Form(2), 4, 0), np.ones((3, 2), np.float32)
    sample.watch([request(0, 5)], result([scores]), 1)
    scores[:] = 7  # the engine uses its buffer again
    assert all((a.scores == 1).all() for a in sample._from_all)


def test_the_words_say_what_is_excluded() -> None:
    found = watched(128, 500).compare(Right())
    assert found.most_wrong_share == pytest.approx(1 - 0.05 ** (1 / 128))
    assert "of 5000 measured answers" in found.words and "fewer than 2.31% of all answers are wrong" in found.words
    assert found.words.startswith(f"{found.checked} of 5000")
    whole = watched(128, 10).compare(Right())
    assert whole.most_wrong_share == 0.0 and whole.words.startswith("all 100 measured answers")


def test_a_wrong_answer_is_described() -> None:
    found = watched(64, 500).compare(Right(4985))
    assert not found.passed and found.wrong == 1 and found.error == 3.0
    expected = "the worst is answer 4985 (request 4985 of user 4985, 6 events, place 6 in a batch of 10, "
    assert expected + "4 of 9 tokens cached, 4 of them from the host tier): odd" in found.words


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([np.ones((3, 2), np.float32)], "1 answers to 2 requests"),
        ([np.ones((3, 2), np.float32), np.ones((2, 2), np.float32)], "request 1: scores are [2, 2] float32"),
        ([np.ones((3, 2), np.float32), np.ones((3, 2))], "request 1: scores are [3, 2] float64"),
        ([np.full((3, 2), np.inf, np.float32), np.ones((3, 2), np.float32)], "request 0: a score is not a finite"),
    ],
)
def test_the_form_of_every_answer_is_checked_as_it_comes(scores: list[np.ndarray], words: str) -> None:
    sample = MeasuredAnswers(Form(2), 4, 0)
    with pytest.raises(IncorrectError) as caught:
        sample.watch([request(0, 5), request(1, 5)], result(scores), 2)
    assert str(caught.value).startswith("while measuring, in a batch of 2: ") and words in str(caught.value)


def test_an_answer_is_judged_by_the_precision_of_the_engine_that_gave_it() -> None:
    overrides = ["workload=synthetic", "workload.max_requests=20", "workload.max_history=24", "engine=hstu"]
    spec = compose_spec(overrides)[0]
    trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
    gate = RankGate(spec, trace.catalogue, trace.requests, "cpu", "fp32", {"hstu": "bf16"})
    rounded = gate._model.scores(trace.requests[:6], "bf16")
    answers = [
        Answer(r, None, scores, i, 1, 0, Cached(), "hstu")
        for i, (r, scores) in enumerate(zip(trace.requests, rounded, strict=False))
    ]
    assert all(v.problem is None for v in gate.judge(answers))
    wrong = gate.judge([replace(answer, fallback="") for answer in answers])
    assert all("scores differ from the reference" in (v.problem or "") for v in wrong)
    # The same requests with other candidates, as a pipeline may retrieve in a later cell of the same engine.
    others = [replace(a, request=replace(a.request, candidates=a.request.candidates[::-1])) for a in answers]
    assert all(v.problem for v in gate.judge(others))
    assert all(v.problem is None for v in gate.judge([replace(a, scores=a.scores[::-1]) for a in others]))


def test_a_rounding_error_that_rounding_cannot_explain_is_refused() -> None:
    require_plausible(0.012, "bf16", 2)  # measured with model=hstu_tiny
    for error in (0.26, float("nan")):
        with pytest.raises(IncorrectError, match="plausible for 2 layers"):
            require_plausible(error, "bf16", 2)


@pytest.mark.parametrize("shape", [(), (2,), (1, 1)])
def test_the_form_of_a_single_answer_is_checked(shape: tuple[int, ...]) -> None:
    problem = Form(None).problem([request(0, 5)], result([np.ones(shape, np.float32)]))
    assert problem == f"request 0: scores are {list(shape)} float32, expected [3] float32"
