"""Measured losses of a deployment's steps: each from two records that answered the same users.

One record has the options of the deployment's first strategy. The other differs from it by what the step changes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grbench.config.arguments import replaced
from grbench.config.schema import ConfigError, RunSpec
from grbench.deployment import Deployment, Step
from grbench.execution.gpu import visible_gpus
from grbench.execution.records import RunRecord
from grbench.report.cells import Cell, shown
from grbench.report.groups import Row
from grbench.report.tradeoffs import CANDIDATES, FIGURES, POPULAR, Point, change, points
from grbench.report.work import by_content, options_of
from grengines import registry
from grengines.overrides import override

WINDOW, AGE, SCORED = "workload.max_history", "workload.stale_events", CANDIDATES["rank"]
# Options of engine and cache: a plan or an ONNX file may be of 8 bits, and another engine answers as `fallback`.
DECIDING = ("name", "precision", "kv_cache_precision", "calibration", "plan", "onnx", "fallback")

ALLOW = "gate.allow_loss=[fp16,bf16,int8,fp8]"  # the loss is what a record measures
EVENTS = 4  # that an old state lacks, in a command

Options = dict[str, str]
Measured = Sequence[tuple[Point, Options]]


def options_of_spec(spec: RunSpec) -> dict[str, Any]:
    """Return a strategy's options by dotted key, files by content, and for a precision `auto` what it is here.

    Raises OSError for a file that can't be read.
    """
    return by_content(spec.to_dict(), spec.file_contents()) | automatic(spec)


def automatic(spec: RunSpec) -> dict[str, str]:
    """Return the precision here of each option that leaves it to the engine, by its key."""
    options, here = by_content(spec.to_dict(), {}), registry.precisions_of(spec.engine, bool(visible_gpus()))
    return {key: here[key] for key in _automatic(options)}


def _automatic(options: Mapping[str, Any]) -> list[str]:
    return [key for key, value in options.items() if value == "auto" and key.endswith(".precision")]


def with_losses(
    deployment: Deployment, options: Mapping[str, Mapping[str, Any]], cells: Sequence[Cell], folder: str | Path
) -> list[Step]:
    """Return the steps with their losses, the 95% intervals of these, and the record that each is from.

    options: of each strategy, by its name (`options_of_spec`). folder: of the records. Of several records that match,
    such as states of several ages, the one that loses most counts. A step that no record matches keeps the loss that
    was typed. Raises ConfigError if it has none: one line with the record that is lacking and the command that makes
    it.
    """
    rows = [Row(0, "", record, folder) for folder, record in cells if record.spec.get("task") == deployment.task]
    measured = [(point, _decisive(_that_ran(point.row.record))) for point in points(rows)]
    decisive = {name: _decisive(its) for name, its in options.items()}
    cheaper = {step.strategy for step in deployment.degrade}
    names = [strategy.name for strategy in deployment.strategies]
    first = next((name for name in names if name not in cheaper), names[0])
    overrides = {strategy.name: strategy.overrides for strategy in deployment.strategies}

    def make(strategy: str, *changed: str, like: Sequence[Point] = ()) -> str:
        """Return the command that makes a record. like: those that it is to be compared with."""
        root = override("runner.output_root", str(folder))
        words = [f"task={deployment.task}", "scenario=offline", ALLOW, root, *changed]
        if like:
            spec = like[0].row.record.spec
            words += [f"gate.quality_requests={spec['gate']['quality_requests']}", f"seed={spec['seed']}"]
        own = ["--config-dir", deployment.config_dir] if deployment.config_dir else []
        command = shlex.join(["python", "-m", "grbench", *own, *replaced(overrides[strategy], words)])
        return f"; make it: {command}; or type the loss into the file"

    steps = []
    for number, step in enumerate(deployment.degrade):
        try:
            steps.append(_with_loss(step, first, decisive, measured, make))
        except ConfigError as e:
            if not step.loss or step.record:
                raise ConfigError(f"degrade[{number}] ({step.name}): {e}") from None
            steps.append(step)
    return steps


def _with_loss(
    step: Step, first: str, decisive: Mapping[str, Options], measured: Measured, make: Callable[..., str]
) -> Step:
    """Return a step with its loss. Raises ConfigError if no record matches."""
    base = decisive[first]
    for name in dict.fromkeys((first, step.strategy or first)):
        if not any(key.endswith(".weights") for key in decisive[name]):
            option = "retrieval.weights" if base["task"] == "generate" else "model.weights"
            raise ConfigError(
                f"strategy {name} has random weights, which have no quality; add {option}=FILE to its overrides"
            )
    name = next(iter(POPULAR if step.max_candidates else FIGURES[base["task"]]))
    measured = [(point, its) for point, its in measured if name in point.drawn]
    bases = [point for point, its in measured if its == base]
    if not bases:
        raise ConfigError(f"no record has the options of strategy {first}{_nearest(base, measured)}{make(first)}")
    if step.stale_state:
        changed = [point for point, its in measured if AGE in its and base != its == base | {AGE: its[AGE]}]
        missing = f"no record has strategy {first} with {AGE} > 0{make(first, f'{AGE}={EVENTS}', like=bases)}"
    else:
        key, value = (SCORED, step.max_candidates) if step.max_candidates else (WINDOW, step.max_history)
        wanted = decisive[step.strategy] if step.strategy else base | {key: shown(value)}
        changed = [point for point, its in measured if its == wanted]
        if step.max_candidates and step.max_candidates >= int(base[key]):
            raise ConfigError(
                f"it leaves out none of the candidates of strategy {first}, which has {key}={base[key]}; set that to "
                "the candidates that clients send, leave the step out, or type the loss into the file"
            )
        if wanted == base or (value or 0) > int(base[key]):
            raise ConfigError(
                f"it changes no option of strategy {first} that decides answers, so no record measures a loss; leave "
                "the step out, or type the loss into the file"
            )
        what = f"strategy {step.strategy}" if step.strategy else f"strategy {first} with {key}={value}"
        word = [] if step.strategy else [f"{key}={value}"]
        missing = f"no record has {what}{_nearest(wanted, measured)}{make(step.strategy or first, *word, like=bases)}"
    pairs = [(b, point) for b in bases for point in changed if _comparable(b, point)]
    if not pairs:
        raise ConfigError(missing)
    changes = [(change(b, point, name), point.row.folder) for b, point in pairs]
    lost, folder = min(changes, key=lambda pair: pair[0].value)
    figure = f"{name}_loss"
    return replace(
        step,
        loss={figure: _loss(lost.value)},
        intervals={figure: [_loss(lost.high), _loss(lost.low)]},
        record=str(Path(folder).absolute()),  # the file may be served from another folder
    )


def _loss(change: float) -> float:
    """Return a change as a loss, with no sign at 0."""
    return round(-change, 6) + 0.0


def _that_ran(record: RunRecord) -> dict[str, Any]:
    """Return a record's options, with the precision that ran for `auto`, which the device decides."""
    options = options_of(record)
    for key in _automatic(options):
        part: Mapping[str, Any] = record.actual
        for stage in key.split(".")[1:-1]:
            part = part[stage]
        options[key] = part["precision"]
    return options


def _decisive(options: Mapping[str, Any]) -> Options:
    """Return the options that decide an answer's quality: no device, batch or memory, and of kernels fp8 alone.

    A value that is null, false or zero, or pages as the engine computes, counts as absent, because records may be older
    than the option.
    """
    found = {"cache.precision": "engine"}
    if (options.get("kernel.hstu_attention") or options.get("kernel")) == "fp8":  # the other variants are as exact
        found["kernel.hstu_attention"] = "fp8"
    for key, value in options.items():
        group, own = key.partition(".")[0], key.rpartition(".")[2]
        decides = key == "engine" or (group in ("engine", "cache") and own in DECIDING)
        nothing = value in (None, False, 0, "", []) or (own == "kv_cache_precision" and value == "engine")
        if (decides or group in ("task", "model", "retrieval", "workload")) and not nothing:
            found[key] = shown(value)
    return found


def _nearest(wanted: Options, measured: Measured) -> str:
    """Return what the nearest record has instead, for a message."""
    differences = [
        [f"{key}={its.get(key, 'null')} instead of {wanted.get(key, 'null')}" for key in sorted({*its, *wanted})
         if its.get(key) != wanted.get(key)]
        for _, its in measured
    ]  # fmt: skip
    if not differences:
        return ": none has the task, figures of quality and their resamples"
    least = min(differences, key=len)
    return f"; the nearest of them has {', '.join(least[:3])}{' and more' if len(least) > 3 else ''}"


def _comparable(base: Point, point: Point) -> bool:
    """Return whether both are of the same users and events."""

    def users(record: RunRecord) -> list[Any]:
        its = {k: v for k, v in options_of(record).items() if k.startswith("workload")}
        same = {k: v for k, v in its.items() if k not in (WINDOW, AGE, SCORED)}
        return [same, record.spec.get("seed"), record.spec["gate"]["quality_requests"]]

    return users(base.row.record) == users(point.row.record)
