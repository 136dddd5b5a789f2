"""What commands beside the harness share: compose with Hydra, check every job, run them, end as users expect."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

from omegaconf import DictConfig

from grbench.compose import CONFIG_DIR, explain
from grbench.config import ConfigError


class Session(Protocol):
    """One command's jobs and what they gave."""

    def run(self, config: Any, hydra: Any) -> None:
        """Run one job; what it finished is on disk whatever happens. Raises ConfigError."""

    def close(self, failed: bool = False, interrupted: bool = False) -> int:
        """Print the tables, end the tracking. Returns the exit code."""


def run(
    name: str,
    register: Callable[[], None],
    to_config: Callable[[DictConfig], Any],
    new_session: Callable[[Any, Any], Session],
) -> None:
    """`python -m grbench.<name>`, whose configuration is conf/<name>.yaml. Exits.

    register: makes its schemas known. to_config: checks a composed configuration, raising ConfigError. new_session: for
    the first job's configuration and Hydra's own. Exit codes: what the session returns, 2 for a configuration or
    data that can't be used, 130 after Ctrl-C.
    """
    as_hydra_shows_it = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors; else it prints them over many lines
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register()
    session: Session | None = None

    @hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name=name)
    def app(cfg: DictConfig) -> None:
        nonlocal session
        from hydra.core.hydra_config import HydraConfig

        config = to_config(cfg)
        session = session or new_session(config, HydraConfig.get())
        try:
            session.run(config, HydraConfig.get())
        except ConfigError as e:  # not left to Hydra, which prints a line of its own before it raises
            if as_hydra_shows_it:
                raise
            session.close(failed=True)
            print(f"grbench.{name}: {e}", file=sys.stderr)
            sys.exit(2)

    try:
        _check_first(name, to_config)
        app()
    except (ConfigError, HydraException, OmegaConfBaseException) as e:
        if as_hydra_shows_it:
            raise
        print(f"grbench.{name}: {e if isinstance(e, ConfigError) else explain(e)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if session is not None:
            session.close(interrupted=True)
        sys.exit(130)
    if session is not None:
        sys.exit(session.close())


def _check_first(name: str, to_config: Callable[[DictConfig], Any]) -> None:
    """Compose every job that this command line asks for, so that a wrong one stops it before the first runs.

    Raises ConfigError, HydraException or OmegaConfBaseException.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    args = get_args_parser().parse_args()
    if args.help or args.hydra_help or args.shell_completion or args.info or args.config_name or args.cfg:
        return
    parsed = OverridesParser.create().parse_overrides(args.overrides)
    jobs = BasicSweeper.split_arguments(parsed, None)[0] if args.multirun else [args.overrides]
    extra = [f"hydra.searchpath=[file://{args.config_dir}]"] if args.config_dir else []
    try:
        with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
            for job in jobs:
                to_config(compose(name, [*job, *extra]))
    finally:
        GlobalHydra.instance().clear()
