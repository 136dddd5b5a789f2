"""Compose with Hydra, run every job, print the tables."""

from __future__ import annotations

import os
import sys

from omegaconf import DictConfig

from grbench.cachesim.config import register_schemas, to_config
from grbench.compose import CONFIG_DIR, explain
from grbench.config import ConfigError


def main() -> None:
    """Entry point. Exit codes: 0 done, 2 the configuration or the data is wrong, 130 Ctrl-C."""
    as_hydra_shows_it = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors; else it prints them over many lines
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register_schemas()
    session = None

    @hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="cachesim")
    def app(cfg: DictConfig) -> None:
        nonlocal session
        from hydra.core.hydra_config import HydraConfig

        from grbench.cachesim.session import Session

        config = to_config(cfg)
        session = session or Session(config, HydraConfig.get())
        try:
            session.run(config, HydraConfig.get())
        except ConfigError as e:  # Hydra would print more than the one line
            session.close(ok=False)
            print(f"grbench.cachesim: {e}", file=sys.stderr)
            sys.exit(2)

    try:
        _check_first()
        app()
    except (ConfigError, HydraException, OmegaConfBaseException) as e:
        if as_hydra_shows_it:
            raise
        print(f"grbench.cachesim: {e if isinstance(e, ConfigError) else explain(e)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if session is not None:
            session.close(ok=False, interrupted=True)
        sys.exit(130)
    if session is not None:
        session.close()


def _check_first() -> None:
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
                to_config(compose("cachesim", [*job, *extra]))
    finally:
        GlobalHydra.instance().clear()


if __name__ == "__main__":
    main()
