"""Options that a cell does not read, because of its other options. A command line that sets one is refused.

Values that come from files of conf/ and of studies may be idle: one file serves several tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from grbench.config.schema import RunConfig, RunSpec, weights_of
from grbench.scenarios.config import is_accuracy
from grbench.workloads.config import DrawnConfig
from grengines.models.hstu.config import HSTUConfig, not_read
from grengines.options import idle


def unread(cell: tuple[RunSpec, RunConfig]) -> dict[str, str]:
    """Return the options and groups of options that a cell does not read, each with the reason and what changes it."""
    spec, run = cell
    return dict([*idle(run), *_of_task(spec), *_of_quality(spec)])


def idle_words(words: Sequence[str], idle: Mapping[str, str]) -> dict[str, str]:
    """Return the overrides of options that are not read, each with the line that refuses it. idle: of `unread`."""
    pairs = [(word, word.partition("=")[0].lstrip("+")) for word in words]
    found = ((word, key) for word, typed in pairs for key in idle if f"{typed}.".startswith(f"{key}."))
    return {word: f"{word}: {idle[key]}" for word, key in found}


def _of_task(spec: RunSpec) -> Iterator[tuple[str, str]]:
    if spec.retrieval is None:
        yield "retrieval", f"task={spec.task} searches for no items; set task=generate, or leave it out"
    elif spec.retrieval.semantic_ids is None and spec.retrieval.levels == 1:
        yield "retrieval.codes", "with retrieval.levels=1 each item is a code; leave it out, or set more levels"
    if isinstance(spec.model, HSTUConfig) and spec.task != "recommend":
        other = {"rank": "generate", "generate": "rank"}[spec.task]
        for name in not_read(spec.task):
            yield f"model.{name}", f"task={spec.task} does not read it; set task={other}, or leave it out"
        if spec.task == "generate":
            yield "model.weights", "task=generate has the weights of retrieval.weights; set that"


def _of_quality(spec: RunSpec) -> Iterator[tuple[str, str]]:
    if is_accuracy(spec.scenario):
        yield "scenario.queries", "scenario.mode=accuracy issues gate.quality_requests; set that"
        return
    if isinstance(spec.workload, DrawnConfig) and spec.task != "rank":  # a ranker is compared with its reference
        why = f"workload={spec.workload.name} has random events; set workload=ml_100k, csv or recbole, or leave it out"
    elif part := next((part for part, file in weights_of(spec).items() if file is None), None):
        why = f"random weights have no quality; set {part}.weights=FILE, or leave it out"
    else:
        return
    if spec.gate.quality_requests:  # 0 asks for none
        yield "gate.quality_requests", why
    yield "gate.allow_loss", why
