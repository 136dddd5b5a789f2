"""Training of a generator: the next item's codes after each item of a history. One level of codes: item vectors.

The softmax of a level runs over all its codes. With one level these are the items of the catalogue, or the target and
`training.negatives` others that are drawn uniformly for each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grbench.config.schema import ConfigError, RetrievalConfig
from grbench.quality import metrics
from grbench.quality.lists import NEW, shortest
from grbench.quality.protocol import VALIDATION, LeaveOneOut, without
from grbench.training.config import TrainConfig
from grbench.training.networks import network, product
from grbench.training.teacher import Teacher
from grengines.api import Request
from grengines.models.header import unreadable
from grengines.models.hstu import beam
from grengines.models.hstu.generator import HSTUGenerator
from grengines.semantic.ids import SemanticIds
from grengines.semantic.search import explore
from grengines.semantic.trie import Trie

BATCH = 256  # users of a search in the validation
POOL = 16  # batches in which those of like lengths are put together
K = 10  # items of an answer there


@dataclass
class Batch:
    """Items of some users' histories, and the places of those that are predicted."""

    items: Tensor  # int64 [B, n], 0 past each end
    later: Tensor  # int64 [M]: flat places of the items after each user's first
    every: Tensor  # int64 [N]: flat places of all items
    times: Tensor | None  # int64 [B, n], seconds, of the items; None for a network that reads none


class GenerateTask:
    """Training of a generator on the histories of the training split."""

    def __init__(self, config: TrainConfig, split: LeaveOneOut, ids: SemanticIds, device: torch.device) -> None:
        self._config, self._split, self.ids, self._device = config, split, ids, device
        if config.model.max_positions < ids.levels:
            raise ConfigError(
                f"model.max_positions={config.model.max_positions}: an item has {ids.levels} codes, one a position; "
                f"set it to {ids.levels} or more, or lower retrieval.levels"
            )
        self.network = network(config, ids, device)
        self.model = self.network.module
        most = min(config.workload.max_history, config.model.max_positions // ids.levels)
        self.items, self._times, self.lengths = _histories(split, most + 1)
        self.examples = len(self.lengths)
        if not self.examples:
            raise ConfigError("no user has two events to train on; use a workload with longer histories")
        self._items_on, self._times_on = (torch.from_numpy(x).to(device) for x in (self.items, self._times))
        self._teacher = _teacher(config, ids, device)
        self._tokens = torch.from_numpy(ids.tokens(np.arange(len(ids.codes)))).to(device)  # [items, levels]
        self._trie = Trie.of(ids).on(device)
        users = split.some_users(config.training.validation_users, config.seed)
        self._most = most
        self._requests = split.requests(users, most, VALIDATION)
        self._targets = split.targets(users, VALIDATION)

    def save(self, path: Path) -> None:
        """Write the weights file. Raises OSError."""
        self.network.save(path, self.ids)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield batches in which lengths are alike: sorted within pools of some batches, which are then mixed."""
        rng, size = np.random.default_rng([self._config.seed, epoch]), self._config.training.batch
        order, parts = rng.permutation(self.examples), list[np.ndarray]()
        for begin in range(0, self.examples, POOL * size):
            pool = order[begin : begin + POOL * size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            parts += [pool[i : i + size] for i in range(0, len(pool), size)]
        for i in rng.permutation(len(parts)):
            yield self._batch(parts[i], rng)

    def _batch(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        first = np.zeros(len(rows), np.int64)  # event that a history begins at; two are left
        if crop := self._config.training.crop:
            first = rng.integers(self.lengths[rows] - 1) * (rng.random(len(rows)) < crop)
        lengths = self.lengths[rows] - first
        columns = np.arange(lengths.max())
        real = columns < lengths[:, None]
        every, later = np.flatnonzero(real), np.flatnonzero(real & (columns > 0))
        places = np.minimum(first[:, None] + columns, self.items.shape[1] - 1)
        at = [torch.from_numpy(x).to(self._device, non_blocking=True) for x in (rows, places, later, every)]
        timed = self.network.timed or (self._teacher is not None and self._teacher.timed)
        times = self._times_on[at[0][:, None], at[1]] if timed else None
        return Batch(self._items_on[at[0][:, None], at[1]], at[2], at[3], times)

    def loss(self, batch: Batch) -> Tensor:
        levels, offsets = self.ids.levels, self.ids.offsets.tolist()
        tokens = self._tokens[batch.items]  # [B, n, levels]
        B, n = batch.items.shape
        options, kept = self._config.training, None
        if options.blanks:  # the first item is read
            kept = torch.rand(B, n, device=tokens.device) >= options.blanks
            kept[:, 0] = True
            kept = kept.repeat_interleave(levels, dim=1)[:, :-1]
        hidden = self.network.hidden(tokens.view(B, -1)[:, :-1], options.dropout, batch.times, kept)
        total = hidden.new_zeros((), dtype=torch.float32)
        soft = None if self._teacher is None else self._teacher.targets(batch.items, batch.later, batch.times)
        for level in range(levels):
            # A code is predicted by the row of the code before it: of the same item, or the last of the item before.
            before = hidden[:, (level or levels) - 1 :: levels]
            truth = tokens[:, :, level] - offsets[level]
            if level == 0:  # row j predicts item j + 1, and no row the first item
                later = batch.later - 1 - torch.div(batch.later, n, rounding_mode="floor")  # rows have n - 1 places
                rows = before.reshape(-1, before.shape[2])[later]
                loss = self.cross_entropy(rows, truth.view(-1)[batch.later])
            else:
                later, rows = batch.later, before.reshape(-1, before.shape[2])[batch.every]
                loss = self._cross_entropy(self.logits(rows, level), truth.reshape(-1)[batch.every])
            if soft is not None:
                logits = self.logits(before.reshape(-1, before.shape[2])[later], level)
                taught = -(soft[level] * (logits / options.temperature).log_softmax(1)).sum(1).mean()
                loss = (1 - options.teacher_share) * loss + options.teacher_share * taught
            total = total + loss
        return total / levels

    def _cross_entropy(self, logits: Tensor, truth: Tensor) -> Tensor:
        options = self._config.training
        if options.temperature != 1.0:  # dividing all logits by 1 would take a tenth of a step
            logits = logits / options.temperature
        return F.cross_entropy(logits, truth, label_smoothing=options.smoothing)

    def cross_entropy(self, rows: Tensor, truth: Tensor) -> Tensor:
        """Return the loss of the first level, over all its codes or over the negatives of this step."""
        count, size = self._config.training.negatives, self.ids.sizes[0]
        if not 0 < count < size:
            return self._cross_entropy(self.logits(rows, 0), truth)
        drawn = torch.randint(size, (count,), device=rows.device)
        y, table = self.network.features(rows), self.network.table(0)
        others = product(y, F.embedding(drawn, table)).masked_fill(drawn == truth[:, None], float("-inf"))
        own = (y * F.embedding(truth, table)).sum(1, keepdim=True)
        return self._cross_entropy(torch.cat([own, others], dim=1), torch.zeros_like(truth))

    def logits(self, rows: Tensor, level: int) -> Tensor:
        """Return fp32 logits [rows, codes of the level] of hidden rows [rows, E]."""
        return product(self.network.features(rows), self.network.table(level))

    def validate(self) -> dict[str, float]:
        """Return NDCG@10 and HR@10 of the second-last items, with the past among the answers."""
        ranks = metrics.ranks_of(self._answers(self._requests, K), self._targets)
        return {"ndcg10": float(metrics.gain(ranks, K).mean()), "hr10": float(metrics.hit(ranks, K).mean())}

    def baseline(self) -> tuple[str, float]:
        """Return the NDCG@10 of the most popular items, by the events of the training split."""
        events = self._split.events
        counts = np.bincount(events.items[self._split.training], minlength=events.num_items)
        most = np.argsort(-counts, kind="stable")[:K]
        ranks = metrics.ranks_of([most] * len(self._targets), self._targets)
        return "popularity", float(metrics.gain(ranks, K).mean())

    def test(self) -> dict[str, float]:
        """Return the figures of the last items of all users; `_new`: without the past, where enough items are left."""
        split = self._split
        users, pasts = split.users, split.pasts(split.users)
        answers, figures = self.answers(), dict[str, float]()
        left = without(answers, pasts)
        for suffix, its, most in (("", answers, K), (NEW, left, shortest(answers, left, len(self.ids.codes)))):
            ranks, cutoffs = metrics.ranks_of(its, split.targets(users)), [c for c in (5, K) if c <= most]
            figures |= {f"{n}{suffix}": float(f.mean()) for n, f in metrics.list_figures(ranks, cutoffs).items()}
        return figures

    def answers(self) -> list[np.ndarray]:
        """Return the best items for the last event of each user: by item vectors, K of them outside their past."""
        users, levels = self._split.users, self.ids.levels
        most = K + max(map(len, self._split.pasts(users)))
        k = min(most, len(self.ids.codes)) if levels == 1 else max(self._config.retrieval.beam_width, K)
        return self._answers(self._split.requests(users, self._most), k)

    def _answers(self, requests: Sequence[Request], k: int) -> list[np.ndarray]:
        """Return the k best items of each request, best first; fewer where fewer exist."""
        order = np.argsort([len(r.history_items) for r in requests], kind="stable")
        answers: list[np.ndarray] = [np.empty(0)] * len(requests)
        for begin in range(0, len(order), BATCH):
            chosen = order[begin : begin + BATCH].tolist()
            prompts = [self.network.prompt(self.ids.tokens(requests[i].history_items).reshape(-1)) for i in chosen]
            times = _times([requests[i] for i in chosen]).to(self._device) if self.network.timed else None
            for i, items in zip(chosen, self._answer(prompts, k, times), strict=True):
                answers[i] = items[items >= 0]
        return answers

    def _answer(self, prompts: list[np.ndarray], k: int, times: Tensor | None) -> np.ndarray:
        """Return the k best items of each prompt, int64 [B, k]; -1 where there are fewer."""
        if self.ids.levels > 1:
            width = max(self._config.retrieval.beam_width, k)
            assert isinstance(self.model, HSTUGenerator), "the configuration refuses other models"
            pool = beam.pool_for(self.model, max(map(len, prompts)), len(prompts))
            return beam.search(self.model, self._trie, prompts, pool, width=width, k=k).items
        lengths = torch.tensor([len(p) for p in prompts])
        tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.from_numpy(prompt)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            hidden = self.network.hidden(tokens.to(self._device), times=times)
        last = hidden[torch.arange(len(prompts), device=self._device), (lengths - 1).to(self._device)]
        logs = torch.log_softmax(self.logits(last, 0), dim=-1)
        items: np.ndarray = explore(lambda *_: logs, self._trie, len(prompts), width=k, k=k)[0].cpu().numpy()
        return items


def _teacher(config: TrainConfig, ids: SemanticIds, device: torch.device) -> Teacher | None:
    options = config.training
    return Teacher(Path(options.teacher), ids, device, options.teacher_temperature) if options.teacher else None


def semantic_ids(config: TrainConfig, split: LeaveOneOut) -> SemanticIds:
    """Return the IDs to train with: from a file, or made from the events of the training split alone."""
    from grengines.semantic import ids, vectors  # imports scikit-learn, which takes seconds

    retrieval, events = config.retrieval, split.events
    if retrieval.semantic_ids is not None:
        return SemanticIds.load(retrieval.semantic_ids, events.num_items)
    if retrieval.levels == 1:
        return ids.one_level(events.num_items)
    if config.training.item_vectors is not None:
        of_items = _item_vectors(Path(config.training.item_vectors), events.num_items)
    else:
        kept = split.training
        of_items = vectors.from_interactions(
            events.users[kept], events.items[kept], events.num_items, dim=64, seed=config.seed
        )
    return ids.build(of_items, retrieval.levels, codes_of(retrieval, events.num_items), config.seed)


def codes_of(retrieval: RetrievalConfig, items: int) -> int:
    """Return the codes of a level: those that the option names, or as many as the catalogue needs."""
    from grengines.semantic.ids import propose_codes

    return retrieval.codes or propose_codes(items, retrieval.levels)


def _item_vectors(path: Path, items: int) -> np.ndarray:
    """Return the item vectors of a weights file of one level, float32 [items, E], of length 1. Raises ConfigError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as f:
            table: np.ndarray = f.get_tensor("token_table").astype(np.float32)
    except (SafetensorError, OSError) as e:
        raise ConfigError(f"training.item_vectors={unreadable(path, e)}") from None
    if len(table) != items + 1:
        raise ConfigError(
            f"training.item_vectors={path}: it has {len(table) - 1} tokens, the workload {items} items; "
            "give weights of retrieval.levels=1 for this workload"
        )
    vectors: np.ndarray = table[:items] / np.maximum(np.linalg.norm(table[:items], axis=1, keepdims=True), 1e-12)
    return vectors


def _times(requests: Sequence[Request]) -> Tensor:
    """Return the times of each history and of its request behind them, int64 [B, longest + 1]."""
    times = [np.append(r.history_timestamps, r.timestamp) for r in requests]
    found = torch.zeros(len(times), max(map(len, times)), dtype=torch.int64)
    for row, its in zip(found, times, strict=True):
        row[: len(its)] = torch.from_numpy(its)
    return found


def _histories(split: LeaveOneOut, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the items to train on in windows of at most `most`, int64 [windows, n], their times, and their lengths.

    Windows of a user begin at the end of their events and share one item, so each item but the first is predicted once.
    """
    events, kept, windows = split.events, split.training, []
    for a, b in pairwise(split.bounds):
        own = np.arange(a, b)[kept[a:b]]
        windows += [own[max(end - most, 0) : end] for end in range(len(own), 1, 1 - most)]
    lengths = np.array([len(window) for window in windows], np.int64)
    items, times = (np.zeros((len(windows), int(lengths.max(initial=1))), np.int64) for _ in range(2))
    for i, window in enumerate(windows):
        items[i, : len(window)], times[i, : len(window)] = events.items[window], events.timestamps[window]
    return items, times, lengths
