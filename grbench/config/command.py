"""Commands that Hydra configures: compose and check every job, run them in order, return one exit code."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra

# Hydra's own parser, which is not public. hydra-core is pinned to 1.3.8, so that this import cannot break unnoticed.
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from grbench.config.arguments import CommandError
from grbench.config.compose import CONFIG_DIR, all_read, explain, help_text, plan_jobs
from grbench.config.jobs import Invocation, Job, Session
from grbench.config.schema import ConfigError
from grbench.execution.folders import new_folder

MODES = ("run", "multirun", "cfg", "info", "shell_completion", "hydra_help")  # flags of Hydra that say what to do


def run(
    program: str,
    words: Sequence[str],
    config_name: str,
    prepare: Callable[[], None],
    check: Callable[[DictConfig], Any],
    new_session: Callable[[Job, Invocation], Session],
    require: Callable[[Sequence[Job]], None] = lambda jobs: None,
    unread: Callable[[Any], Mapping[str, str]] = all_read,
) -> int:
    """Run the command `python -m <program> <words>`, whose configuration is conf/<config_name>.yaml.

    prepare: registers its schemas. check: turns a composed configuration into a job's `config` or raises ConfigError.
    new_session: makes the session, given the first job. require: raises ConfigError for jobs that cannot run, before
    anything is written. unread: of `plan_jobs`. Returns the session's exit code. Raises ConfigError for a configuration
    or data that cannot be used, CommandError, and any KeyboardInterrupt after closing the session.
    """
    prepare()
    flags = _flags(program, words)
    if flags.help:
        print(help_text(config_name, flags.overrides, flags.config_dir))
        return 0
    if flags.hydra_help or flags.shell_completion:
        return _ask_hydra(words, flags.overrides, config_name)
    name = flags.config_name or config_name
    asks = bool(flags.cfg or flags.info)  # nothing runs then, and an answer has no other lines
    report = (lambda line: None) if asks else _say
    invocation, jobs = plan_jobs(name, check, flags.overrides, flags.multirun, flags.config_dir, report, unread)
    if asks:
        return _ask_hydra(words, flags.overrides, name)
    for line in invocation.skipped:
        _say(f"left out: {line}")
    require(jobs)
    session: Session | None = None
    try:
        with new_folder(invocation.sweep or jobs[0].folder):
            session = new_session(jobs[0], dataclasses.replace(invocation, words=tuple(words)))
            for job in jobs:
                session.run(job)
            session.finish()
    except CommandError:
        if session is not None:
            session.close(cut_short="stopped")
        raise
    except OSError as e:  # a folder or a file of a session
        if session is not None:
            session.close(cut_short="stopped")
        raise ConfigError(_unwritable(jobs[0].config, e)) from e
    except KeyboardInterrupt:
        if session is not None:
            session.close(cut_short="interrupted")
        raise
    try:
        return session.close()
    except KeyboardInterrupt:  # pictures and MLflow take seconds: the table comes without them
        session.close(cut_short="interrupted")
        raise


def _ask_hydra(words: Sequence[str], overrides: Sequence[str], config_name: str) -> int:
    """Let Hydra answer a flag that runs nothing: --cfg, --info, --hydra-help, --shell-completion."""
    flags = list(words)
    for override in overrides:
        flags.remove(override)
    # hydra.main reads them from there, and takes overrides on one side of the flags only.
    sys.argv = [sys.argv[0], *overrides, *flags]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors; else it prints them over many lines
    try:
        hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name=config_name)(lambda cfg: None)()
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(explain(e)) from e
    return 0


def _unwritable(config: Any, error: OSError) -> str:
    """Return the error line for a folder of a session that cannot be written, with its option as it was typed.

    config: of the first job; a run's is a pair, whose second half has the options that are no part of the RunSpec.
    """
    runner = config[1].runner if isinstance(config, tuple) else None
    option, root = ("runner.output_root", runner.output_root) if runner else ("output_root", config.output_root)
    full = Path(root).resolve()
    failed = Path(error.filename).resolve() if error.filename else full
    if failed.is_relative_to(full) or full.is_relative_to(failed):
        return f"{option}={root}: {error.strerror}; set {option} to a folder with room that can be written"
    where = f"hydra.run.dir, hydra.sweep.dir or {option}"  # who sets Hydra's folders may have them elsewhere
    return f"{os.path.relpath(failed)}: {error.strerror}; set {where} to a folder with room that can be written"


def _say(line: str) -> None:
    print(f"grbench: {line}", file=sys.stderr)


def _flags(program: str, words: Sequence[str]) -> argparse.Namespace:
    """Return Hydra's flags and overrides of a command line. Raises ConfigError."""
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        args, unknown = parser.parse_known_intermixed_args(words)
    except argparse.ArgumentError as e:
        raise ConfigError(f"{e}; python -m {program} --hydra-help lists the flags") from None
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such flag; python -m {program} --hydra-help lists them")
    modes = [f"--{name}".replace("_", "-") for name in MODES if getattr(args, name)]
    if len(modes) > 1:
        raise ConfigError(f"{' '.join(modes)}: only one of them at a time; leave the others out")
    if args.config_path or args.experimental_rerun:
        flag = "--config-path" if args.config_path else "--experimental-rerun"
        raise ConfigError(f"{flag}: not taken here; --config-dir FOLDER adds your own YAML files")
    if (args.resolve or args.package) and not args.cfg:
        flag = "--resolve" if args.resolve else "--package"
        raise ConfigError(f"{flag}: it needs --cfg job; give both")
    return args
