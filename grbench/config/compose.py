"""Composition of configurations with Hydra, and one-line errors for wrong ones."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, TypeVar

from hydra import initialize_config_dir

# Hydra's own sweeper, which is not public: no other code expands a sweep exactly as Hydra does. hydra-core is pinned to
# 1.3.8, so this import cannot break unnoticed.
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    InterpolationValidationError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from grbench.config import malformed
from grbench.config.composition import compose, study_files
from grbench.config.jobs import Invocation, Job
from grbench.config.schema import (
    ConfigError,
    RunConfig,
    RunSpec,
    checkout_or_packaged,
    no_such_key,
    register_schemas,
    schemas,
    to_spec,
    unresolved,
)
from grbench.config.unread import idle_words, unread
from grbench.execution.clock import SILENCE_S, at_most_every, pace
from grbench.subcommands import summaries
from grengines.options import allowed_instead, describe, names_user, user_refused
from grengines.overrides import as_it_stands, quoted
from grkernels.nearest import nearest

CONFIG_DIR = str(checkout_or_packaged("conf"))
# Options of the whole command: a session has one value of each, so a sweep over them would use the first.
ONE_VALUE = re.compile(
    r"\+*((runner\.)?output_root|runner\.(repeats|print|keep_engine|parallel|cluster)|slurm\..*"
    r"|rerun|rerun_failed|skip_invalid|tracking.*)$"
)
Checked = TypeVar("Checked")


def prepare_hydra() -> None:
    """Register the schemas, the folder of studies and the resolvers that files in conf/ use. Safe to call twice."""
    register_schemas()
    OmegaConf.register_new_resolver("grbench_subcommands", summaries, replace=True)


def all_read(config: Any) -> dict[str, str]:
    """Take every option as read, so that any may be set: instead of `unread`."""
    return {}


def compose_spec(
    overrides: Sequence[str], config_dir: str | None = None, refuse_unread: bool = False
) -> tuple[RunSpec, RunConfig]:
    """Compose one cell from Hydra overrides. Raises ConfigError.

    config_dir: folder of the user's own YAML files. refuse_unread: refuse options that the cell does not read, for
    overrides that a user typed.
    """
    prepare_hydra()
    refused = unread if refuse_unread else all_read
    return compose_jobs("config", to_spec, overrides, config_dir=config_dir, unread=refused)[0]


def compose_jobs(
    config_name: str,
    check: Callable[[DictConfig], Checked],
    overrides: Sequence[str],
    multirun: bool = False,
    config_dir: str | None = None,
    unread: Callable[[Any], Mapping[str, str]] = all_read,
) -> list[Checked]:
    """Return `check(cfg)` for every job of a command line; see `plan_jobs`. Raises ConfigError."""
    return [job.config for job in plan_jobs(config_name, check, overrides, multirun, config_dir, unread=unread)[1]]


def compose_many(combinations: Sequence[Sequence[str]], config_dir: str | None = None) -> list[DictConfig | str]:
    """Compose runs, unchecked: of each combination of overrides its configuration, or why there is none."""
    prepare_hydra()
    extra = _search_path(config_dir)
    found: list[DictConfig | str] = []
    try:
        with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
            for words in combinations:
                try:
                    cfg = _compose("config", [*words, *extra])
                    with open_dict(cfg):
                        del cfg["hydra"]
                    found.append(cfg)
                except (ConfigError, HydraException, OmegaConfBaseException) as e:
                    found.append(explain(e))
    finally:
        GlobalHydra.instance().clear()
    return found


def choices(overrides: Sequence[str], config_dir: str | None = None) -> dict[str, str]:
    """Return the option that each group has in a run, by the key that overrides it. Raises ConfigError."""
    prepare_hydra()
    try:
        with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
            found = _compose("config", [*overrides, *_search_path(config_dir)]).hydra.runtime.choices
            return {str(key): str(name) for key, name in found.items() if name is not None}
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(explain(e)) from None
    finally:
        GlobalHydra.instance().clear()


def axes_of(overrides: Sequence[str], config_dir: str | None = None) -> tuple[dict[str, list[str]], list[str]]:
    """Return the options that overrides give several values, with those of a study's sweep, and the other overrides.

    Raises ConfigError.
    """
    prepare_hydra()
    _refuse_users_in_urls(overrides)
    extra = _search_path(config_dir)
    try:
        with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            words = [str(word) for word in overrides]
            parsed = parser.parse_overrides(words)
            swept: list[str] = []
            if any(o.key_or_group == "study" for o in parsed):
                single = [str(o.input_line) for o in parsed if o.key_or_group == "study"]
                params = _compose("config", [*single, *extra]).hydra.sweeper.params or {}
                typed = {_typed_key(o) for o in parsed}
                swept = [f"{key}={value}" for key, value in params.items() if key not in typed]
                words += ["hydra.mode=RUN"]
            axes: dict[str, list[str]] = {}
            for override in parser.parse_overrides([*swept, *overrides]):
                if override.is_sweep_override():
                    axes[_typed_key(override)] = [word.partition("=")[2] for word in _words_of(override)]
            several = {str(o.input_line) for o in parsed if o.is_sweep_override()}
            return axes, [word for word in words if word not in several]
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(explain(e)) from None
    finally:
        GlobalHydra.instance().clear()


def set_by_study(keys: Collection[str], overrides: Sequence[str], config_dir: str | None = None) -> dict[str, str]:
    """Return what a study of these overrides gives these keys, in its files or by its sweep; several as "1,2".

    Raises ConfigError.
    """
    if not any(word.startswith("study=") for word in overrides):
        return {}
    axes, fixed = axes_of(overrides, config_dir)
    cases = [f"{key}={value}" for key, values in axes.items() if key.startswith("study/") for value in values]
    extra, found = _search_path(config_dir), {key: axes.get(key, []) for key in keys}
    try:
        with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
            for words in ([], *([case] for case in cases)):
                for file in study_files("config", [*fixed, *words, *extra]):
                    for key in keys:
                        found[key] += _value_in(file, key)
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(explain(e)) from None
    finally:
        GlobalHydra.instance().clear()
    return {key: ",".join(dict.fromkeys(values)) for key, values in found.items() if values}


def _value_in(file: DictConfig, key: str) -> list[str]:
    """Return the value that a file has for a key, as it stands; [] if it has none."""
    node: Any = OmegaConf.to_container(file)
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return [] if node is None else [str(node)]


def _words_of(override: Override) -> list[str]:
    """Return an override for each value of one of a sweep. Raises ConfigError for an interval, which lists none."""
    if not override.is_discrete_sweep():
        key = override.key_or_group
        raise ConfigError(
            f"{override.input_line}: an interval has no list of values; allowed are {key}=VALUE,VALUE, "
            f"'{key}=range(FIRST,END,STEP)' and '{key}=choice(VALUE,VALUE)'"
        )
    [batch] = BasicSweeper.split_arguments([override], None)
    return [word for [word] in batch]


def _typed_key(override: Override) -> str:
    """Return the key of an override with the place that a group is put at, such as engine@engine.rank."""
    return override.key_or_group + (f"@{override.package}" if override.package else "")


def plan_jobs(
    config_name: str,
    check: Callable[[DictConfig], Any],
    overrides: Sequence[str],
    multirun: bool = False,
    config_dir: str | None = None,
    report: Callable[[str], None] = lambda line: None,
    unread: Callable[[Any], Mapping[str, str]] = all_read,
) -> tuple[Invocation, list[Job]]:
    """Compose and check every job of a command line. Raises ConfigError if one of them cannot be.

    The configuration is conf/<config_name>.yaml, and a job's `config` is what `check` makes of it. `multirun` and
    `config_dir` are Hydra's flags of that name; a study can ask for a sweep as well. With `skip_invalid=true` the
    combinations of a sweep that cannot be are left out, and named in `Invocation.skipped`. An option that some of them
    lack, as cache=none lacks cache.memory_gb, is left out of those. report: takes a line that says so, and one now and
    then, because hundreds of combinations take a minute.
    """
    _refuse_users_in_urls(overrides)
    extra = _search_path(config_dir)
    try:
        with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
            base, combinations = _expand(config_name, list(overrides), extra, multirun)
            if combinations is None:
                job = _job(base, check, Path(base.hydra.run.dir).absolute())
                if lacks := idle_words(job.overrides, unread(job.config)):
                    raise ConfigError(next(iter(lacks.values())))
                invocation, jobs = Invocation(tuple(overrides), 1, None), [job]
            else:
                invocation, jobs = _plan_sweep(config_name, check, overrides, extra, base, combinations, report, unread)
            own = Path(config_dir).absolute() if config_dir else None
            return dataclasses.replace(invocation, config_dir=own), jobs
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(explain(e)) from None
    finally:
        GlobalHydra.instance().clear()


def _refuse_users_in_urls(words: Sequence[str]) -> None:
    """Raise ConfigError for a URL with a user before another error repeats the password, as one of grammar does."""
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key in ("engine.url", "engine.more_urls") and names_user(value):
            raise ConfigError(user_refused(key))


def _expand(
    config_name: str, overrides: list[str], extra: list[str], multirun: bool
) -> tuple[DictConfig, list[list[str]] | None]:
    """Return a configuration with Hydra's own part, and the overrides of each job of a sweep, as Hydra expands them.

    Of a single run it is the run's configuration, and the list is None. Of a sweep it lacks the keys of groups, since a
    key may exist only in the options that are swept over.
    """
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    parsed = parser.parse_overrides(overrides)  # its error names the wrong override
    if unnamed := next((o.input_line for o in parsed if not o.key_or_group), None):
        raise ConfigError(malformed.problem(unnamed, ""))
    mode = next((o.value() for o in parsed if o.key_or_group == "hydra.mode"), None)
    studied = mode is None and any(o.key_or_group == "study" for o in parsed)  # a study may ask for a sweep
    may_sweep = multirun or studied or mode not in (None, "RUN")
    general = [
        str(o.input_line)
        for o in parsed
        if not o.is_sweep_override() and ("." not in o.key_or_group or o.key_or_group.startswith("hydra."))
    ]
    base = _compose(config_name, [*(general if may_sweep else overrides), *extra])
    if multirun or base.hydra.mode is RunMode.MULTIRUN:
        swept = [f"{key}={value}" for key, value in (base.hydra.sweeper.params or {}).items()]
        every = parser.parse_overrides(swept + overrides)
        for override in every:
            if override.is_sweep_override() and not _words_of(override):
                raise ConfigError(
                    f"{override.input_line}: it has no value; give at least one, {override.key_or_group}=..."
                )
        batches = BasicSweeper.split_arguments(every, None)
        return base, [job for batch in batches for job in batch]
    return (_compose(config_name, [*overrides, *extra]) if general != overrides and may_sweep else base), None


def _plan_sweep(
    config_name: str,
    check: Callable[[DictConfig], Any],
    overrides: Sequence[str],
    extra: list[str],
    base: DictConfig,
    combinations: list[list[str]],
    report: Callable[[str], None],
    unread: Callable[[Any], Mapping[str, str]],
) -> tuple[Invocation, list[Job]]:
    """Compose each combination and check it by itself."""
    common = set.intersection(*map(set, combinations))
    _refuse_options_of_the_session(word for words in combinations for word in words if word not in common)
    folder: Path | None = None
    planned: list[tuple[int, Job, dict[str, str]]] = []  # combinations that can be, with what they lack
    refused: dict[int, str] = {}
    had: set[str] = set()  # keys that some combination has
    partial: set[tuple[str, ...]] = set()  # what made the combinations that lack something
    begun, total = time.monotonic(), len(combinations)
    say = at_most_every(SILENCE_S, report)
    for number, words in enumerate(combinations):
        took = pace(time.monotonic() - begun, number, total)
        say(f"{number} of {total} configurations are checked, {took}; none runs before all are")
        lacks: dict[str, str] = {}
        try:
            while True:
                cfg = _compose_without(config_name, words, extra, lacks)
                kept = tuple(word for word in words if word not in lacks)
                folder = folder or Path(cfg.hydra.sweep.dir).absolute()  # it carries the time, so it is read once
                job = _job(cfg, check, folder / str(number))
                if not (idle := idle_words(kept, unread(job.config))):
                    break
                lacks.update(idle)
            had.update(map(_key, kept))
            if kept not in partial:  # else only an option that it lacks makes it another
                planned.append((number, job, lacks))
            if lacks:
                partial.add(kept)
        except (ConfigError, HydraException, OmegaConfBaseException) as e:
            refused[number] = explain(e)
            had.add(str(getattr(_cause(e), "full_key", "")))  # it is there, with a wrong value
    nowhere = {number: next((lacks[w] for w in lacks if _key(w) not in had), None) for number, _, lacks in planned}
    refused |= {number: why for number, why in nowhere.items() if why is not None}
    planned = [one for one in planned if one[0] not in refused]
    own = [" ".join(word for word in words if word not in common) for words in combinations]
    named = [(own[number], refused[number]) for number in sorted(refused)]
    if named and not (planned and base.get("skip_invalid")):
        raise ConfigError(_refusal(named, total, "skip_invalid" in base))
    without: dict[str, dict[str, None]] = {}  # an option, and the choices that lack it
    for number, _, lacks in planned:
        for word in lacks:
            without.setdefault(_key(word), {})[_chosen(word, combinations[number], common)] = None
    for key, choices in without.items():
        report(f"{key}: {', '.join(choices)} does not read it and runs without it; the other combinations use it")
    jobs = [job for _, job, _ in planned]
    shared = frozenset(common) if len(jobs) > 1 else frozenset[str]()
    return Invocation(tuple(overrides), len(jobs), folder, tuple(map(_named, named)), common=shared), jobs


def _compose_without(config_name: str, words: list[str], extra: list[str], lacks: dict[str, str]) -> DictConfig:
    """Compose a combination without the overrides whose options it does not have.

    lacks: takes these overrides, each with the line that refuses it. Raises for any other error of `_compose`.
    """
    while True:
        kept = [word for word in words if word not in lacks]
        try:
            return _compose(config_name, [*kept, *extra])
        except (HydraException, OmegaConfBaseException) as e:
            absent = _absent_key(e)
            its = [word for word in kept if absent and f"{_key(word)}.".startswith(f"{absent}.")]
            if not its:
                raise
            lacks.update(dict.fromkeys(its, explain(e)))


def _absent_key(error: BaseException) -> str:
    """Return the key that an error says a configuration does not have; "" for another error."""
    cause = _cause(error)
    if stage := re.match(r"Could not override '(\w+@[^']+)'", str(cause)):  # engine@engine.rank of engine=hstu
        return stage[1]
    key, schema = str(getattr(cause, "full_key", None) or ""), getattr(cause, "object_type", None)
    if "." not in key or not dataclasses.is_dataclass(schema):
        return ""
    return "" if key.rpartition(".")[2] in {f.name for f in dataclasses.fields(schema)} else key


def _key(word: str) -> str:
    return word.partition("=")[0]


def _chosen(word: str, words: Sequence[str], common: Collection[str]) -> str:
    """Return the choice by which a combination lacks the option of an override, such as cache=none."""
    own = [other for other in words if other not in common and other != word]
    group = re.split("[.@]", _key(word))[0]
    return " ".join([other for other in own if _key(other).partition("@")[0] == group] or own)


def _refuse_options_of_the_session(swept: Iterator[str]) -> None:
    """Raise ConfigError for an override of a sweep that the whole command has only one value of."""
    for word in swept:
        if ONE_VALUE.fullmatch(key := word.lstrip("+").partition("=")[0]):
            raise ConfigError(
                f"{word}: {key} is an option of the whole sweep, so its cells can't differ in it; "
                "give one value, and run the command again for another"
            )


def _refusal(refused: list[tuple[str, str]], total: int, can_skip: bool) -> str:
    """Return the line for a sweep with combinations that cannot be."""
    if len(refused) == total:
        causes = {why for _, why in refused}
        return causes.pop() if len(causes) == 1 else _named(refused[0])
    count = f"{len(refused)} of {total} combinations can't be"
    return f"{_named(refused[0])}; {count}" + (", and skip_invalid=true leaves them out" if can_skip else "")


def _named(refused: tuple[str, str]) -> str:
    combination, why = refused
    return why if why.startswith(f"{combination}:") else f"{combination}: {why}"


def _job(cfg: DictConfig, check: Callable[[DictConfig], Any], folder: Path) -> Job:
    typed: Any = OmegaConf.to_container(cfg.hydra.overrides.task)  # as they stand, `${` too
    with open_dict(cfg):
        del cfg["hydra"]
    return Job(check(cfg), folder, tuple(typed))


def help_text(config_name: str, overrides: Sequence[str], config_dir: str | None = None) -> str:
    """Return what --help prints, by the template in conf/. Raises ConfigError.

    Hydra's own takes seconds, because it copies every schema for each group that it lists.
    """
    try:
        with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
            cfg = _compose(config_name, [*overrides, *_search_path(config_dir)])
            loader: Any = GlobalHydra.instance().config_loader()
            if config_dir:
                loader.config_search_path.append("--config-dir", f"file://{Path(config_dir).absolute()}")
                loader.repository.initialize_sources(loader.config_search_path)
            options = dict(_groups(loader.repository))
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(explain(e)) from None
    finally:
        GlobalHydra.instance().clear()
    template = Template(cfg.hydra.help.template)
    with open_dict(cfg):
        del cfg["hydra"]
    groups = "".join(f"{group}: {', '.join(options[group])}\n" for group in sorted(options))
    return template.substitute(APP_CONFIG_GROUPS=groups, CONFIG=OmegaConf.to_yaml(cfg))


def _groups(repository: Any, parent: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield each group of grbench's own below `parent`, and its options."""
    for name in repository.get_group_options(parent, ObjectType.GROUP):
        group = f"{parent}/{name}".lstrip("/")
        if group == "hydra":
            continue
        if options := sorted(repository.get_group_options(group, ObjectType.CONFIG)):
            yield group, options
        yield from _groups(repository, group)


def _search_path(config_dir: str | None) -> list[str]:
    """Return the override that adds the user's folder. Raises ConfigError where there is none."""
    if not config_dir:
        return []
    if not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    # This replaces the search path of conf/config.yaml, so it names the folder of studies too.
    folders = [str(Path(config_dir).absolute()), str(checkout_or_packaged("experiments"))]
    return [f"hydra.searchpath=[{','.join(quoted(f'file://{folder}') for folder in folders)}]"]


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    try:
        return compose(config_name, overrides)
    except ValueError as e:  # for a group set to null; Hydra's message does not name it
        raise ConfigError(f"{' '.join(overrides)}: {' '.join(str(e).split())}; every group needs one option") from None


def explain(error: BaseException) -> str:
    """Return one line for any error of composing: the key, what is wrong, what is allowed."""
    if isinstance(error, ConfigError):
        return str(error)
    cause = _cause(error)
    text = " ".join(line.strip() for line in str(cause).splitlines() if line.strip())
    text = re.sub(r"\s*(full_key: \S+|object_type=\w+|reference_type=\S+|Config search path:.*)", "", text)
    if isinstance(error, OverrideParseException):
        why = text.removeprefix(f"Error parsing override '{error.override}' ").partition(" See https")[0]
        return malformed.problem(str(error.override), why)
    if isinstance(cause, MissingConfigException) and cause.options:
        group, _, name = str(cause.missing_cfg_file).rpartition("/")
        return f"{group}={name}: no such option; {nearest(name, cause.options)}allowed: {', '.join(cause.options)}"
    if absent := re.match(r"Could not override '([^']+)'\. No match in the defaults list", text):
        return f"{absent[1]}: this command has no such group of options; leave it out, or see --help"
    if ambiguous := re.match(r"Ambiguous value for argument '([^=]+)=(.*?)' 1\.", text):
        key, values = ambiguous.groups()
        of_list = f", and a key that takes a list has '{key}=[{values}]'" if "." in key else ""
        return f"{key}={values}: several values; -m sweeps over them{of_list}"
    if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
        return text
    if isinstance(cause, GrammarParseError):
        return as_it_stands(cause.full_key, str(cause.value), "no } closes it")
    if isinstance(cause, InterpolationResolutionError) and not isinstance(cause, InterpolationValidationError):
        # hydra.run.dir refers to runner.output_root, which is the one that was typed.
        return unresolved(cause.parent_node._get_root()) or f"{cause.full_key}: {text}"
    return _explain_key(cause, cause.full_key, text)


def _cause(error: BaseException) -> BaseException:
    """Return the first error of those that composing wraps into each other."""
    while error.__cause__ is not None and isinstance(error.__cause__, OmegaConfBaseException | HydraException):
        error = error.__cause__
    return error


def _of_another_option(cause: OmegaConfBaseException, key: str) -> str:
    """Return the error line for a key that other options of its group have, such as cache.memory_gb; else ""."""
    group, _, name = key.partition(".")
    classes = schemas().get(group, {})
    having = [schema for schema, options in classes.items() if name in {f.name for f in dataclasses.fields(options)}]
    based = re.compile(rf"/schema/{group}/({'|'.join(having)})@_here_")
    files = sorted(Path(CONFIG_DIR, group).glob("*.yaml")) if having else []
    others = [file.stem for file in files if based.search(file.read_text())]
    chosen = cause.parent_node.get("name") if isinstance(cause.parent_node, DictConfig) else None
    if not others or not chosen:
        return ""
    either = " or ".join(filter(None, [", ".join(others[:-1]), others[-1]]))
    return f"{key}: {group}={chosen} has no {name}; set {group}={either}, or leave it out"


def _explain_key(cause: OmegaConfBaseException, key: str, text: str) -> str:
    """Return the error line for a key of a node, from the dataclass of the node."""
    if not dataclasses.is_dataclass(cause.object_type):
        return f"{key}: {text}"
    fields = {f.name: f for f in dataclasses.fields(cause.object_type)}
    name = key.rpartition(".")[2]
    if name not in fields:
        return _of_another_option(cause, key) or no_such_key(key, fields)
    if isinstance(cause, MissingMandatoryValue):
        return f"{key}: a value is needed, {key}=...; allowed is {describe(fields[name])}"
    if dataclasses.is_dataclass(fields[name].default_factory):
        return f"{key}={cause.value}: a group of options, not one value; {key}.KEY=... sets one of them"
    is_list = str(fields[name].type).startswith("list[") and isinstance(cause.value, str)
    hint = f"; write '{key}=[{cause.value}]'" if is_list else ""
    return f"{key}={cause.value}: {allowed_instead(fields[name], cause.value)}{hint}"
