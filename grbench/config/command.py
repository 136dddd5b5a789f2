"""Commands that Hydra configures: compose and check every job, run them in order, return one exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import hydra

# Hydra's own parser, which is not public. hydra-core is pinned to 1.3.8, so that this import cannot break unnoticed.
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from grbench.config.compose import CONFIG_DIR, compose_jobs, explain, help_text
from grbench.config.jobs import Invocation, Job, Session
from grbench.config.schema import ConfigError

MODES = ("run", "multirun", "cfg", "info", "shell_completion")  # flags of Hydra that say what to do
SILENCE_S = 15.0  # after which a user wants to know what a command is doing


def run(
    program: str,
    words: Sequence[str],
    config_name: str,
    prepare: Callable[[], None],
    check: Callable[[DictConfig], Any],
    new_session: Callable[[Job, Invocation], Session],
) -> int:
    """Run the command `python -m <program> <words>`, whose configuration is conf/<config_name>.yaml.

    prepare: registers its schemas. check: turns a composed configuration into a job's `config` or raises ConfigError.
    new_session: makes the session, given the first job. Returns the session's exit code. Raises ConfigError for a
    configuration or data that cannot be used, and any KeyboardInterrupt after closing the session.
    """
    sys.argv = [sys.argv[0], *words]  # hydra.main reads them from there
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors; else it prints them over many lines
    prepare()
    session: Session | None = None
    refused: ConfigError | None = None
    total = 0

    @hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name=config_name)
    def app(cfg: DictConfig) -> None:
        nonlocal session, refused
        its = HydraConfig.get()
        job = Job(check(cfg), Path(its.runtime.output_dir), tuple(its.overrides.task))
        sweep = Path(its.sweep.dir) if its.mode is RunMode.MULTIRUN else None
        session = session or new_session(job, Invocation(tuple(words), total, sweep))
        try:
            session.run(job)
        except ConfigError as e:
            refused = e
            sys.exit(2)  # Hydra prints a line of its own for any other exception

    try:
        flags = _flags(program, words)
        if flags.help:
            print(help_text(config_name, flags.overrides, flags.config_dir))
            return 0
        if not (flags.hydra_help or flags.shell_completion or flags.info or flags.config_name):
            jobs = compose_jobs(config_name, check, flags.overrides, flags.multirun, flags.config_dir)
            total = _count(jobs)  # all are checked before the first one runs
        app()
        if session is not None:
            session.finish()
    except SystemExit:
        if refused is None:
            raise
        if session is not None:
            session.close(cut_short="stopped")
        raise refused from None
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(explain(e)) from e
    except OSError as e:  # the folder of a job, which Hydra makes, or a file that a session writes there
        if session is not None:
            session.close(cut_short="stopped")
        fix = "set output_root (of grbench itself: runner.output_root) to a folder with room that can be written"
        raise ConfigError(f"{e.filename}: {e.strerror}; {fix}") from e
    except KeyboardInterrupt:
        if session is not None:
            session.close(cut_short="interrupted")
        raise
    return session.close() if session is not None else 0


def _count(jobs: Iterable[Any]) -> int:
    """Return the number of jobs, which are composed on the way. Composing hundreds takes a minute, so it says so."""
    total, said = 0, time.monotonic()
    for total, _ in enumerate(jobs, 1):
        if time.monotonic() - said > SILENCE_S:
            said = time.monotonic()
            print(f"grbench: {total} configurations are checked so far; none runs before all are", file=sys.stderr)
    return total


def _flags(program: str, words: Sequence[str]) -> argparse.Namespace:
    """Return Hydra's flags and overrides of a command line. Raises ConfigError."""
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        args, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as e:
        raise ConfigError(f"{e}; python -m {program} --hydra-help lists the flags") from None
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such flag; python -m {program} --hydra-help lists them")
    modes = [f"--{name}".replace("_", "-") for name in MODES if getattr(args, name)]
    if len(modes) > 1:
        raise ConfigError(f"{' '.join(modes)}: only one of them at a time; leave the others out")
    return args
