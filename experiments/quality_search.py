"""Recipes of training beside each other, to choose one by the second-last event of each user.

    python experiments/quality_search.py --data FOLDER --minutes 4.5 --out outputs/search

FOLDER has the files of quality_gpu.py, which trains with the recipes that were chosen. A recipe is a data set, a kind
of model and the overrides of `grbench train` that differ from those there. Semantic IDs are made from the vectors of
another recipe, which is trained first. Several trainings share each GPU. The figures of each are written when it ends,
a training that the minutes end is tested as it is, and the same command with the same --out goes on with the others.
Choose by the `valid_` columns: the `test_` ones are of the events that nothing may be chosen by.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import quality_gpu

from grbench.execution.gpu import visible_gpus

FIGURES = ("hr10", "ndcg10")
START_S = 25.0  # from the start of a process to its first step, and from its test to its end
LEAST_S = 45.0  # left for the steps of a training, without which it is not begun
EVERY = "training.validation_users=0 training.patience=10"
BIAS = "model.position_bias=true"
NEAR = f"{BIAS} model.scaling_seqlen=10"
WIDE = f"{NEAR} model.embedding_dim=128 model.qk_dim=64 model.v_dim=64 training.epochs=30"
CODES = "training.validation_users=3000 training.patience=8"
LONG = f"{EVERY} training.epochs=150 training.validate_every=3 training.rate=2e-3"
TIMED = f"{BIAS} model.time_bias=129"
RESEARCH = "model.variant=research training.temperature=0.05"
BIG = "model.embedding_dim=256"
MOST = "training.teacher_share=0.9"
BROAD = "model.embedding_dim=256 model.qk_dim=64 model.v_dim=64"
TWO = "retrieval.levels=2 retrieval.codes=512"
VARIED = "training.blanks=0.2 training.crop=0.5 training.average=0.99"


@dataclass(frozen=True)
class Recipe:
    """One recipe: the overrides, and the recipe whose item vectors make its semantic IDs."""

    data: str
    kind: str  # items, ids or sasrec
    words: str
    after: str = ""
    teacher: bool = False


RECIPES = {
    "beauty-items-wide": Recipe("beauty", "items", f"{EVERY} {WIDE}"),
    "beauty-items-old": Recipe("beauty", "items", EVERY),
    "beauty-items-old-bias": Recipe("beauty", "items", f"{EVERY} {BIAS}"),
    "beauty-items-near": Recipe("beauty", "items", f"{EVERY} {NEAR} training.epochs=40"),
    "beauty-items-short": Recipe(
        "beauty", "items", f"{EVERY} {NEAR} training.epochs=14 training.batch=128 training.dropout=0.2"
    ),
    "beauty-items-average": Recipe("beauty", "items", f"{EVERY} {WIDE} training.average=0.998"),
    **{
        f"ml_100k-{name}-{seed}": Recipe("ml_100k", kind, f"{words} seed={seed}")
        for seed in (0, 1)
        for name, kind, words in (
            ("items-timed", "items", f"{EVERY} {TIMED}"),
            ("items-timed-long", "items", f"{LONG} {TIMED}"),
            ("items-varied", "items", f"{LONG} {TIMED} {VARIED}"),
            ("items-research", "items", f"{LONG} {RESEARCH} {VARIED}"),
            ("items-big", "items", f"{LONG} {TIMED} {BIG} model.qk_dim=64 model.v_dim=128 training.rate=1e-3"),
            ("sasrec-big", "sasrec", f"{LONG} {BIG} model.mlp_dim=512 model.head_dim=128 training.rate=1e-3"),
            ("sasrec", "sasrec", EVERY),
            ("sasrec-long", "sasrec", LONG),
            ("sasrec-varied", "sasrec", f"{LONG} {VARIED}"),
        )
    },
    **{
        f"beauty-ids-{name}": Recipe("beauty", "ids", f"{CODES} {words}", "beauty-items-wide", teacher)
        for name, teacher, words in (
            ("taught", True, "training.epochs=50"),
            ("untaught", False, ""),
            ("taught-most", True, "training.epochs=50 training.teacher_share=0.9"),
            ("taught-two", True, "training.epochs=50 retrieval.levels=2 retrieval.codes=512"),
            ("two", False, "retrieval.levels=2 retrieval.codes=512"),
            ("taught-near", True, "training.epochs=50 model.scaling_seqlen=20"),
            ("taught-varied", True, "training.epochs=60 training.crop=0.5 training.blanks=0.1"),
            ("taught-average", True, "training.epochs=50 training.average=0.998"),
            ("taught-less-dropout", True, "training.epochs=50 training.dropout=0.15"),
            (
                "taught-wide", True,
                "training.epochs=40 model.embedding_dim=256 model.heads=4 model.qk_dim=64 model.v_dim=64",
            ),
            ("smooth", False, "training.epochs=40 training.smoothing=0.1 training.crop=0.5 training.blanks=0.1"),
        )
    },
    **{
        f"beauty-codes-{name}": Recipe("beauty", "ids", f"{CODES} {words}", "beauty-items-old-bias", teacher)
        for name, teacher, words in (
            ("untaught", False, "training.epochs=40"),
            ("taught", True, "training.epochs=40"),
            ("most", True, f"training.epochs=40 {MOST}"),
            ("crop", True, f"training.epochs=40 {MOST} training.crop=1"),
            ("soft", True, f"training.epochs=40 {MOST} training.crop=0.5 training.teacher_temperature=2"),
            ("light", True, f"training.epochs=40 {MOST} training.crop=0.5 training.dropout=0.1"),
            ("two", True, f"training.epochs=40 {MOST} {TWO}"),
            ("wide", True, f"training.epochs=40 {MOST} training.crop=0.5 {BROAD}"),
            ("long", True, f"training.epochs=100 {MOST} training.crop=0.5"),
            *(
                (f"big-{name}", True, f"{MOST} {BROAD} training.patience=12 {words}")
                for name, words in (
                    ("light", "training.epochs=50 training.dropout=0.15"),
                    ("two", f"training.epochs=50 {TWO}"),
                    ("two-light", f"training.epochs=50 {TWO} training.dropout=0.15"),
                    ("two-long", f"training.epochs=80 {TWO} training.dropout=0.2"),
                    ("two-average", f"training.epochs=50 {TWO} training.dropout=0.2 training.average=0.998"),
                    ("two-six", f"training.epochs=50 {TWO} training.dropout=0.2 model.layers=6"),
                )
            ),
            ("bias", False, f"training.epochs=40 {BIAS}"),
            ("bias-taught", True, f"training.epochs=40 {MOST} {BIAS}"),
            ("bias-crop", True, f"training.epochs=40 {MOST} training.crop=0.5 {BIAS}"),
            ("bias-two", True, f"training.epochs=40 {MOST} training.crop=0.5 {TWO} {BIAS}"),
            ("bias-wide", True, f"training.epochs=40 {MOST} training.crop=0.5 {BROAD} {BIAS}"),
        )
    },
    **{
        f"beauty-items-wide-{name}": Recipe("beauty", "items", f"{EVERY} {WIDE} {words}")
        for name, words in (
            ("smooth", "training.smoothing=0.1"),
            ("crop", "training.crop=0.5"),
            ("blanks", "training.blanks=0.2"),
            ("dropout-0.3", "training.dropout=0.3 training.epochs=20"),
            ("decay", "training.weight_decay=0.5"),
            ("all", "training.average=0.998 training.smoothing=0.1 training.crop=0.5 training.blanks=0.1"),
            ("cosine", "model.item_norm=true model.final_norm=l2 training.temperature=0.05"),
            ("gate", "model.silu=uvqk model.output=gate"),
            ("wider", "model.embedding_dim=256 training.epochs=20"),
            ("one-layer", "model.layers=1"),
            ("four-layers", "model.layers=4"),
            ("slow", "training.rate=5e-4 training.epochs=40"),
        )
    },
    "beauty-sasrec": Recipe("beauty", "sasrec", EVERY),
    "beauty-sasrec-wide": Recipe(
        "beauty", "sasrec", f"{EVERY} model.embedding_dim=128 training.epochs=30 training.average=0.998"
    ),
}  # fmt: skip


def command(recipe: Recipe, data: Path, out: Path, folder: Path, minutes: float) -> list[str]:
    """The words of a recipe's training, which ends within the minutes."""
    every = (training for chain in quality_gpu.chains(data, 1) for training in chain)
    base = next(t.words for t in every if (t.data, t.kind) == (recipe.data, recipe.kind))
    if base[-len(quality_gpu.TAUGHT) :] == quality_gpu.TAUGHT:  # the recipe chosen there; each one here names its own
        base = base[: -len(quality_gpu.TAUGHT)]
    words = [*base, *recipe.words.split(), f"training.minutes={minutes:.2f}", f"out={folder}", f"output_root={out}"]
    if recipe.after:
        weights = out / recipe.after / "weights.safetensors"
        words += [f"training.item_vectors={weights}"] + [f"training.teacher={weights}"] * recipe.teacher
    return [sys.executable, "-m", "grbench", "train", *words]


def train(name: str, data: Path, out: Path, ends: float, gpu: str) -> dict[str, Any] | None:
    """Train by a recipe, or read what an earlier run of this program left. Returns None if there is no time for it."""
    recipe, folder = RECIPES[name], out / name
    file = folder / "results.json"
    if not file.is_file():
        left = ends - time.monotonic() - START_S
        if left < LEAST_S:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
        with (folder / "train.log").open("w") as log:
            words = command(recipe, data, out, folder, left / 60)
            done = subprocess.run(words, stdout=log, stderr=log, env=environment)
        if done.returncode:
            said = (folder / "train.log").read_text().strip().splitlines()
            raise RuntimeError(said[-1] if said else "no output")
    results: dict[str, Any] = json.loads(file.read_text())
    return results


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """The row of a training: figures of the best epoch in the validation, then those of the test."""
    test = results["test"]
    best = next(row for row in results["rows"] if row["epoch"] == test["best_epoch"])
    wanted = results["config"]["training"]["epochs"]
    return {
        **{f"valid_{name}": best[name] for name in FIGURES},
        **{f"test_{name}": test[name] for name in FIGURES},
        "test_hr10_new": test.get("hr10_new", ""),
        "best_epoch": test["best_epoch"],
        "epochs": f"{test['epochs']:.0f} of {wanted}",
        "training_s": test["training_s"],
    }


def chosen(only: str) -> list[str]:
    """The recipes whose names contain one of the words, and those that they come after."""
    named = [name for name in RECIPES if any(word in name for word in only.split(","))]
    before = {RECIPES[name].after for name in named}
    return [name for name in RECIPES if name in named or name in before]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__ or "", overrides=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with the files")
    parser.add_argument(
        "--only", default="", help="parts of names of recipes, such as beauty-ids,ml_100k (default: all)"
    )
    parser.add_argument("--minutes", type=float, default=4.5, help="for all trainings (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=14, help="trainings that share a GPU (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to train on; 0: the CPU (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="show the recipes and their overrides, and train none")
    args = parser.parse_args(arguments)
    waiting = chosen(args.only)
    if not waiting:
        parser.error(f"--only {args.only}: allowed are parts of {', '.join(RECIPES)}")
    if args.list:
        print("\n".join(f"{name}: {RECIPES[name].words}" for name in waiting))
        return 0
    rows = common.Rows(args, __file__, arguments)
    data, out = args.data.absolute(), (args.out or Path("outputs/search")).absolute()
    begun = time.monotonic()
    ends = begun + 60 * args.minutes
    needed = {recipe.after for recipe in RECIPES.values()}
    places = [gpu for _ in range(args.parallel) for gpu in visible_gpus()[: args.gpus]] or [""] * args.parallel
    running: dict[Future[dict[str, Any] | None], tuple[str, str]] = {}
    done: set[str] = set()
    with ThreadPoolExecutor(len(places)) as pool:
        while waiting or running:
            while places and (name := next((n for n in waiting if RECIPES[n].after in ("", *done)), "")):
                waiting.remove(name)
                gpu = places.pop(0)
                running[pool.submit(train, name, data, out, ends, gpu)] = (name, gpu)
            if not running:
                break  # what the others need failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, gpu = running.pop(future)
                places.append(gpu)
                try:
                    results = future.result()
                except (RuntimeError, OSError) as e:
                    rows.fail(e, recipe=name)
                    continue
                if results is None:
                    rows.note(f"{name}: no time was left for it.")
                    continue
                done.add(name)
                rows.add(recipe=name, **figures(results))
                if name not in needed:
                    (out / name / "weights.safetensors").unlink(missing_ok=True)
    rows.note("valid: second-last event of each user, which chooses the epoch and the recipe; test: last event.")
    rows.note(f"{time.monotonic() - begun:.0f} s in all, {args.parallel} trainings a GPU, {args.gpus} GPUs.")
    rows.close()
    return 0


if __name__ == "__main__":
    common.run(main)
