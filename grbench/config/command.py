"""What the commands that Hydra configures share: compose and check every job, run them, end as users expect."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import hydra
from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from grbench.config.compose import CONFIG_DIR, compose_jobs, explain
from grbench.config.schema import ConfigError


class Session(Protocol):
    """One command's jobs and what they gave."""

    def run(self, job: Any, hydra: HydraConf) -> None:
        """Run one job; what it finished is on disk whatever happens. Raises ConfigError for data that can't be used."""

    def close(self, cut_short: str = "") -> int:
        """Print the tables and end the tracking. Returns the exit code. cut_short: what ended the jobs early."""


def run(
    program: str,
    config_name: str,
    prepare: Callable[[], None],
    check: Callable[[DictConfig], Any],
    new_session: Callable[[Any, HydraConf, int], Session],
) -> None:
    """`python -m <program>`, whose configuration is conf/<config_name>.yaml. Exits.

    prepare: makes its schemas known. check: a composed configuration to a job, raising ConfigError. new_session: for
    the first job, Hydra's own configuration and the number of jobs. Exit codes: what the session returns, 2 for a
    configuration or data that can't be used, 130 after Ctrl-C. HYDRA_FULL_ERROR=1 shows a traceback for 2.
    """
    as_hydra_shows_it = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors; else it prints them over many lines
    prepare()
    session: Session | None = None
    total = 0

    @hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name=config_name)
    def app(cfg: DictConfig) -> None:
        nonlocal session
        job = check(cfg)
        session = session or new_session(job, HydraConfig.get(), total)
        try:
            session.run(job, HydraConfig.get())
        except ConfigError as e:  # not left to Hydra, which prints a line of its own before it raises
            if as_hydra_shows_it:
                raise
            session.close(cut_short="stopped")
            refuse(e)

    def refuse(error: Exception) -> None:
        print(f"{program}: {explain(error)}", file=sys.stderr)
        sys.exit(2)

    try:
        total = _check_first(program, config_name, check)
        app()
    except (ConfigError, HydraException, OmegaConfBaseException) as e:
        if as_hydra_shows_it:
            raise
        refuse(e)
    except OSError as e:  # of a job's folder, which Hydra makes, or of what a session writes there
        if as_hydra_shows_it:
            raise
        if session is not None:
            session.close(cut_short="stopped")
        mend = "set output_root (of grbench itself: runner.output_root) to a folder with room that can be written"
        refuse(ConfigError(f"{e.filename}: {e.strerror}; {mend}"))
    except KeyboardInterrupt:
        if session is not None:
            session.close(cut_short="interrupted")
        sys.exit(130)
    if session is not None:
        sys.exit(session.close())


def _check_first(program: str, config_name: str, check: Callable[[DictConfig], Any]) -> int:
    """Compose every job that this command line asks for, so that a wrong one stops it before the first runs.

    Returns the number of jobs, 0 where Hydra is asked for something else. Raises ConfigError.
    """
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        args, unknown = parser.parse_known_args()
    except argparse.ArgumentError as e:
        raise ConfigError(f"{e}; python -m {program} --hydra-help lists the flags") from None
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such flag; python -m {program} --hydra-help lists them")
    if args.help or args.hydra_help or args.shell_completion or args.info or args.config_name:
        return 0
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise ConfigError(f"--config-dir {args.config_dir}: no such folder")
    return sum(1 for _ in compose_jobs(config_name, check, args.overrides, args.multirun, args.config_dir))
