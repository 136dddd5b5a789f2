"""`grbench evaluate`: the quality of configurations, with intervals, baselines and the loss against fp32."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from grbench import signals
from grbench.config.arguments import Arguments, CommandError
from grbench.config.compose import plan_jobs, prepare_hydra
from grbench.config.jobs import Job
from grbench.config.schema import to_spec
from grbench.execution import results
from grbench.execution.folders import require_writable
from grbench.execution.watch import watch
from grbench.quality.trained import Wanted, as_run, with_trained
from grbench.report.markdown import table

if TYPE_CHECKING:
    from grbench.quality.evaluate import Evaluation

SHOWN = ("hr10", "ndcg10", "mrr10", "hr10_new", "ndcg10_new")  # columns of lists; a ranker has all its figures


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = (
        "Evaluate trained models: hit rate, NDCG and MRR of each user's last item among the full catalogue, or AUC, "
        "AUC within requests, normalised entropy and accuracy of the trace's last requests. Figures have 95% "
        "intervals over users, baselines beside them, and the loss against the same model in fp32. The words of "
        "`grbench train` evaluate what it trained: without an engine the task is rank unless task= says another, and "
        "without weights the latest fitting training under outputs/, or in out=FOLDER, gives them."
    )
    examples = [
        "evaluate out=outputs/ranker",
        "evaluate engine=hstu model.weights=outputs/ranker/weights.safetensors 'model.tasks=[rated,liked]'",
        "evaluate engine=hstu task=generate retrieval.levels=1 retrieval.weights=outputs/items/weights.safetensors",
        "evaluate -m task=generate retrieval.beam_width=32,128 out=outputs/ids",
    ]
    parser = Arguments("evaluate", about, examples, "overrides as in `grbench` or `grbench train`")
    parser.add_argument("--multirun", "-m", action="store_true", help="evaluate every combination of a sweep")
    parser.add_argument("--users", type=int, default=0, help="users who are asked about, by the seed (default: all)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write every figure to results.json there")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 done, 1 a configuration cannot run here, 2 the input cannot be used."""
    args = parser().parse_intermixed_args(words)
    if args.users < 0:
        raise CommandError(f"--users {args.users}: allowed is >= 0")
    if args.out:
        require_writable(args.out, f"--out {args.out}", "give")
    prepare_hydra()
    run_words, wanted = as_run(args.overrides)
    _, jobs = plan_jobs("config", to_spec, run_words, args.multirun, args.config_dir, partial(_say, "grbench evaluate"))
    from grengines.api import UnavailableError
    from grengines.numerics import IncorrectError

    common = set.intersection(*(set(job.overrides) for job in jobs))
    facts = {"kind": "evaluate", **results.origin(["python", "-m", "grbench", "evaluate", *words])}
    found: list[tuple[str, Evaluation]] = []
    code = 0
    try:
        with tempfile.TemporaryDirectory() as folder:  # for what the configurations share
            for job in jobs:
                name = " ".join(word for word in job.overrides if word not in common) or job.config[0].engine.name
                try:
                    evaluation = _evaluated(name, job, wanted, args.users, Path(folder))
                    with signals.deferred():
                        found.append((name, evaluation))
                        if args.out:
                            results.save(args.out, facts, [_row(*one) for one in found])
                except UnavailableError as e:
                    _say(name, f"UNAVAILABLE: {e}")
                    code = 1
                except (ValueError, OSError, IncorrectError) as e:
                    raise e if isinstance(e, CommandError) else CommandError(" ".join(str(e).split())) from e
    except KeyboardInterrupt:
        lost = "the rest is lost, and the same command evaluates all again"
        _say("grbench evaluate", f"interrupted with {len(found)} of {len(jobs)} configurations done; {lost}")
        raise
    finally:  # what is done is shown, whatever ends the rest
        if found:
            print(_page(found))
            if args.out:
                _say("every figure", args.out / results.RESULTS_FILE)
    return code


def _evaluated(name: str, job: Job, wanted: Wanted, users: int, folder: Path) -> Evaluation:
    """Evaluate one configuration. folder: has the reference's answers of those before."""
    from grbench.quality.evaluate import evaluate
    from grbench.quality.references import References

    spec, run = job.config
    spec, lines = with_trained(spec, wanted, Path(run.runner.output_root), job.overrides)
    for line in lines:
        _say(name, line)
    screen = Console(stderr=True)
    references = References.of_process(folder)
    return evaluate(spec, users, references, partial(_say, name), lambda what: watch(screen, f"{name}: {what}"))


def _say(name: str, line: object) -> None:
    print(f"{name}: {line}", file=sys.stderr, flush=True)


def _row(name: str, evaluation: Any) -> dict[str, Any]:
    """Return an evaluation as a row of results.json."""
    figures = {f"quality/{key}": e for key, e in evaluation.figures.items()}
    figures |= {f"quality/loss/{key}": e for key, e in evaluation.losses.items()}
    for baseline, its in evaluation.baselines.items():
        figures |= {f"quality/{baseline}/{key}": e for key, e in its.items()}
    return {
        "cell": name,
        "users": evaluation.users,
        "requests": evaluation.requests,
        "seconds": evaluation.seconds,
        "device": evaluation.actual.get("device"),
        "precision": evaluation.actual.get("precision"),
        "metrics": {key: e.value for key, e in figures.items()},
        "intervals": {key: e.interval for key, e in figures.items()},
    }


def _page(found: list[tuple[str, Any]]) -> str:
    """Return the table of the figures with intervals, baselines below them, and a sentence for each loss."""
    first = found[0][1]
    every = dict.fromkeys(figure for _, evaluation in found for figure in evaluation.figures)
    names = [name for name in SHOWN if name in every] or list(every)
    lines = [(name, evaluation.figures) for name, evaluation in found]
    baselines: dict[str, dict[str, Any]] = {}
    for _, evaluation in found:  # one with short answers has fewer figures
        for baseline, its in evaluation.baselines.items():
            baselines[baseline] = its | baselines.get(baseline, {})
    lines += list(baselines.items())
    rows = [[name, *(_text(its.get(figure)) for figure in names)] for name, its in lines]
    parts = [f"{first.requests:,} requests of {first.users:,} users; 95% intervals over users in brackets."]
    parts += [f"{name}: {note}" for name, evaluation in found for note in evaluation.notes]
    parts.append(table(["configuration", *names], rows))
    for name, evaluation in found:
        where = f"{evaluation.actual.get('device')}, {evaluation.actual.get('precision')}"
        parts.append(f"{name}: answered in {evaluation.seconds:.1f} s ({where})")
        parts += [f"{name}: {evaluation.statement(figure)}" for figure in names if figure in evaluation.losses]
        parts += [f"{name}: {line}" for line in evaluation.no_better(names)]
    return "\n\n".join(parts)


def _text(estimate: Any) -> str:
    return "" if estimate is None else f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"
