"""Quality by the protocol of the literature: train on Amazon Beauty, Sports, Toys and MovieLens-100K, and test.

    python experiments/quality_gpu.py --data FOLDER --out outputs/quality

FOLDER has amazon_beauty.txt, amazon_sports.txt and amazon_toys.txt (lines of `user item item ...`) and ml-100k.inter;
without the last one MovieLens-100K is downloaded. For each data set HSTU is trained to generate by item vectors, and
then by semantic IDs that are made from those vectors, on Amazon with the first model as teacher. A Transformer like
SASRec is trained by item vectors on Beauty and MovieLens-100K; and a ranker on MovieLens-100K, which has three seeds.
The trainings are commands `grbench train` that share the GPU; each has its folder under --out, with its log. Nothing is
downloaded otherwise. A training that is there already is kept if it is of this commit and its options and the contents
of its files are equal; else its folder is replaced. So semantic IDs are trained again after their item vectors.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

from grbench.config.compose import compose_jobs
from grbench.execution import results as results_file
from grbench.execution.environment import describe_environment
from grbench.training.config import register_schemas, to_config
from grbench.training.session import identity_of

# R@10 and N@10 as `phonism/genrec` lists them, leave one out and all items ranked; TIGER's own figures.
PUBLISHED = {
    ("beauty", "items"): "HSTU .0708 .0412, SASRec .0688 .0375",
    ("sports", "items"): "HSTU .0365 .0207, SASRec .0373 .0185",
    ("toys", "items"): "HSTU .0685 .0427, SASRec .0700 .0374",
    ("beauty", "sasrec"): "SASRec .0688 .0375",
    ("beauty", "ids"): "TIGER .0648 .0384",
    ("sports", "ids"): "TIGER .0400 .0225",
    ("toys", "ids"): "TIGER .0712 .0432",
}
SASREC = [
    "retrieval.levels=1", "workload.max_history=50", "model=decoder_tiny", "model.max_positions=50", "model.heads=2",
    "model.kv_heads=2", "training.batch=256", "training.rate=1e-3", "training.dropout=0.5", "training.epochs=80",
    "training.patience=8", "training.validate_every=2",
]  # fmt: skip
AMAZON = ("beauty", "sports", "toys")
GENERATE = ["task=generate", "training.validation_users=3000"]
ITEMS = [
    "retrieval.levels=1", "workload.max_history=50", "model.max_positions=50", "model.scaling_seqlen=50",
    "model.embedding_dim=64", "model.layers=2", "model.heads=2", "model.qk_dim=32", "model.v_dim=32",
    "training.batch=256", "training.rate=1e-3", "training.dropout=0.5", "training.epochs=80", "training.patience=8",
    "training.validate_every=2",
]  # fmt: skip
CHOSEN = ["training.validation_users=0", "training.patience=10", "model.position_bias=true"]  # by quality_search.py
IDS = [
    "retrieval.levels=3", "retrieval.codes=256", "retrieval.beam_width=64", "workload.max_history=20",
    "model.max_positions=60", "model.scaling_seqlen=60", "model.embedding_dim=128", "model.layers=4", "model.heads=4",
    "model.qk_dim=32", "model.v_dim=32", "training.batch=256", "training.rate=1e-3", "training.dropout=0.3",
    "training.epochs=60", "training.patience=6", "training.validate_every=3", "training.validation_users=2000",
]  # fmt: skip
RANK = [
    "task=rank", "workload.max_history=128", "model.tasks=[rated,liked]", "training.batch=64", "training.rate=2e-3",
    "training.dropout=0.2", "training.epochs=20", "training.patience=5",
]  # fmt: skip
TAUGHT = [  # by quality_search.py, with the generator by item vectors as teacher
    "retrieval.levels=2", "retrieval.codes=512", "model.embedding_dim=256", "model.qk_dim=64", "model.v_dim=64",
    "training.dropout=0.15", "training.epochs=50", "training.patience=12", "training.validation_users=3000",
]  # fmt: skip
RERANK = [  # of the shape of the generator by semantic IDs, whose items it ranks in study=gpu_candidates
    "task=rank", "workload.max_history=20", "workload.num_candidates=128", "model.tasks=[rated]",
    "model.max_positions=60", "model.scaling_seqlen=60", "model.embedding_dim=256", "model.layers=4", "model.heads=4",
    "model.qk_dim=64", "model.v_dim=64", "training.batch=256", "training.rate=1e-3", "training.dropout=0.3",
    "training.epochs=10", "training.minutes=3", "held_out=4000",  # enough to choose the epoch by
]  # fmt: skip
KINDS = ("items", "ids", "sasrec", "rank")
COMPOSING = threading.Lock()  # Hydra composes one configuration at a time
FIGURES = ("hr5", "hr10", "ndcg5", "ndcg10", "hr10_new", "ndcg10_new", "auc/rated", "auc/liked")
MOVIES = ["training.batch=128", "training.dropout=0.3", "training.epochs=60", "training.validate_every=2"]


@dataclass
class Training:
    """One training: the data set, `items`, `ids`, `sasrec` or `rank`, its seed and the overrides of its command."""

    data: str
    kind: str
    seed: int
    words: list[str]

    @property
    def name(self) -> str:
        return f"{self.data}-{self.kind}-{self.seed}"


def chains(data: Path, seeds: int) -> Iterator[list[Training]]:
    """Yield the trainings of each data set and seed: item vectors, then semantic IDs from them."""
    for name in AMAZON:
        source = ["tracking=none", "workload=csv", f"workload.path={data / f'amazon_{name}.txt'}"]
        both = [*source, *GENERATE]
        by_items = Training(name, "items", 0, [*both, *ITEMS, *CHOSEN])
        yield [by_items, Training(name, "ids", 0, [*both, *IDS, *TAUGHT])]
        if name == "beauty":
            yield [Training(name, "sasrec", 0, [*both, *SASREC])]
            yield [Training(name, "rank", 0, [*source, *RERANK])]
    file = data / "ml-100k.inter"
    source = (
        ["workload=recbole", f"workload.path={file}", "workload.sort=true"] if file.is_file() else ["workload=ml_100k"]
    )
    for seed in range(seeds):
        both = ["tracking=none", *source, *GENERATE]
        yield [
            Training("ml_100k", "items", seed, [*both, *ITEMS, *MOVIES]),
            Training("ml_100k", "ids", seed, [*both, *IDS, *MOVIES]),
        ]
        yield [Training("ml_100k", "sasrec", seed, [*both, *SASREC, *MOVIES])]
        yield [Training("ml_100k", "rank", seed, ["tracking=none", *source, *RANK])]


def run(chain: list[Training], out: Path, extra: Sequence[str]) -> list[tuple[Training, dict[str, Any] | None]]:
    """Train one after another. Returns the results of each; None for one that failed, after which the chain ends."""
    done: list[tuple[Training, dict[str, Any] | None]] = []
    for training in chain:
        folder = out / training.name
        folder.mkdir(parents=True, exist_ok=True)
        words = [*training.words, *extra, f"seed={training.seed}", f"out={folder}", f"output_root={out}"]
        vectors = out / f"{training.data}-items-{training.seed}" / "weights.safetensors"
        if training.kind == "ids" and vectors.is_file():
            words.append(f"training.item_vectors={vectors}")
            if training.data in AMAZON:
                words += [f"training.teacher={vectors}", "training.teacher_share=0.9"]
        begun, command = time.perf_counter(), ["python", "-m", "grbench", "train", *words]
        results = earlier_results(folder, words)
        if results is None:
            if (folder / results_file.RESULTS_FILE).is_file():  # else a training that was stopped goes on
                shutil.rmtree(folder)
                folder.mkdir()
            with (folder / "train.log").open("w") as log:
                code = subprocess.run([sys.executable, *command[1:]], stdout=log, stderr=log).returncode
            results = earlier_results(folder, words)
            if code or results is None:
                said = (folder / "train.log").read_text().strip().splitlines()
                seconds = time.perf_counter() - begun
                print(f"{training.name}: failed after {seconds:.0f} s: {said[-1] if said else 'no output'}", flush=True)
                return [*done, (training, None)]
        done.append((training, results))
        test = results["test"]
        figures = ", ".join(f"{name} {test[name]:.4f}" for name in FIGURES if name in test)
        print(f"{training.name}: {time.perf_counter() - begun:.0f} s, {figures}", flush=True)
    return done


def earlier_results(folder: Path, words: Sequence[str]) -> dict[str, Any] | None:
    """Return the results in a folder if a training with these overrides would be the same there; None if not."""
    file = folder / results_file.RESULTS_FILE
    if not file.is_file():
        return None
    with COMPOSING:
        [config] = compose_jobs("train", to_config, words)
    found = results_file.load(file)
    same = found["environment"].get("git_sha") == describe_environment()["git_sha"]
    return found if same and found.get("identity") == identity_of(config) else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="folder with the files")
    parser.add_argument("--only", default="", help="data sets, such as beauty,ml_100k (default: all)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="trainings (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of MovieLens-100K (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=6, help="trainings that share the GPU (default: %(default)s)")
    args = parser.parse_args(arguments)
    every = list(chains(args.data.absolute(), args.seeds))
    sets = args.only.split(",") if args.only else [*AMAZON, "ml_100k"]
    kept = [[t for t in chain if t.data in sets and t.kind in args.kinds.split(",")] for chain in every]
    chosen = [chain for chain in kept if chain]
    if not chosen:
        allowed = f"{', '.join(AMAZON)}, ml_100k; {', '.join(KINDS)}"
        parser.error(f"--only {args.only} --kinds {args.kinds}: allowed are {allowed}")
    register_schemas()
    rows = common.Rows(args, __file__, arguments)
    out = (args.out or Path("outputs/quality")).absolute()
    begun = time.perf_counter()
    chosen.sort(key=lambda chain: ("sports", "beauty", "toys", "ml_100k").index(chain[0].data))  # longest first
    with ThreadPoolExecutor(args.parallel) as pool:
        for done in pool.map(lambda chain: run(chain, out, args.overrides), chosen):
            for training, results in done:
                if results is None:
                    rows.fail(RuntimeError(f"see {out / training.name / 'train.log'}"), training=training.name)
                    continue
                test = results["test"]
                figures = {name: test.get(name, "") for name in FIGURES}
                spent = {"epochs": test["epochs"], "best_epoch": test["best_epoch"], "training_s": test["training_s"]}
                published = PUBLISHED.get((training.data, training.kind), "")
                rows.add(training=training.name, **figures, **spent, published_hr10_ndcg10=published)
    rows.note("Last event of each user, all items ranked; the epoch was chosen on the second-last. _new: past removed.")
    rows.note(f"{time.perf_counter() - begun:.0f} s in all.")
    rows.close()
    return 0


if __name__ == "__main__":
    common.run(main)
