"""Training: its forward against the models', its loss against loops, resuming, and weights that engines load."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.walks import ring

from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError, RetrievalConfig
from grbench.quality.held_out import HeldOut, doubt_of_lists
from grbench.quality.protocol import LeaveOneOut
from grbench.training import loop
from grbench.training.config import TrainConfig, TrainingConfig
from grbench.training.generate import GenerateTask, semantic_ids
from grbench.training.rank import RankTask
from grbench.training.session import doubt_of, epoch_line
from grbench.training.teacher import Teacher
from grbench.workloads.config import RecordedConfig
from grbench.workloads.events import Events
from grbench.workloads.trace import build_trace, find_visits
from grengines.api import Catalogue
from grengines.models.decoder.config import DecoderConfig
from grengines.models.decoder.model import Decoder
from grengines.models.hstu import autograd, beam
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator, pack_prompts
from grengines.models.hstu.model import HSTURanker, build_model
from grengines.models.hstu.weights import check_ids
from grengines.runtime.batch import pack
from grengines.semantic.ids import SemanticIds, one_level
from grkernels.operators import Operators

CPU = torch.device("cpu")
TINY = HSTUConfig(
    embedding_dim=16, heads=2, qk_dim=8, v_dim=8, head_dim=8, max_positions=64, scaling_seqlen=32, tasks=["rated"]
)


def config(**changes: Any) -> TrainConfig:
    training = {"epochs": 3, "batch": 16, "dropout": 0.0, "rate": 0.02, **changes.pop("training", {})}
    retrieval = RetrievalConfig(**{"levels": 1, "beam_width": 16, **changes.pop("retrieval", {})})
    return TrainConfig(
        **{
            "model": TINY,
            "workload": RecordedConfig("ring", num_candidates=6, max_history=8),
            "task": "generate",
            "training": TrainingConfig(**training),
            "retrieval": retrieval,
            **changes,
        }
    )


def task_of(of: TrainConfig, events: Events | None = None) -> GenerateTask:
    split = LeaveOneOut(events or ring())
    return GenerateTask(of, split, semantic_ids(of, split), CPU)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_forward_of_a_generator_is_that_of_the_model(layers: int) -> None:
    model = HSTUGenerator.build(
        dataclasses.replace(TINY, layers=layers), (4, 4), Operators.reference(), seed=0, device=CPU, dtype=torch.float32
    )
    prompts = [np.array([0, 5, 2, 6]), np.array([1, 4]), np.array([3, 7, 0, 4, 2, 5])]
    padded = torch.zeros(3, 6, dtype=torch.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = torch.from_numpy(prompt)
    found = autograd.generator_hidden(model, padded)
    expected = model.full(pack_prompts(prompts).to(CPU))
    real = torch.arange(6) < torch.tensor([[4], [2], [6]])
    assert torch.allclose(found[real], expected, atol=1e-5)
    logits = autograd.generator_features(model, found[0]) @ model.token_table[4:8].T
    assert torch.allclose(logits, model.logits(found[0], 1), atol=1e-5)


@pytest.mark.parametrize(
    "choices",
    [
        {"variant": "research", "time_bias": 20},
        {"variant": "nvidia"},
        {"position_bias": True, "group_norm": True, "item_norm": True, "final_norm": "l2"},
        {"time_bias": 8, "silu": "uvqk"},
    ],
)
def test_the_forward_of_a_variant_is_that_of_the_model(choices: dict[str, Any]) -> None:
    model = HSTUGenerator.build(
        dataclasses.replace(TINY, **choices), (9,), Operators.reference(), seed=0, device=CPU, dtype=torch.float32
    )
    lengths, rng = [4, 2, 6], np.random.default_rng(0)
    times = [np.cumsum(rng.integers(1, 200, n + 1)) for n in lengths]
    prompts = [np.stack([rng.integers(0, 9, n), t[:-1], t[1:]], axis=1) for n, t in zip(lengths, times, strict=True)]
    tokens, padded = torch.zeros(3, 6, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for i, n in enumerate(lengths):
        tokens[i, :n], padded[i, : n + 1] = torch.from_numpy(prompts[i][:, 0]), torch.from_numpy(times[i])
    found = autograd.generator_hidden(model, tokens, times=padded)
    expected = model.full(pack_prompts(prompts, timed=True).to(CPU))
    real = torch.arange(6) < torch.tensor(lengths)[:, None]
    assert found[real].std() > 1e-3
    assert torch.allclose(found[real], expected, atol=1e-5)
    logits = autograd.generator_features(model, found[0]) @ autograd.generator_table(model, 0).T
    assert torch.allclose(logits, model.logits(found[0], 0), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("levels", [2, 3])
def test_training_scores_codes_as_a_search_does(levels: int) -> None:
    """Each code after its prompt, with a bias of fewer distances than the longest sequence has."""
    sizes, lengths = (4, 5, 6)[:levels], [2, 1, 5]
    options = dataclasses.replace(TINY, position_bias=True, max_positions=5 * levels)
    model = HSTUGenerator.build(options, sizes, Operators.reference(), seed=0, device=CPU, dtype=torch.float32)
    rng = np.random.default_rng(0)
    items = [np.stack([rng.integers(0, size, n + 1) for size in sizes], axis=1) for n in lengths]
    tokens = torch.zeros(3, 6 * levels, dtype=torch.int64)
    for row, codes in zip(tokens, items, strict=True):
        row[: codes.size] = torch.from_numpy((codes + model.offsets[:-1]).reshape(-1))
    hidden = autograd.generator_hidden(model, tokens)
    pool = beam.pool_for(model, 5 * levels, 1)
    for i, (codes, n) in enumerate(zip(items, lengths, strict=True)):
        rows = autograd.generator_features(model, hidden[i, n * levels - 1 : (n + 1) * levels - 1])
        logits = [row @ autograd.generator_table(model, level).T for level, row in enumerate(rows)]
        logs = torch.stack([x.log_softmax(0)[code] for x, code in zip(logits, codes[-1], strict=True)])
        found = beam.prefix_scores(model, tokens[i, : n * levels].numpy(), codes[-1:], pool)
        assert np.allclose(found[0], logs.cumsum(0), atol=1e-5)


@pytest.mark.parametrize("contextual, window, interaction", [(0, 0, False), (2, 0, True), (0, 3, False), (1, 4, True)])
def test_the_forward_of_a_ranker_is_that_of_the_model(contextual: int, window: int, interaction: bool) -> None:
    events, workload = ring(), RecordedConfig("ring", num_candidates=6, max_history=8)
    trace = build_trace(events, find_visits(events, workload), workload, 0, 1.0)
    options = dataclasses.replace(
        TINY, contextual_seq_len=contextual, max_attn_len=window, interaction=interaction, tasks=["a", "b"]
    )
    model = HSTURanker.build(options, trace.catalogue, Operators.reference(), seed=0, device=CPU, dtype=torch.float32)
    batch = pack(trace.requests[:40:5], model.encoding).to(CPU)
    found = autograd.ranker_logits(model, batch)
    assert found.std() > 1e-3
    assert torch.allclose(found, model(batch), atol=1e-5)


@pytest.mark.parametrize(("levels", "biased"), [(1, False), (2, False), (3, False), (3, True)])
def test_the_loss_is_that_of_a_loop_over_codes(levels: int, biased: bool) -> None:
    model = dataclasses.replace(TINY, position_bias=biased)
    task = task_of(config(model=model, retrieval={"levels": levels, "codes": 0}))
    batch = next(task.batches(1))
    model, ids = task.model, task.ids
    assert ids.levels == levels
    expected = []
    logs: list[list[torch.Tensor]] = [[] for _ in range(levels)]
    for row in batch.every.div(batch.items.shape[1], rounding_mode="floor").unique().tolist():
        length = int((batch.every.div(batch.items.shape[1], rounding_mode="floor") == row).sum())
        tokens = ids.tokens(batch.items[row, :length].numpy()).reshape(-1)
        for t in range(1, len(tokens)):  # predict token t from those before it
            hidden = model.full(pack_prompts([tokens[:t]]).to(CPU))[-1:]
            level = t % levels
            logs[level].append(-torch.log_softmax(model.logits(hidden, level), 1)[0, tokens[t] - model.offsets[level]])
    expected = sum(torch.stack(its).mean() for its in logs) / levels
    assert torch.allclose(task.loss(batch), expected, atol=1e-4)


def test_every_item_but_the_first_is_predicted_once() -> None:
    """Long histories are cut into windows. The last two events of each user are in none."""
    events = ring(users=3, items=40, length=31)
    task = task_of(config(), events)
    found = [
        pair for row, length in zip(task.items.tolist(), task.lengths, strict=True) for pair in pairwise(row[:length])
    ]
    own = events.items.reshape(3, 31)[:, :-2]
    assert sorted(found) == sorted(pair for row in own.tolist() for pair in pairwise(row))


def test_an_epoch_has_every_window_once_in_batches_of_like_lengths() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(4, 40, size=300)
    full = ring(users=300, items=20, length=40)
    kept = (np.arange(40) < lengths[:, None]).reshape(-1)
    columns = {name: getattr(full, name)[kept] for name in ("users", "items", "actions", "weights", "timestamps")}
    task = task_of(config(workload=RecordedConfig("ring", max_history=60)), dataclasses.replace(full, **columns))
    first, second = ([batch.items for batch in task.batches(epoch)] for epoch in (1, 2))
    assert sum(map(len, first)) == sum(map(len, second)) == task.examples == 300
    assert [b.shape for b in first] != [b.shape for b in second]
    assert sum(b.numel() for b in first) < 1.4 * sum(task.lengths)  # little padding
    rows = sorted(tuple(row.tolist()) + (0,) * (40 - b.shape[1]) for b in first for row in b)
    assert rows == sorted((*row.tolist(), *[0] * (40 - task.items.shape[1])) for row in task.items)


def test_a_generator_learns_what_can_be_learned_and_nothing_of_the_test(tmp_path: Path) -> None:
    of = config(training={"epochs": 12})
    task = task_of(of)
    assert task.test()["hr5"] < 0.6
    state = loop.train(task, of.training, CPU, 0, tmp_path, "x", report=lambda epoch: None)
    with torch.no_grad():
        figures = task.test()
    assert figures["hr5"] > 0.95
    assert state.best_epoch >= 1
    changed = ring()
    ends = np.flatnonzero(np.r_[np.diff(changed.users) != 0, True])
    changed.items[ends] = changed.items[ends - 1] = 0
    other = task_of(of, changed)
    assert np.array_equal(other.items, task.items)  # what is predicted is not trained on
    for levels in (2, 3):
        made = [semantic_ids(config(retrieval={"levels": levels}), LeaveOneOut(e)) for e in (ring(), changed)]
        assert np.array_equal(made[0].codes, made[1].codes)  # nor do the IDs know it


@pytest.mark.parametrize(
    "model",
    [
        dataclasses.replace(TINY, position_bias=True, time_bias=16),
        dataclasses.replace(TINY, variant="research"),
        DecoderConfig(embedding_dim=16, heads=2, kv_heads=2, head_dim=8, mlp_dim=32, max_positions=64),
    ],
    ids=["timed", "research", "decoder"],
)
def test_the_rows_that_predict_read_nothing_later(model: Any) -> None:
    """HSTU alone reads the time of the item that a row predicts. Events of equal times keep their order."""
    events = ring(users=8, items=20, length=9)
    events.timestamps[:] //= 3 * int(np.diff(events.timestamps).max())  # some are equal
    task = task_of(config(model=model), events)
    assert np.array_equal(task.items[:, :7], events.items.reshape(8, 9)[:, :7])  # the same for each model
    tokens = torch.from_numpy(task.items[:, :7])
    times = torch.from_numpy(events.timestamps.reshape(8, 9)[:, :8])
    with torch.no_grad():
        expected = task.network.hidden(tokens, times=times)
        changed, later = tokens.clone(), times.clone()
        changed[:, 4:] = (changed[:, 4:] + 7) % 20
        later[:, 5:] += 100_000
        found = task.network.hidden(changed, times=later)
    torch.testing.assert_close(found[:, :4], expected[:, :4])
    assert not torch.allclose(found[:, 4:], expected[:, 4:])


def test_a_transformer_by_item_vectors_learns_too_and_engines_load_it(tmp_path: Path) -> None:
    decoder = DecoderConfig(embedding_dim=16, heads=2, kv_heads=2, head_dim=8, mlp_dim=32, max_positions=8)
    of = config(model=decoder, training={"epochs": 12, "dropout": 0.1})
    task = task_of(of)
    loop.train(task, of.training, CPU, 0, tmp_path, "x", report=lambda epoch: None)
    with torch.no_grad():
        assert task.test()["hr5"] > 0.9
    task.save(tmp_path / "weights.safetensors")
    again = Decoder.build(
        decoder, (20,), seed=1, device=CPU, dtype=torch.float32, weights=str(tmp_path / "weights.safetensors")
    )
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected = again.layers(input_ids=tokens).last_hidden_state
        assert torch.allclose(task.network.hidden(tokens), expected, atol=1e-5)
    check_ids(tmp_path / "weights.safetensors", one_level(20))
    with pytest.raises(ValueError, match=r"trained with other semantic IDs; set retrieval\.semantic_ids"):
        check_ids(tmp_path / "weights.safetensors", one_level(21))


def test_negatives_are_a_part_of_the_catalogue(tmp_path: Path) -> None:
    of = config(training={"epochs": 12, "negatives": 8})
    task = task_of(of)
    loop.train(task, of.training, CPU, 0, tmp_path, "x", report=lambda epoch: None)
    with torch.no_grad():
        assert task.test()["hr5"] > 0.9
    rows, truth = torch.randn(7, TINY.embedding_dim), torch.arange(7)
    torch.manual_seed(0)
    sampled = task.cross_entropy(rows, truth)
    torch.manual_seed(0)
    drawn = torch.randint(20, (8,))
    logits = task.logits(rows, 0)
    each = [torch.cat([logits[i, i : i + 1], logits[i, drawn[drawn != i]]]) for i in range(7)]
    expected = torch.stack([F.cross_entropy(one[None], torch.zeros(1, dtype=torch.int64)) for one in each]).mean()
    assert torch.allclose(sampled, expected, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_teacher_has_the_chances_of_codes(temperature: float, tmp_path: Path) -> None:
    of = config(training={"epochs": 2}, model=dataclasses.replace(TINY, position_bias=True, time_bias=8))
    items = task_of(of)
    loop.train(items, of.training, CPU, 0, tmp_path, "x", report=lambda epoch: None)
    items.save(tmp_path / "weights.safetensors")
    apart = {"temperature": temperature}
    teaching = {"teacher": str(tmp_path / "weights.safetensors"), "teacher_share": 0.25, **apart}
    task = task_of(config(training=teaching, retrieval={"levels": 2, "codes": 5}))
    batch = next(task.batches(1))
    assert batch.times is not None
    with torch.no_grad():
        found = Teacher(tmp_path / "weights.safetensors", task.ids, CPU).targets(batch.items, batch.later, batch.times)
        hidden = items.network.hidden(batch.items[:, :-1], times=batch.times)
        codes, n = task.ids.codes, batch.items.shape[1]
        for row, place in enumerate(batch.later.tolist()):
            chances = items.logits(hidden[place // n, place % n - 1][None], 0).softmax(1)[0].numpy()
            own = codes[batch.items.view(-1)[place]]
            first = [chances[codes[:, 0] == code].sum() for code in range(5)]
            below = np.where(codes[:, 0] == own[0], chances, 0)
            second = np.array([below[codes[:, 1] == code].sum() for code in range(5)]) / below.sum()
            assert np.allclose(found[0][row], first, atol=1e-5)
            assert np.allclose(found[1][row], second, atol=1e-5)
        alone = task_of(config(training=apart, retrieval={"levels": 2, "codes": 5}))
        alone.model.load_state_dict(task.model.state_dict())
        taught = 4 * (task.loss(batch) - 0.75 * alone.loss(batch))
        codes_hidden = task.network.hidden(torch.from_numpy(task.ids.tokens(batch.items)).view(len(batch.items), -1))
        expected = torch.zeros(())
        for level in range(2):
            rows = [codes_hidden[place // n, 2 * (place % n) + level - 1] for place in batch.later.tolist()]
            logs = (task.logits(torch.stack(rows), level) / temperature).log_softmax(1)
            expected = expected - (found[level] * logs).sum(1).mean()
        assert torch.allclose(taught, expected / 2, atol=1e-4)
    with pytest.raises(ConfigError, match=r"training\.teacher: .*expected \[25, 16\]"):
        task_of(config(training=teaching, retrieval={"levels": 2, "codes": 5}), ring(items=24))


def test_histories_begin_anywhere_and_items_are_left_out() -> None:
    whole, cut = task_of(config()), task_of(config(training={"crop": 1.0}))
    ends = {tuple(row[:length].tolist()) for row, length in zip(whole.items, whole.lengths, strict=True)}
    batches = list(cut.batches(1))
    shorter = 0
    for batch in batches:
        n = batch.items.shape[1]
        for row in range(len(batch.items)):
            kept = batch.items[row, : int((batch.every // n == row).sum())].tolist()
            assert len(kept) >= 2
            full = next(end for end in ends if list(end[-len(kept) :]) == kept)
            shorter += len(kept) < len(full)
    assert shorter > cut.examples / 2
    task = task_of(config(training={"blanks": 0.9}))
    batch = next(task.batches(1))
    torch.manual_seed(0)
    some = task.loss(batch)
    torch.manual_seed(0)
    assert torch.equal(task.loss(batch), some) and not torch.allclose(task.loss(batch), some)
    items, unread = batch.items[:, :-1], torch.zeros_like(batch.items[:, :-1], dtype=torch.bool)
    assert torch.equal(task.network.hidden(items, kept=unread), task.network.hidden(items.flip(1), kept=unread))


def test_the_loss_is_smooth_and_has_a_temperature() -> None:
    task = task_of(config(training={"smoothing": 0.2, "temperature": 0.5}))
    rows, truth = torch.randn(5, TINY.embedding_dim), torch.arange(5)
    logs = (task.logits(rows, 0) / 0.5).log_softmax(1)
    expected = -(0.8 * logs[torch.arange(5), truth] + 0.2 * logs.mean(1)).mean()
    assert torch.allclose(task.cross_entropy(rows, truth), expected, atol=1e-5)


def test_averaged_weights_are_validated_and_kept() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    mean = float(model.weight.detach())
    average = loop.Average(model, 0.5)
    with torch.no_grad():
        for step in range(1, 30):
            model.weight.fill_(step)
            average.step()
            kept = min(0.5, step / (step + 9))
            mean = kept * mean + (1 - kept) * step
        with average.in_place():
            assert float(model.weight) == pytest.approx(mean, rel=1e-5)
        assert float(model.weight) == 29
        again = loop.Average(model, 0.5)
        again.load_state_dict(average.state_dict())
        with again.in_place():
            assert float(model.weight) == pytest.approx(mean, rel=1e-5)
    off = loop.Average(model, 0.0)
    off.step()
    with off.in_place():
        assert float(model.weight.detach()) == 29


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = config(training={"epochs": 4, "dropout": 0.2, "average": 0.9, "crop": 0.5, "blanks": 0.1})
    whole = task_of(of)
    loop.train(whole, of.training, CPU, 0, tmp_path, "x", report=lambda epoch: None)
    monkeypatch.setattr(loop, "SAVE_S", 0.0)

    def stop(epoch: loop.Epoch) -> None:
        if epoch.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(task_of(of), of.training, CPU, 0, tmp_path, "x", report=stop)
    seen: list[int] = []
    again = task_of(of)
    loop.train(again, of.training, CPU, 0, tmp_path, "x", report=lambda epoch: seen.append(epoch.number))
    assert seen == [3, 4]
    for (name, p), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, other), name
    with pytest.raises(ConfigError, match="other options or data; remove it"):
        loop.train(task_of(of), of.training, CPU, 0, tmp_path, "y", report=lambda epoch: None)
    (tmp_path / loop.CHECKPOINT).write_bytes(b"none")
    with pytest.raises(ConfigError, match="not a checkpoint"):
        loop.train(task_of(of), of.training, CPU, 0, tmp_path, "x", report=lambda epoch: None)


def test_the_time_ends_a_training_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = config(training={"epochs": 50, "minutes": 0.02, "batch": 4, "validate_every": 10})
    steps, now = list[int](), [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(done: int, total: int, after_s: float) -> None:
        steps.append(total)
        now[0] += 1.3

    state = loop.train(task_of(of), of.training, CPU, 0, tmp_path, "x", report=lambda epoch: None, progress=slow)
    assert state.epochs == state.best_epoch == 1  # it was validated
    assert len(steps) == 1 < steps[0] and state.history[0]["steps"] == 1


def test_weights_that_are_not_useful_are_said_to_be(tmp_path: Path) -> None:
    of = config(training={"epochs": 12})
    task, epochs = task_of(of), list[loop.Epoch]()
    name, figure = task.baseline()
    state = loop.train(task, of.training, CPU, 0, tmp_path, "x", report=epochs.append)
    assert name == "popularity" and 0 < figure < 1 and doubt_of(state, epochs, (name, figure), of.training) == ""
    poor = doubt_of(state, epochs, (name, 1.0), of.training)
    assert poor.endswith(", is no better than popularity, 1.0000; set another training.rate or more epochs")
    of.training.minutes = 0.5
    cut = dataclasses.replace(epochs[0], steps=1, steps_s=9.0, whole=82, check_s=5.0)
    one = dataclasses.replace(state, history=[cut.to_dict()])
    needed = "only 1 of the 82 steps of an epoch were trained; set training.minutes=12.6 or more"
    assert doubt_of(one, [cut], (name, figure), of.training) == needed  # 82 steps of 9 s and 3 checks of 5 s
    cut.whole = 1
    assert doubt_of(one, [cut], (name, figure), of.training) == ""
    assert doubt_of(one, [cut], (name, 1.0), of.training).endswith("1.0000; set training.minutes=1 or more")


def test_the_baseline_is_that_of_the_most_popular_items() -> None:
    events = ring(items=40)
    counts = np.bincount(events.items[LeaveOneOut(events).training], minlength=40)
    first = sorted(range(40), key=lambda item: -counts[item])[:10]
    targets = LeaveOneOut(events).targets(LeaveOneOut(events).users, 2)
    gains = [1 / np.log2(2 + first.index(item)) if item in first else 0 for item in targets]
    task = task_of(config(training={"validation_users": 0}), events)
    assert task.baseline()[1] == pytest.approx(np.mean(gains))


def test_the_line_of_an_epoch_says_no_more_time_than_is_left() -> None:
    options = TrainingConfig(epochs=10)
    epoch = loop.Epoch(
        number=2, loss=0.5, figures={}, seconds=30.0, trained=2, steps=7, whole=7, steps_s=26.0, check_s=4.0
    )
    assert epoch_line(epoch, options) == "epoch 2: loss 0.5000; 30 s so far, about 2 min left at most"
    options.minutes = 1.0
    assert epoch_line(epoch, options).endswith("; 30 s so far, about 30 s left at most")
    cut = dataclasses.replace(epoch, steps=3)
    assert epoch_line(cut, options).endswith(
        " (3 of 7 steps: training.minutes ended it): loss 0.5000; 30 s so far, about 4 s left for the test"
    )
    late = dataclasses.replace(cut, seconds=90.0)
    assert epoch_line(late, options).endswith("; 90 s so far, about 4 s left for the test")
    brief = dataclasses.replace(cut, check_s=0.2)
    assert epoch_line(brief, options).endswith(", about 1 s left for the test")
    test = "; 30 s so far, about 4 s left for the test"
    assert epoch_line(dataclasses.replace(epoch, number=10), options).endswith(test)


def test_the_time_has_room_for_the_validations_and_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that other processes on the machine don't disturb: each look at it takes a millisecond."""
    now = 0.0

    def clock(passed: float = 0.001) -> float:
        nonlocal now
        now += passed
        return now

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=clock))
    of = config(training={"epochs": 100_000, "patience": 100_000, "minutes": 2 / 60, "batch": 4, "validate_every": 7})
    task = task_of(of)
    validate, test = task.validate, task.test

    def slow(check: Callable[[], dict[str, float]]) -> dict[str, float]:
        clock(0.4)
        return check()

    task.validate = lambda: slow(validate)  # type: ignore[method-assign]
    after: list[float] = []
    state = loop.train(
        task, of.training, CPU, 0, tmp_path, "x", report=lambda epoch: None, progress=lambda *at: after.append(at[2])
    )
    slow(test)
    assert min(after) > 0.8  # a validation and the test, from the first step on
    assert 1.5 < now < 2.3 and state.best_epoch
    of.training.minutes = 1 / 60
    with pytest.raises(
        ConfigError, match=r"training\.minutes=0\.0166667: a validation takes 0\.4\d* s here, and three"
    ):
        loop.train(task, of.training, CPU, 0, tmp_path, "x", report=lambda epoch: None)


def test_the_best_epoch_is_kept_and_patience_ends_it(tmp_path: Path) -> None:
    of = config(training={"epochs": 50, "patience": 2})
    task = task_of(of)
    figures = iter([0.1, 0.5, 0.3, 0.2])
    weights: list[torch.Tensor] = []

    def validate() -> dict[str, float]:
        weights.append(task.model.token_table.detach().clone())
        return {"made up": next(figures)}

    task.validate = validate  # type: ignore[method-assign]
    state = loop.train(task, of.training, CPU, 0, tmp_path, "x", report=lambda epoch: None)
    assert (state.epochs, state.best_epoch) == (4, 2)
    assert torch.equal(task.model.token_table, weights[1])
    assert not torch.equal(task.model.token_table, weights[3])


def test_a_ranker_learns_which_items_are_liked(tmp_path: Path) -> None:
    """Users like the even items that they rate, so an odd candidate is never liked."""
    events, workload = ring(users=80, length=12), RecordedConfig("ring", num_candidates=6, max_history=8)
    liked = dataclasses.replace(events, actions=1 | (events.items % 2 == 0) << 1, action_names=("rated", "liked"))
    trace = build_trace(liked, find_visits(liked, workload), workload, 0, 1.0)
    of = config(
        workload=workload, task="rank", held_out=100, model=dataclasses.replace(TINY, tasks=["liked"]),
        training={"epochs": 8},
    )  # fmt: skip
    task = RankTask(of, trace, CPU)
    with torch.no_grad():
        before = task.test()["auc/liked"]
    loop.train(task, of.training, CPU, 0, tmp_path, "x", report=lambda epoch: None)
    with torch.no_grad():
        assert task.test()["auc/liked"] > max(before, 0.68)
    learned = {e for batch in task.batches(1) for i in batch for e in range(*trace.own[i])}
    chose = {e for i in task.validation for e in range(*trace.own[i])}
    ends = np.flatnonzero(np.diff([*liked.users, -1]))
    assert learned and not learned & {*ends, *(ends - 1)} and chose and not chose & {*ends}
    task.save(tmp_path / "w.safetensors")
    times = [r.timestamp for r in trace.requests]
    assert HeldOut.of(tmp_path / "w.safetensors") == HeldOut(last_events=True, seen_until=times[-101])
    assert "does not say that each user's last events" in doubt_of_lists(str(tmp_path / "none.safetensors"))
    assert doubt_of_lists(str(tmp_path / "w.safetensors")) == ""
    with pytest.raises(ConfigError, match=r"does not label them; set 'model\.tasks=\[rated,liked\]'"):
        RankTask(config(workload=workload, task="rank", model=dataclasses.replace(TINY, tasks=["bought"])), trace, CPU)
    with pytest.raises(ConfigError, match="held_out=600: the trace has"):
        RankTask(dataclasses.replace(of, held_out=600), trace, CPU)


def test_one_level_is_the_item_itself() -> None:
    ids = one_level(5)
    assert ids.tokens([3, 1]).tolist() == [[3], [1]]
    assert ids.items([[3], [5]]).tolist() == [3, -1]


@pytest.mark.parametrize("study", ["first_run", "first_run_gpu"])
def test_the_weights_of_the_first_run_are_of_its_models(study: str) -> None:
    """The study composes, and both models load: tensors, options and semantic IDs are those of MovieLens-100K."""
    [run, _] = compose_spec([f"study={study}"])
    ids = SemanticIds.load(run.retrieval.semantic_ids, items=1682)
    check_ids(run.retrieval.weights, ids)
    built = {"seed": 0, "device": "cpu", "dtype": torch.float32}
    random = HSTUGenerator.build(run.model, ids.sizes, Operators.eager(), **built)
    trained = HSTUGenerator.build(run.model, ids.sizes, Operators.eager(), **built, weights=run.retrieval.weights)
    assert not torch.equal(random.token_table, trained.token_table)
    catalogue = Catalogue(num_users=943, num_items=1682, num_actions=2)
    ranker = build_model(run.ranking_model, catalogue, 0, "cpu", torch.float32)
    assert ranker.token_table.isfinite().all()
