"""The space of a search: its options and values, and the configurations that can be.

A combination is left out before anything runs, with the reason, if its configuration is refused, if its engine
refuses its device, precision, cache or kernels, or if its weights are another model's (legal.py). An option that an
engine does not have, such as `engine.cuda_graphs` of onnxruntime, is left out of that engine's configurations, and so
is a value that its option does not take, such as `engine.cuda_graphs=auto` of tensorrt.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grbench.config.compose import compose_many, explain
from grbench.config.schema import ConfigError, RunConfig, RunSpec, checked, spec_of
from grbench.config.unread import idle_words, unread
from grbench.tune import legal
from grbench.tune.outcome import Configuration
from grengines.options import violations

MOST = 20_000  # combinations that are checked one by one, without options that their engine or cache lacks
NO_KEY = ": no such key; "
Axes = Mapping[str, Sequence[str]]


@dataclass
class Space:
    """The configurations of a search, the default first, and why others are left out: reason, count."""

    axes: Axes
    configurations: list[Configuration]
    specs: dict[Configuration, RunSpec] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)


def build(axes: Axes, typed: Collection[str], fixed: Sequence[str], config_dir: str | None = None) -> Space:
    """Return the space of options `axes` of runs with the overrides `fixed`. Raises ConfigError for an empty one.

    typed: the options of the space that must be used; others are dropped where no configuration has them. The default
    configuration has the value of each option that a run without it has, or the option's first.
    """
    empty = [key for key, values in axes.items() if not values]
    if empty:
        raise ConfigError(f"{empty[0]}: the space has no value of it; give at least one")
    total = math.prod(len(values) for values in axes.values())
    groups = {key: values for key, values in axes.items() if _is_group(key)}
    options = {key: values for key, values in axes.items() if key not in groups}
    each = math.prod(len(values) for values in options.values())  # combinations of options for one of groups
    _refuse_too_many(total // each * max(map(len, options.values()), default=1))  # before any of them is composed
    combinations = [list(zip(groups, values, strict=True)) for values in itertools.product(*groups.values())]
    words = [[*fixed, *(f"{key}={value}" for key, value in combination)] for combination in combinations]
    left_out: Counter[str] = Counter()
    composed: list[str] = []  # overrides of a combination that can be composed
    known: set[str] = set()  # options that some combination has
    taken: set[tuple[str, str]] = set()  # options with a value that some combination takes
    refused: dict[tuple[str, str], str] = {}  # why a combination does not
    in_range: set[tuple[str, str]] = set()  # those whose value is in range in some configuration
    read: set[str] = set()  # fixed overrides and options that some configuration reads
    idle: dict[str, str] = {}  # those that one does not read, with the line that refuses them
    found: dict[Configuration, tuple[RunSpec, RunConfig]] = {}
    chosen: list[tuple[list[tuple[str, str]], dict[str, dict[str, Any]], RunConfig]] = []  # with their options
    for combination, its, cfg in zip(combinations, words, compose_many(words, config_dir), strict=True):
        if isinstance(cfg, str):
            if "no such option" in cfg:  # a misspelt name
                raise ConfigError(cfg)
            left_out[cfg] += each
            continue
        composed = composed or its
        known |= {key for key in options if _has(cfg, key)}
        try:
            run = checked(cfg, RunConfig)
        except (ConfigError, OmegaConfBaseException) as e:
            left_out[explain(e)] += each
            continue
        mine = {}
        for key, texts in options.items():
            if (typed_values := _typed(cfg, key, texts)) is None:
                continue
            mine[key], wrong = typed_values
            taken |= {(key, text) for text in mine[key]}
            refused |= {(key, text): reason for text, reason in wrong.items()}
            left_out.update(dict.fromkeys(wrong.values(), each // len(texts)))
        chosen.append((combination, mine, run))
    if not chosen and len(left_out) == 1:  # what all of them share is wrong
        raise ConfigError(next(iter(left_out)))
    _refuse_too_many(sum(math.prod(map(len, mine.values())) for _, mine, _ in chosen))
    for combination, mine, run in chosen:
        for configuration, changed in _with_options(combination, mine, run):
            if problem := next(violations(changed), None):
                left_out[problem] += 1
                refused |= {pair: problem for pair in configuration.values if problem.startswith(f"{pair[0]}=")}
                continue
            in_range |= set(configuration.values)
            try:
                lines = idle_words([*fixed, *configuration.words], unread((spec_of(changed), changed)))
                reads, spec = _without_idle(configuration, changed, run)
            except ConfigError as e:
                left_out[str(e)] += 1
                continue
            read |= {word for word in fixed if word not in lines} | {key for key, _ in reads.values}
            idle = {word if word in fixed else _key(word): line for word, line in lines.items()} | idle
            found.setdefault(reads, (spec, run))
    if not composed:
        _fixed_exist(list(left_out))
    elif misspelt := [key for key in options if key in typed and key not in known]:
        [refusal] = compose_many([[*composed, f"{misspelt[0]}={options[misspelt[0]][0]}"]], config_dir)
        if isinstance(refusal, str):  # the line that a run has for it
            raise ConfigError(refusal)
    if never := [reason for value, reason in refused.items() if value not in taken & in_range and value[0] in typed]:
        raise ConfigError(never[0])
    if unused := [line for what, line in idle.items() if what not in read and (what in typed or what in fixed)]:
        raise ConfigError(unused[0])
    reasons = _refused({configuration: spec for configuration, (spec, _) in found.items()})
    left_out.update(reason for reason in reasons.values())
    kept = [configuration for configuration in found if configuration not in reasons]
    if not kept:
        if len(common := set(reasons.values()) or set(left_out)) == 1:
            raise ConfigError(common.pop())
        why = left_out.most_common(1)[0][0] if left_out else "it has no option"
        raise ConfigError(f"the space is empty: none of {total} combinations can run here; most often: {why}")
    _all_used([key for key in axes if key in typed], kept, left_out)
    axes = {key: values for key, values in axes.items() if any(c.get(key) is not None for c in kept)}
    kept.sort(key=lambda configuration: _unlike_default(configuration, axes, found[configuration][1]))
    return Space(axes, kept, {c: found[c][0] for c in kept}, dict(left_out.most_common()))


def _refuse_too_many(count: int) -> None:
    """Raise ConfigError if more combinations are to be checked than can be within a minute."""
    if count > MOST:
        raise ConfigError(
            f"the space has {count:,} combinations, allowed are {MOST:,}; fix an option, or give it fewer values"
        )


def _is_group(key: str) -> bool:
    return "." not in key or "@" in key or "/" in key


def _with_options(
    combination: Sequence[tuple[str, str]], options: Mapping[str, Mapping[str, Any]], run: RunConfig
) -> list[tuple[Configuration, RunConfig]]:
    """Return the configurations of one choice of groups, with every combination of its options' typed values."""
    made = []
    for values in itertools.product(*(pairs.items() for pairs in options.values())):
        changed = copy.deepcopy(run)
        for key, (_, value) in zip(options, values, strict=True):
            owner, _, name = key.rpartition(".")
            setattr(_select(changed, owner), name, copy.copy(value))
        texts = zip(options, (text for text, _ in values), strict=True)
        made.append((Configuration((*combination, *texts)), changed))
    return made


def _without_idle(configuration: Configuration, changed: RunConfig, run: RunConfig) -> tuple[Configuration, RunSpec]:
    """Return a configuration without the options that it does not read, and its cell, where they are as in `run`."""
    values = dict(configuration.values)
    while True:
        spec = spec_of(changed)
        words = [f"{key}={value}" for key, value in values.items() if not _is_group(key)]
        idle = [_key(word) for word in idle_words(words, unread((spec, changed)))]
        if not idle:
            return Configuration(tuple(values.items())), spec
        for key in idle:
            del values[key]
            owner, _, name = key.rpartition(".")
            setattr(_select(changed, owner), name, copy.copy(getattr(_select(run, owner), name)))


def _key(word: str) -> str:
    return word.partition("=")[0]


def _typed(cfg: DictConfig, key: str, values: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Return the values of an option as the configuration holds them, and why it does not take others.

    None if it has no such option.
    """
    if not _has(cfg, key):
        return None
    owner, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, owner)
    found, wrong = {}, {}
    for text in values:
        changed = copy.deepcopy(node)
        try:
            OmegaConf.update(changed, name, OmegaConf.create(f"value: {text}").value)
            found[text] = getattr(OmegaConf.to_object(changed), name)
        except OmegaConfBaseException as e:
            wrong[text] = f"{explain(e)} with {owner}={OmegaConf.select(node, 'name')}"
    return found, wrong


def _has(cfg: DictConfig, key: str) -> bool:
    """Return True if a configuration has an option."""
    owner, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, owner)
    schema = OmegaConf.get_type(node) if node is not None else None
    return dataclasses.is_dataclass(schema) and name in {f.name for f in dataclasses.fields(schema)}


def _select(run: Any, path: str) -> Any:
    for name in path.split("."):
        run = getattr(run, name)
    return run


def _refused(specs: Mapping[Configuration, RunSpec]) -> dict[Configuration, str]:
    """Return the configurations that can't run here, and why. Load and batching play no part in that."""
    alike: dict[str, list[Configuration]] = {}
    for configuration, spec in specs.items():
        values = spec.to_dict()
        parts = [values[group] for group in ("engine", "kernel", "cache", "model", "retrieval")]
        alike.setdefault(json.dumps(parts, sort_keys=True, default=str), []).append(configuration)
    reasons = legal.refusals([specs[some[0]] for some in alike.values()])
    pairs = zip(alike.values(), reasons, strict=True)
    return {configuration: reason for some, reason in pairs if reason for configuration in some}


def _fixed_exist(reasons: Sequence[str]) -> None:
    """Raise ConfigError if every combination is refused because it lacks the same option: a fixed one is misspelt."""
    absent = {reason.partition(NO_KEY)[0] for reason in reasons if NO_KEY in reason}
    if len(absent) == 1 and all(NO_KEY in reason for reason in reasons):
        raise ConfigError(reasons[0])


def _all_used(axes: Sequence[str], kept: Sequence[Configuration], left_out: Mapping[str, int]) -> None:
    """Raise ConfigError for an option that no configuration has: a misspelt one would be searched in silence."""
    for key in axes:
        if not any(configuration.get(key) is not None for configuration in kept):
            why = next((reason for reason in left_out if key in reason), "no engine of the space has it")
            raise ConfigError(f"{key}: no configuration of the space has this option ({why}); leave it out")


def _unlike_default(configuration: Configuration, axes: Axes, run: RunConfig) -> tuple[int, list[int]]:
    """Return a key that sorts the default configuration first, and the others by the order of values."""
    unlike, order = 0, []
    for key, values in axes.items():
        text = configuration.get(key)
        order.append(list(values).index(text) if text is not None else 0)
        if text is None:
            continue
        default = values[0]
        if not _is_group(key):
            value = _select(run, key)
            shown = value if isinstance(value, str) else json.dumps(value)
            default = next((v for v in values if v == shown or _number(v) == _number(shown) is not None), default)
        unlike += text != default
    return unlike, order


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
