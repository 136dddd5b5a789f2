"""`python -m grbench`: compose with Hydra, run every cell, print one table, exit non-zero if a cell failed."""

from __future__ import annotations

import os
import sys

from omegaconf import DictConfig

from grbench.compose import CONFIG_DIR, compose_cells, explain, prepare_hydra
from grbench.config import ConfigError, to_spec


def main() -> None:
    """Entry point. Exit codes: 0 every cell OK, 1 a cell failed, 2 the configuration is wrong, 130 Ctrl-C."""
    as_hydra_shows_it = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors; else it prints them over many lines
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    prepare_hydra()
    session = None

    @hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="config")
    def app(cfg: DictConfig) -> None:
        nonlocal session
        from hydra.core.hydra_config import HydraConfig

        from grbench.session import Session

        spec, run = to_spec(cfg)
        hydra_config = HydraConfig.get()
        if session is None:
            session = Session(run, hydra_config, total=cells)
        session.run(spec, run, hydra_config)

    try:
        cells = _check_first()
        app()
    except (ConfigError, HydraException, OmegaConfBaseException) as e:
        if as_hydra_shows_it:
            raise
        print(f"grbench: {e if isinstance(e, ConfigError) else explain(e)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if session is not None:
            session.close(interrupted=True)
        sys.exit(130)
    if session is not None:
        sys.exit(session.close())


def _check_first() -> int:
    """Compose every cell that this command line asks for, so that a wrong one stops it before the first runs.

    Returns the number of cells; raises ConfigError.
    """
    from hydra._internal.utils import get_args_parser

    args = get_args_parser().parse_args()
    if args.help or args.hydra_help or args.shell_completion or args.info or args.config_name:
        return 1
    return sum(1 for _ in compose_cells(args.overrides, args.multirun, args.config_dir))
