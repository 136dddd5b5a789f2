"""Protocols and metrics of quality against scikit-learn and loops; intervals that cover; baselines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, ndcg_score, roc_auc_score

from grbench.config.compose import compose_spec
from grbench.gate import quality
from grbench.gate.rank import coarsest
from grbench.quality import metrics, rankings
from grbench.quality.command import _page
from grbench.quality.evaluate import Evaluation
from grbench.quality.exact import in_fp32, is_exact
from grbench.quality.labels import Labels, labels_of
from grbench.quality.lists import Lists
from grbench.quality.metrics import Estimate, Scored
from grbench.quality.protocol import TEST, VALIDATION, LeaveOneOut, without
from grbench.quality.rankings import Rankings
from grbench.quality.references import References
from grbench.workloads.config import RecordedConfig
from grbench.workloads.events import DataError, Events
from grbench.workloads.trace import Trace, build_trace, find_visits
from grengines.api import RankResult, Request
from grengines.numerics import IncorrectError


def events_of(*histories: list[int], items: int = 10) -> Events:
    """Events of users with these items, one a day."""
    lengths = [len(h) for h in histories]
    count = sum(lengths)
    return Events(
        users=np.repeat(np.arange(len(histories)), lengths),
        items=np.array([item for h in histories for item in h], np.int64),
        actions=np.ones(count, np.int64),
        weights=np.ones(count, np.float32),
        timestamps=np.concatenate([np.arange(n) * 86_400 for n in lengths]),
        num_users=len(histories),
        num_items=items,
        action_names=("rated",),
    )


@pytest.mark.parametrize("words, size", [([], 8192 // (150 + 32 + 32)), (["retrieval.levels=1"], 8192 // (50 + 32))])
def test_batches_of_the_model_in_fp32_are_as_large_as_fits(words: list[str], size: int) -> None:
    """An eager batch launches as many kernels whatever its size, so batches of one would take many times as long."""
    asked = ["engine=hstu", "task=generate", "scenario.max_batch=1", "workload.max_history=50", *words]
    exact = in_fp32(compose_spec(asked)[0], {"engine": "onnxruntime", "device": "cpu"})
    assert exact is not None and exact.scenario.max_batch == size


def test_the_last_item_is_predicted_and_the_one_before_it_validates() -> None:
    split = LeaveOneOut(events_of([1, 2, 3, 4], [5, 6], [7, 8, 9], [3]))
    assert split.users.tolist() == [0, 2]  # the others have too few events: all of theirs are trained on
    assert split.events.items[split.training].tolist() == [1, 2, 5, 6, 7, 3]
    assert split.targets(split.users).tolist() == [4, 9]
    assert split.targets(split.users, VALIDATION).tolist() == [3, 8]
    assert [p.tolist() for p in split.pasts(split.users)] == [[1, 2, 3], [7, 8]]
    for part, histories in ((TEST, [[2, 3], [7, 8]]), (VALIDATION, [[1, 2], [7]])):
        requests = split.requests(split.users, 2, part)
        assert [r.history_items.tolist() for r in requests] == histories
        assert [r.user_id for r in requests] == [0, 2]
        assert requests[0].timestamp == (4 - part) * 86_400
    stale = split.requests(split.users, 2, stale_events=1)
    assert [r.history_items.tolist() for r in stale] == [[1, 2], [7]]
    assert [r.timestamp for r in stale] == [r.timestamp for r in split.requests(split.users, 2)]
    assert [len(r.history_items) for r in split.requests(split.users, 2, stale_events=9)] == [1, 1]
    assert split.some_users(1, 0).tolist() in ([0], [2])
    assert split.some_users(0, 0).tolist() == split.some_users(9, 0).tolist() == [0, 2]
    with pytest.raises(DataError, match="no user has 3 events"):
        LeaveOneOut(events_of([1, 2], [3]))


def test_figures_of_lists_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    answers = [rng.permutation(30)[:12] for _ in range(40)]
    targets = rng.integers(30, size=40)
    figures = metrics.list_figures(metrics.ranks_of(answers, targets), (5, 10))
    for user, (answer, target) in enumerate(zip(answers, targets, strict=True)):
        truth, scores = np.zeros((1, 30)), np.full((1, 30), -1.0)
        truth[0, target] = 1
        scores[0, answer] = np.arange(12, 0, -1)
        rank = answer.tolist().index(target) if target in answer else None
        for k in (5, 10):
            found = rank is not None and rank < k
            assert figures[f"hr{k}"][user] == found
            expected = ndcg_score(truth, scores, k=k) if found else 0.0  # it shares the places of ties
            assert figures[f"ndcg{k}"][user] == pytest.approx(expected)
            assert figures[f"mrr{k}"][user] == pytest.approx(1 / (rank + 1) if found else 0.0)


def test_figures_of_scores_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    labels = [rng.random(12) < 0.3 for _ in range(50)]
    labels[3][:] = False  # no AUC within it
    scores = [np.round(rng.standard_normal(12) + one, 1).astype(np.float32) for one in labels]  # with ties
    users = rng.integers(20, size=50).tolist()
    found = Scored.of(scores, labels, users)
    truth, logits = np.concatenate(labels), np.concatenate(scores).astype(np.float64)
    figures = found.figures()
    assert figures["auc"] == pytest.approx(roc_auc_score(truth, logits))
    base = log_loss(truth, np.full(len(truth), truth.mean()))
    assert figures["ne"] == pytest.approx(log_loss(truth, 1 / (1 + np.exp(-logits))) / base)
    within = [roc_auc_score(t, s) for t, s in zip(labels, scores, strict=True) if 0 < t.sum() < len(t)]
    assert figures["gauc"] == pytest.approx(np.mean(within))
    assert metrics.area_under_curve(logits, truth) == pytest.approx(figures["auc"])
    assert figures["accuracy"] == pytest.approx(accuracy_score(truth, logits > 0))
    same = Scored.of(scores, [np.ones(12, np.bool_)] * 50, users).figures()
    assert same == {"auc": 0.5, "gauc": 0.5, "ne": 1.0, "accuracy": np.mean(logits > 0)}
    people, owner = np.unique(users, return_inverse=True)
    block = next(metrics.resamples(len(people), 0))
    drawn = found.resampled(0)
    for row in (0, 7):  # a resample is the data with each user as often as drawn
        times = block[row].astype(int)[owner]
        many = [i for i, n in enumerate(times) for _ in range(n)]
        again = Scored.of([scores[i] for i in many], [labels[i] for i in many], [users[i] for i in many]).figures()
        assert {name: drawn[name][row] for name in again} == pytest.approx(again)


@pytest.mark.parametrize("numbers", [1 << 20, 60])  # of a block: more rows than users, and fewer
@pytest.mark.parametrize("seed", range(4))
def test_resampled_figures_are_those_of_all_pairs_of_candidates(
    seed: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_NUMBERS", numbers)
    rng = np.random.default_rng(seed)
    users, lengths = rng.integers(12, size=30), rng.integers(1, 7, size=30)
    labels = [rng.random(n) < rng.choice([0.0, 0.3, 1.0]) for n in lengths]  # of one kind alone in many
    scores = [np.round(rng.standard_normal(n) + one).astype(np.float32) for n, one in zip(lengths, labels, strict=True)]
    drawn = Scored.of(scores, labels, users.tolist()).resampled(seed)
    owners = np.unique(users, return_inverse=True)[1]
    weights = np.concatenate([*metrics.resamples(owners.max() + 1, seed)])[:, owners]  # [R, requests]
    w, z, truth = np.repeat(weights, lengths, axis=1), np.concatenate(scores), np.concatenate(labels)
    won = (z[:, None] > z) + 0.5 * (z[:, None] == z)
    pairs = np.outer(truth, ~truth)
    inner = np.array([metrics.area_under_curve(*its) for its in zip(scores, labels, strict=True)])
    both = np.array([0 < its.sum() < len(its) for its in labels])
    share = w @ truth / w.sum(1)
    loss = np.log1p(np.exp(np.where(truth, -z, z).astype(np.float64)))
    with np.errstate(divide="ignore", invalid="ignore"):  # few users are drawn, at times with labels of one kind
        expected = {
            "auc": np.nan_to_num(((w @ (won * pairs)) * w).sum(1) / ((w @ pairs) * w).sum(1), nan=0.5),
            "gauc": np.nan_to_num(weights @ (inner * both) / (weights @ both), nan=0.0),
            "ne": np.nan_to_num(
                w @ loss / w.sum(1) / -(share * np.log(share) + (1 - share) * np.log(1 - share)), nan=1.0
            ),
            "accuracy": w @ (truth == (z > 0)) / w.sum(1),
        }
    for name, figures in expected.items():
        np.testing.assert_allclose(drawn[name], figures, rtol=1e-12)


@pytest.mark.parametrize("share", [0.07, 0.5])
def test_intervals_cover_as_often_as_they_say(share: float) -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(60):
        found = metrics.means({"x": (rng.random(400) < share).astype(np.float64)}, seed)["x"]
        covered += found.low <= share <= found.high
    assert 52 <= covered <= 60  # 57 expected


def test_a_paired_loss_has_a_narrower_interval_than_the_figures() -> None:
    rng = np.random.default_rng(3)
    reference = (rng.random(3000) < 0.2).astype(np.float64)
    worse = reference.copy()
    worse[np.flatnonzero(reference)[:6]] = 0  # 1% of the hits are lost
    losses = metrics.relative_losses({"x": worse, "same": reference}, {"x": reference, "same": reference})
    loss = losses["x"]
    assert loss.value == pytest.approx(6 / reference.sum())
    assert 0 < loss.low < loss.value < loss.high < 0.03
    figure = metrics.means({"x": reference})["x"]
    assert (figure.high - figure.low) / figure.value > 3 * (loss.high - loss.low)
    assert losses["same"].interval == [0, 0]


def test_the_resamples_of_two_records_are_those_of_pairs() -> None:
    rng = np.random.default_rng(6)
    better = (rng.random(943) < 0.3).astype(np.float64)
    worse = np.where(rng.random(943) < 0.1, 0.0, better)
    ours, theirs = (metrics.means({"hr10": its}, seed=4)["hr10"] for its in (worse, better))
    pairs = metrics.means({"lost": worse - better}, seed=4)["lost"]  # the same users, drawn together
    change = metrics.estimate_of(ours.value - theirs.value, ours.drawn - theirs.drawn)
    assert [change.value, *change.interval] == pytest.approx([pairs.value, *pairs.interval])
    figures = quality.QualityFigures.of({"hr10": ours, "hr5": theirs}, {})
    assert list(figures.resamples) == ["hr10"] and figures.resamples["hr10"] is ours.drawn


def test_the_figures_of_all_tasks_have_an_interval_too() -> None:
    rng = np.random.default_rng(7)
    scores = [rng.standard_normal(8).astype(np.float32) for _ in range(30)]
    labels = [rng.random(8) < 0.4 for _ in range(30)]
    tasks = {"a": Scored.of(scores, labels, range(30)), "b": Scored.of(scores, labels[::-1], range(30))}
    each = {f"{task}/{name}": e for task, its in tasks.items() for name, e in its.estimates().items()}
    figures = quality.QualityFigures.of(each | {"loss/a/auc": each["a/auc"]}, {"popularity": each})
    for name in ("auc", "ne"):
        assert figures.metrics[f"quality/{name}"] == pytest.approx(
            (each[f"a/{name}"].value + each[f"b/{name}"].value) / 2
        )
        low, high = figures.intervals[f"quality/{name}"]
        assert low < figures.metrics[f"quality/{name}"] < high
        assert figures.resamples[name].shape == (metrics.RESAMPLES,)


def test_the_weights_of_the_users_are_drawn_once_for_all_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, drawn = np.random.default_rng(5), []
    figures = {name: rng.random(50) for name in "abc"}
    alone = {name: metrics.means({name: its}, seed=2)[name] for name, its in figures.items()}
    draw = metrics.resamples
    monkeypatch.setattr(metrics, "resamples", lambda *of: drawn.append(of) or draw(*of))
    together = metrics.means(figures, seed=2)
    assert len(drawn) == 1 and metrics.means({}) == {}
    for name, estimate in alone.items():
        assert [together[name].value, *together[name].interval] == pytest.approx([estimate.value, *estimate.interval])


def test_lists_with_and_without_the_past() -> None:
    split = LeaveOneOut(events_of([1, 2, 3, 4], [7, 8, 9], [1, 2, 5, 6], [4, 5, 4]))
    lists = Lists(split, split.users, max_history=8, k=5, seed=0)
    answers = [
        np.array(a)
        for a in ([1, 2, 3, 0, 5, 4, 6, 7], [9, 8, 0, 1, 2, 3], [6, 0, 3, 4, 7], [4, 5, *range(4), *range(6, 10)])
    ]
    found = lists.figures(answers)
    assert found["hr5"].tolist() == [0, 1, 1, 1]
    assert found["hr5_new"].tolist() == [1, 1, 1, 0]  # the last target is an item of the past
    gone = "figures without a user's past are left out (hr10_new, ndcg10_new, mrr10_new): the 5 items of an answer"
    assert lists.notes(answers)[0].startswith(gone)
    short = [answers[0][:7], *answers[1:]]  # four are left without the past: a fifth may be the target
    assert not any(name.endswith("_new") for name in lists.figures(short)) and "hr5" in lists.figures(short)
    assert lists.notes(short)[0].startswith(
        gone.partition("(")[0] + "(hr5_new, hr10_new, ndcg5_new, ndcg10_new, mrr5_new"
    )
    assert "hr50" not in found  # an answer has five items
    single = Lists(split, split.users, max_history=8, k=1, seed=0)
    hits = single.figures([answer[:1] for answer in answers])
    assert not any(name.endswith("_new") for name in hits)
    assert (list(hits), hits["hr10"].tolist()) == (["hr5", "hr10", "ndcg5", "ndcg10", "mrr5", "mrr10"], [0, 1, 1, 1])
    assert [a.tolist() for a in without(answers, split.pasts(split.users))][:2] == [[0, 5, 4, 6, 7], [9, 0, 1, 2, 3]]
    popular = lists.baselines()["popularity"]
    # Events to train on: 1 2, 7, 1 2, 4. So the order is 1 2 4 7, then the others by their number: 0 3 5 6 8 9.
    assert popular["hr5"].value == 0.5  # 4 of the first and the last user
    # Without the past the first has 4 7 0 5 6 left, the third 4 7 0 3 6, and the last has lost its target.
    assert popular["hr5_new"].value == 0.5
    assert popular["mrr5_new"].value == pytest.approx((1 + 1 / 5) / 4)


def test_a_ranker_orders_the_most_popular_items_outside_the_past() -> None:
    split = LeaveOneOut(events_of([1, 2, 3, 4], [7, 8, 9], [1, 2, 5, 6], [4, 5, 4]))
    lists = Lists(split, split.users, max_history=8, k=3, seed=0)
    # By the events to train on the order is 1 2 4 7 0 3 5 6 8 9.
    expected = [[4, 7, 0], [1, 2, 4], [4, 7, 0], [1, 2, 7]]
    assert [its.tolist() for its in lists.candidates()] == expected

    def rank(requests: list[Request]) -> RankResult:
        """The second candidate is the best one by the first task, and the others are equal."""
        scores = [np.array([[0, 2], [1, 0], [0, 1]], np.float32) for _ in requests]
        return RankResult(scores=scores, batch_ms=0, transfer_ms=0, compute_ms=0, tokens=0, padded_tokens=0)

    answers = lists.ask_ranker(SimpleNamespace(rank=rank), 2, 3)  # type: ignore[arg-type]
    assert [its.tolist() for its in answers] == [[b, a, c] for a, b, c in expected]

    def wrong(requests: list[Request]) -> RankResult:
        result = rank(requests)
        result.scores[-1][0, 1] = np.nan
        return result

    with pytest.raises(IncorrectError, match=r"in a batch of 3: request \d+: a score is not a finite number"):
        lists.ask_ranker(SimpleNamespace(rank=wrong), 2, 3)  # type: ignore[arg-type]


def test_the_seconds_of_answers_leave_out_what_fills_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    events = events_of(*[list(range(20)) for _ in range(4)], items=20)
    workload = RecordedConfig("any", num_candidates=4)
    asked = Rankings.of(build_trace(events, find_visits(events, workload), workload, 0, 1.0), ["rated"], 8, seed=0)
    assert asked is not None and any(request.num_seen for request in asked.requests)
    filled, now = 0, 0.0
    monkeypatch.setattr(rankings, "time", SimpleNamespace(perf_counter=lambda: now))

    def rank(requests: list[Request]) -> RankResult:
        nonlocal filled, now
        is_fill = not any(request.num_seen for request in requests)
        filled, now = filled + is_fill, now + (50.0 if is_fill else 1.0)
        scores = [np.zeros((len(request.candidates), 1), np.float32) for request in requests]
        return RankResult(scores=scores, batch_ms=0, transfer_ms=0, compute_ms=0, tokens=0, padded_tokens=0)

    scores, seconds = asked.ask(SimpleNamespace(rank=rank), 8, returning=True)  # type: ignore[arg-type]
    assert len(scores) == 8 and filled == 2 and seconds == 1.0


def trace_of(users: int) -> Trace:
    """Return visits with 8 candidates, each user's 25 of 40 items in an order drawn at random."""
    rng = np.random.default_rng(4)
    events = events_of(*[rng.permutation(40)[:25].tolist() for _ in range(users)], items=40)
    workload = RecordedConfig("any", num_candidates=8)
    return build_trace(events, find_visits(events, workload), workload, 0, 1.0)


def test_scores_that_are_no_numbers_have_no_quality() -> None:
    """They would have no loss: it is compared with a limit, as figures of NaN can't be."""
    rankings = Rankings.of(trace_of(8), ["rated"], 5, seed=0)
    assert rankings is not None

    def rank(requests: list[Request]) -> Any:
        scores = [np.ones((8, 1), np.float32) for _ in requests]
        scores[-1][3] = np.nan
        return SimpleNamespace(scores=scores, cached=[])

    engine: Any = SimpleNamespace(rank=rank)
    with pytest.raises(IncorrectError, match=r"in a batch of 3: request \d+: a score is not a finite number"):
        rankings.ask(engine, 3)


def test_baselines_of_scores() -> None:
    """Items below 6 are rated by everyone who sees them, the others never; and no past repeats."""
    trace = trace_of(30)
    rankings = Rankings.of(trace, ["rated"], 100, seed=0)
    assert rankings is not None and len(rankings.requests) == 100
    assert Rankings.of(trace, ["bought"], 100, seed=0) is None
    assert "does not say which requests were held out" in rankings.notes[0]
    times = trace.requests.times
    later = Rankings.of(trace, ["rated"], 100, 0, seen_until=int(times[-60]))
    assert later is not None and 0 < len(later.requests) == int((times > times[-60]).sum()) < 60
    assert later.notes[0].startswith(f"{len(later.requests)} of the last 100 requests are ranked")
    assert Rankings.of(trace, ["rated"], 100, 0, seen_until=int(times[-1])) is None
    all_held_out = Rankings.of(trace, ["rated"], 100, 0, seen_until=0)
    assert all_held_out is not None and (len(all_held_out.requests), all_held_out.notes) == (100, [])
    found = rankings.baselines()
    assert found["not_yet"]["rated/auc"].value == pytest.approx(0.5, abs=0.02)
    assert set(found["popularity"]) == {"rated/auc", "rated/gauc"}  # counts are no probabilities
    assert found["item_mean"]["rated/ne"].value == pytest.approx(1.0, abs=0.1)
    truth = np.concatenate(rankings.labels)[:, 0]
    logits = [one.astype(np.float32) * 2 - 1 for one in rankings.labels]
    assert truth.any() and rankings.estimates(logits)["rated/auc"].interval == [1, 1]


def test_the_means_of_items_are_of_the_latest_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded data has millions of requests, of which each would be made."""
    found = Rankings.of(trace_of(8), ["rated"], 5, seed=0)
    assert found is not None and found.indices.start > 20
    looked: list[int] = []

    def look(trace: Trace, index: int, tasks: list[str]) -> Labels | None:
        looked.append(index)
        return labels_of(trace, index, tasks)

    monkeypatch.setattr(rankings, "labels_of", look)
    for most, first in ((20, found.indices.start - 20), (10**6, 0)):
        monkeypatch.setattr(rankings, "EARLIER", most)
        looked.clear()
        found.baselines()
        assert looked == list(range(first, found.indices.start))


def test_the_page_has_the_columns_of_every_configuration() -> None:
    def evaluation(note: str, *names: str) -> Evaluation:
        figures = {name: Estimate(0.5, 0.4, 0.6) for name in names}
        return Evaluation(3, 3, figures, {"popularity": figures}, {}, {}, 1.0, [note])

    page = _page([("short", evaluation("five", "hr5")), ("long", evaluation("ten", "hr5", "hr10", "mrr10"))])
    assert "short: five" in page and "long: ten" in page
    header, _, short, long, popularity = [line for line in page.splitlines() if line.startswith("|")]
    assert "hr10" in header and "mrr10" in header
    assert (short.count("0.5000"), long.count("0.5000"), popularity.count("0.5000")) == (0, 2, 2)


def test_a_ranker_that_may_know_the_last_events_has_no_quality_of_lists() -> None:
    retrieval, gate = SimpleNamespace(weights="w"), SimpleNamespace(quality_requests=4)
    spec: Any = SimpleNamespace(
        task="recommend",
        retrieval=retrieval,
        gate=gate,
        workload=None,
        ranking_model=SimpleNamespace(weights="none.st"),
    )
    trace: Any = None  # nothing is looked up in it, and no engine is asked
    measured = quality.measure_lists(spec, trace, trace, None, {}, References(Path(), None))
    assert measured is not None and measured[0] is None
    found = measured[1]
    assert not found.metrics and not found.intervals
    assert found.notes[0].startswith("no quality: model.weights=none.st: the file does not say")


def test_the_hit_rate_of_a_precision_must_be_within_the_interval_of_the_references() -> None:
    """The loss over the same users has a far narrower interval, and must not surely be one either."""
    rng = np.random.default_rng(8)

    def beside(ours: np.ndarray, theirs: np.ndarray, precision: str = "int8") -> quality.ListQuality:
        pair = [{"hr10": its.astype(np.float64)} for its in (ours, theirs)]
        found, expected = (metrics.means(its)["hr10"] for its in pair)
        lost = metrics.relative_losses(*pair)["hr10"] if theirs.any() else None
        return quality.ListQuality.of(found, expected, lost, len(ours), precision)

    hits = rng.random(943) < 0.09
    few = hits.copy()
    few[np.flatnonzero(hits)[:3]] = False
    beside(hits, hits).check([])
    beside(few, hits).check([])
    fewer = hits.copy()
    fewer[np.flatnonzero(hits)[:12]] = False  # within the interval over users
    with pytest.raises(IncorrectError, match=r"int8 loses 1\d\.\d% of fp32's HR@10 .* begins at 0\.1% .*=\[int8\]"):
        beside(fewer, hits).check(["fp8"])
    beside(fewer, hits).check(["int8"])
    moved = fewer.copy()
    moved[np.flatnonzero(~hits)[:8]] = True  # other users are found instead
    beside(moved, hits).check([])
    for wrong in (np.zeros(943), rng.random(943) < 0.04, rng.random(943) < 0.2):  # one above it is no gain either
        with pytest.raises(IncorrectError, match=r"int8 has an HR@10 of .*interval.*allow_loss=\[int8\]"):
            beside(wrong, hits).check(["fp8"])
        beside(wrong, hits).check(["int8"])
    with pytest.raises(IncorrectError, match="use other kernels or another engine"):
        beside(np.zeros(943), hits, "fp32").check([])
    one, none = np.arange(60) == 7, np.zeros(60)
    beside(one, none).check([])  # resamples of no hits are all alike
    beside(~one, 1 - none).check([])
    for ours, theirs in ((np.arange(60) < 4, none), (np.arange(60) > 3, 1 - none)):
        with pytest.raises(IncorrectError):
            beside(ours, theirs).check([])


def test_a_cell_is_judged_by_its_coarsest_precision() -> None:
    stage = {"precision": "bf16", "cache_precision": "bf16"}
    assert coarsest(stage) == "bf16"
    assert coarsest(stage | {"cache_precision": "int8"}) == "int8"
    assert coarsest(stage | {"cache_precision": "int8", "attention_precision": "fp8"}) == "fp8"
    assert coarsest({"precision": "fp32", "fallback": {"hstu": {"precision": "fp16"}}}) == "fp16"
    assert coarsest({"precision": "bf16/fp8", "retrieve": stage, "rank": {"precision": "fp8"}}) == "fp8"


def test_a_model_that_a_baseline_equals_is_named() -> None:
    def figures(**values: float) -> dict[str, Estimate]:
        return {name: Estimate(value, value - 0.1, value + 0.1) for name, value in values.items()}

    baselines = {"popularity": figures(auc=0.7, ne=0.9), "item_mean": figures(auc=0.61, ne=0.95)}
    own = figures(auc=0.61, ne=0.8, ndcg10=0.3)
    found = Evaluation(1, 1, own, baselines, {}, {}, 0.0)
    assert found.no_better(["auc", "ne", "ndcg10"]) == ["auc: no better than popularity (0.610 against 0.700)"]
    found.figures = figures(auc=0.71, ne=0.9)
    assert found.no_better(["auc", "ne"]) == ["ne: no better than popularity (0.900 against 0.900)"]


def test_an_engine_is_not_compared_with_itself() -> None:
    eager = {"engine": "hstu", "precision": "fp32", "kernels": {"layer_norm": "torch", "norm_gate": "torch"}}
    assert is_exact(eager)
    assert is_exact({"engine": "pipeline", "retrieve": eager, "rank": eager})
    for change in ({"precision": "bf16"}, {"engine": "vllm"}, {"kernels": {"layer_norm": "triton"}}, {"kernels": {}},
                   {"cache_precision": "int8"}):  # fmt: skip
        assert not is_exact(eager | change)
        assert not is_exact({"retrieve": eager, "rank": eager | change})
