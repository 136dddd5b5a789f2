"""A trained ranker beside a model like SASRec, each item's mean label, and popularity, on the same held-out requests.

    python experiments/rankers.py

Each seed draws the candidates of MovieLens-100K's visits, and trains two rankers on them. HSTU has the recipe of
experiments/weights/README.md. The other one is a Transformer of its width and layers over item vectors, whose score of
a candidate is the product of its last row with the candidate's vector, as in SASRec. Both have the same requests,
labels, loss, options of training and choice of the epoch. Both rank the last 512 requests, as do baselines that know
the requests before them. Figures are means over the seeds. Intervals are over users, and those of a difference are of
pairs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grbench import workloads
from grbench.config.compose import compose_jobs, prepare_hydra
from grbench.config.schema import ConfigError
from grbench.quality.metrics import Estimate, estimate_of
from grbench.quality.rankings import Rankings
from grbench.training import config as training
from grbench.training import loop
from grbench.training.networks import TransformerNetwork
from grbench.training.rank import RankTask
from grbench.training.session import epoch_line
from grbench.workloads.trace import Trace
from grengines.semantic.ids import one_level

RECIPE = [
    "workload=ml_100k", "workload.max_history=50", "task=rank", "model.tasks=[rated,liked]", "training.batch=64",
    "training.epochs=20", "training.patience=5", "training.validate_every=2", "training.dropout=0.5",
]  # fmt: skip
SASREC = ["task=generate", "retrieval.levels=1", "model=decoder_tiny", "model.heads=2", "model.kv_heads=2"]
HSTU, LIKE_SASREC = "HSTU", "like SASRec"


class SasRec(nn.Module):
    """A Transformer over the items of a history: a task's score is a product of its last row and a candidate."""

    def __init__(self, network: TransformerNetwork, width: int, tasks: int, seed: int) -> None:
        super().__init__()
        self.network, self.layers = network, network.module
        self.maps = nn.Parameter(torch.eye(width).repeat(tasks, 1, 1))  # of the last row, one a task
        self.bias = nn.Parameter(torch.zeros(tasks))

    def forward(self, tokens: Tensor, last: Tensor, candidates: Tensor, owners: Tensor, dropout: float) -> Tensor:
        """Return logits [candidates, tasks]. tokens [B, n], last: row of each request's last item, owners: requests."""
        rows = self.network.hidden(tokens, dropout)[torch.arange(len(tokens)), last]
        users = torch.einsum("be,tef->btf", rows, self.maps)[owners]
        return torch.einsum("ctf,cf->ct", users, F.embedding(candidates, self.network.table(0))) + self.bias


class SasRecTask(RankTask):
    """Training of a model like SASRec on the requests, the labels and the loss of a ranker."""

    def __init__(self, config: Any, decoder: Any, trace: Trace, device: torch.device) -> None:
        self._decoder, self._ids = decoder, one_level(trace.catalogue.num_items)
        super().__init__(config, trace, device)

    def build(self, trace: Trace) -> Any:
        network = TransformerNetwork(self._decoder, self._ids, self.device)
        return SasRec(network, self._decoder.model.embedding_dim, len(self._config.model.tasks), self._config.seed)

    def logits(self, indices: list[int], dropout: float = 0.0) -> Tensor:
        requests = [self._requests[i] for i in indices]
        prompts = [self.model.network.prompt(self._ids.tokens(r.history_items).reshape(-1)) for r in requests]
        tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        last = np.array([len(prompt) - 1 for prompt in prompts])
        owners = np.repeat(np.arange(len(requests)), [len(r.candidates) for r in requests])
        parts = (tokens, last, np.concatenate([r.candidates for r in requests]), owners)
        found: Tensor = self.model(*(torch.from_numpy(part).to(self.device) for part in parts), dropout)
        return found


def train(task: RankTask, config: Any, name: str) -> None:
    """Train a ranker to its best epoch, with a line for each."""

    def report(epoch: loop.Epoch) -> None:
        print(f"{name}: {epoch_line(epoch, config.training)}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        loop.train(task, config.training, task.device, config.seed, Path(folder), name, report)


def ranked(config: Any, decoder: Any) -> tuple[dict[str, dict[str, Estimate]], dict[str, int], int]:
    """Train both rankers for one seed. Returns figures by ranker and name, parameters, and the number of requests."""
    trace = workloads.build(config.workload, config.seed, latency_limit_ms=1.0)
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    task = RankTask(config, trace, device)
    rankings = Rankings.of(trace, config.model.tasks, config.held_out, 0, task.seen_until)
    if rankings is None:
        raise ConfigError(f"held_out={config.held_out}: no request is later than the training; give another one")
    both = {HSTU: task, LIKE_SASREC: SasRecTask(config, decoder, trace, device)}
    for name, its in both.items():
        train(its, config, f"{name} seed {config.seed}")
    with torch.no_grad():
        figures = {name: rankings.estimates(its.scores(np.array(rankings.indices))) for name, its in both.items()}
    sizes = {name: sum(p.numel() for p in its.model.parameters()) for name, its in both.items()}
    return figures | rankings.baselines(), sizes, len(rankings.indices)


def every_seed(seeds: int, overrides: Sequence[str], parallel: int) -> list[Any]:
    """Return `ranked` of each seed."""
    prepare_hydra()
    training.register_schemas()
    words = [[*RECIPE, *overrides], SASREC]
    configs = [
        [compose_jobs("train", training.to_config, [*of, f"seed={seed}"])[0] for seed in range(seeds)] for of in words
    ]
    if parallel == 1:
        return [ranked(*pair) for pair in zip(*configs, strict=True)]
    with ProcessPoolExecutor(parallel, get_context("spawn")) as pool:
        return list(pool.map(ranked, *configs))


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over seeds, whose resamples are of the same users."""
    return estimate_of(float(np.mean([e.value for e in estimates])), np.mean([e.drawn for e in estimates], axis=0))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each model (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=1, help="seeds beside each other (default: %(default)s)")
    args = parser.parse_args(arguments)
    rows = common.Rows(args, __file__, arguments)
    found: dict[str, dict[str, list[Estimate]]] = {}
    try:
        results = every_seed(args.seeds, args.overrides, args.parallel)
    except ConfigError as e:
        parser.error(str(e))
    _, sizes, requests = results[0]
    for figures, *_ in results:
        for name, its in figures.items():
            for figure, estimate in its.items():
                found.setdefault(name, {}).setdefault(figure, []).append(estimate)
    for label in dict.fromkeys(name.partition("/")[0] for name in found[HSTU]):
        own = mean(found[HSTU][f"{label}/auc"])
        for name, by_figure in found.items():
            each = by_figure[f"{label}/auc"]
            area = mean(each)
            row = {"ranker": name, "task": label} | ({"parameters": sizes[name]} if name in sizes else {})
            row |= {"AUC": area.value, "low": area.low, "high": area.high}
            row |= {"lowest_seed": min(e.value for e in each), "highest_seed": max(e.value for e in each)}
            if name != HSTU:
                less = estimate_of(own.value - area.value, own.drawn - area.drawn)
                row |= {"difference": less.value, "difference_low": less.low, "difference_high": less.high}
            rows.add(**row)
    rows.note(
        f"Means of {args.seeds} seeds over the last {requests} requests; low and high: 95% interval over users; "
        f"difference: AUC of {HSTU} minus that of the row."
    )
    rows.close()


if __name__ == "__main__":
    common.run(main)
