"""HSTU beside a model like SASRec in retrieval by item vectors, each with the best recipe of an equal search.

    python experiments/retrievers.py --out outputs/retrievers

The last film of each user of MovieLens-100K is to be found among all 1682. A trial is a recipe of each model; options
that both have are the same for both. Each is trained once. The second-last films choose the epoch and, for each model,
the recipe. That one is trained with further seeds, and the last films judge these trainings alone. The loss is the
softmax over all films at all places of the histories, for both models.

An interval is over users and seeds: a resample draws users, the same for both models, and seeds of each model. The
trainings that are finished are kept under --out, and the same command goes on with the others.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import torch

from grbench import workloads
from grbench.config.compose import compose_jobs, prepare_hydra
from grbench.config.schema import ConfigError
from grbench.quality import metrics
from grbench.quality.lists import NEW, Lists
from grbench.quality.metrics import Estimate, estimate_of
from grbench.quality.protocol import LeaveOneOut
from grbench.training import config as training
from grbench.training import loop
from grbench.training.generate import GenerateTask, K, semantic_ids
from grbench.training.session import epoch_line
from grengines.runtime import atomic_io

BOTH = [
    "workload=ml_100k", "task=generate", "retrieval.levels=1", "training.validation_users=0", "training.batch=16",
    "training.epochs=10", "training.validate_every=2", "training.average=0.99", "workload.max_history=50",
    "model.max_positions=50",
]  # fmt: skip
HSTU, LIKE_SASREC = "HSTU", "like SASRec"
MODELS = {
    HSTU: ["model.layers=2", "model.heads=2"],
    LIKE_SASREC: ["model=decoder_tiny", "model.layers=2", "model.heads=2", "model.kv_heads=2"],
}
BIASED = "model.position_bias=true model.time_bias=129"
TIMED = f"{BIASED} model.scaling_seqlen=50"
LONG = "workload.max_history=200 model.max_positions=200"
LONG_TIMED = f"{BIASED} model.scaling_seqlen=200"
RESEARCH = "model.variant=research model.scaling_seqlen=50 training.temperature=0.05"
NARROW, WIDE = "model.mlp_dim=128", "model.mlp_dim=256"


class Trial(NamedTuple):
    """A recipe: overrides of both models, and of each."""

    both: str
    hstu: str
    like_sasrec: str


TRIALS = (
    Trial("training.dropout=0.3", TIMED, NARROW),
    Trial("training.dropout=0.5", TIMED, NARROW),
    Trial("training.dropout=0.2 training.rate=4e-3", TIMED, NARROW),
    Trial("training.dropout=0.2 training.rate=4e-3", RESEARCH, WIDE),
    Trial("training.dropout=0.1 training.rate=4e-3", TIMED, WIDE),
    Trial("training.dropout=0.2 training.rate=4e-3 training.epochs=30", TIMED, WIDE),
    Trial("training.dropout=0.3 training.rate=4e-3 training.epochs=30 training.blanks=0.1", TIMED, WIDE),
    Trial("training.dropout=0.2 training.rate=4e-3 training.epochs=20 model.layers=4", TIMED, NARROW),
    Trial(f"{LONG} training.dropout=0.2 training.rate=4e-3", LONG_TIMED, WIDE),
    Trial(f"{LONG} training.dropout=0.2 training.rate=4e-3 training.epochs=20 model.layers=4", LONG_TIMED, NARROW),
    Trial(f"{LONG} training.dropout=0.3 training.rate=4e-3 training.epochs=30", LONG_TIMED, WIDE),
)
FIGURES = (f"hr{K}", f"ndcg{K}")


def recipe(model: str, number: int) -> list[str]:
    """Return the overrides of a trial for a model."""
    trial = TRIALS[number]
    return f"{trial.both} {trial.hstu if model == HSTU else trial.like_sasrec}".split()


def train(model: str, trial: int, seed: int, overrides: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """Train one recipe, or read what an earlier run left in the folder.

    Returns the figures of the validation, those of each user's last film by name, and facts of the training.
    """
    name = f"{model.lower().replace(' ', '-')}-{trial}-{seed}"
    words = [*BOTH, *MODELS[model], *recipe(model, trial), *overrides, f"seed={seed}"]
    if folder is not None and (file := folder / f"{name}.json").is_file():
        kept: dict[str, Any] = json.loads(file.read_text())
        if kept.pop("words") == words:
            return kept
    prepare_hydra()
    training.register_schemas()
    config = compose_jobs("train", training.to_config, words)[0]
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    split = LeaveOneOut(workloads.load_events(config.workload))
    task = GenerateTask(config, split, semantic_ids(config, split), device)

    def report(epoch: loop.Epoch) -> None:
        print(f"{name}: {epoch_line(epoch, config.training)}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as checkpoint:
        state = loop.train(task, config.training, device, seed, Path(checkpoint), name, report)
    best = next(row for row in state.history if row["epoch"] == state.best_epoch)
    with torch.no_grad():
        answers = task.answers()
    figures = Lists(split, split.users, config.workload.max_history, K, seed).figures(answers)
    result = {
        "valid": {figure: best[figure] for figure in FIGURES},
        "test": {figure: its.tolist() for figure, its in figures.items()},
        "best_epoch": state.best_epoch,
        "epochs": state.epochs,
        "parameters": sum(p.numel() for p in task.model.parameters()),
    }
    if folder is not None:
        atomic_io.write(folder / f"{name}.json", json.dumps({"words": words, **result}).encode())
    return result


def over_seeds(results: Sequence[Mapping[str, Any]], model: int) -> dict[str, Estimate]:
    """Return the mean of each figure over seeds. Resamples have the same users for each model, and draw its seeds."""
    each = [metrics.means({name: np.array(its) for name, its in result["test"].items()}) for result in results]
    picks = np.random.default_rng([model, 5]).integers(len(each), size=(len(each), metrics.RESAMPLES))
    found = {}
    for name in each[0]:
        drawn = np.take_along_axis(np.stack([its[name].drawn for its in each]), picks, axis=0).mean(0)
        found[name] = estimate_of(float(np.mean([its[name].value for its in each])), drawn)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--trials", type=int, default=len(TRIALS), help="recipes of each model (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of the chosen recipe (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=2, help="trainings at a time (default: %(default)s)")
    args = parser.parse_args(arguments)
    if not 0 < args.trials <= len(TRIALS):
        parser.error(f"--trials {args.trials}: allowed are 1 to {len(TRIALS)}")
    rows = common.Rows(args, __file__, arguments)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes below
    chosen, finals = dict[str, int](), dict[str, list[dict[str, Any]]]()
    with ProcessPoolExecutor(args.parallel, get_context("spawn")) as pool:

        def begin(model: str, trial: int, seed: int) -> Any:
            return pool.submit(train, model, trial, seed, args.overrides, args.out)

        try:
            tried = {(model, trial): begin(model, trial, 0) for trial in range(args.trials) for model in MODELS}
            for (model, trial), future in tried.items():
                result = future.result()
                valid = {f"valid_{figure}": value for figure, value in result["valid"].items()}
                spent = {"best_epoch": result["best_epoch"], "epochs": result["epochs"]}
                rows.add(model=model, trial=trial, **valid, **spent, recipe=" ".join(recipe(model, trial)))
            for model in MODELS:
                chosen[model] = max(range(args.trials), key=lambda t: tried[model, t].result()["valid"]["ndcg10"])
            again = {m: [begin(m, trial, seed) for seed in range(1, args.seeds)] for m, trial in chosen.items()}
            for model, futures in again.items():
                finals[model] = [f.result() for f in (tried[model, chosen[model]], *futures)]
        except ConfigError as e:
            parser.error(str(e))
    means = {model: over_seeds(finals[model], number) for number, model in enumerate(MODELS)}
    for figure in (*FIGURES, *(f"{name}{NEW}" for name in FIGURES)):
        for model, results in finals.items():
            its, own = means[model][figure], means[HSTU][figure]
            each = [float(np.mean(result["test"][figure])) for result in results]
            row = {"model": model, "trial": chosen[model], "parameters": results[0]["parameters"], "figure": figure}
            row |= {"test": its.value, "low": its.low, "high": its.high}
            row |= {"lowest_seed": min(each), "highest_seed": max(each)}
            if model != HSTU:
                more = estimate_of(own.value - its.value, own.drawn - its.drawn)
                row |= {"difference": more.value, "difference_low": more.low, "difference_high": more.high}
            rows.add(**row)
    rows.note("valid: second-last films, which choose the epoch and, by NDCG@10, the recipe; test: last films.")
    rows.note(
        f"test: mean of {args.seeds} seeds of the chosen recipe; low and high: 95% interval over users and seeds; "
        f"difference: {HSTU} minus that of the row. {NEW}: films of the user's past are left out of the answers."
    )
    rows.close()


if __name__ == "__main__":
    common.run(main)
