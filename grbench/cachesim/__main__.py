"""`python -m grbench.cachesim`: exit codes 0 done, 2 the configuration or the data is wrong, 130 Ctrl-C."""

from __future__ import annotations

from hydra.conf import HydraConf

from grbench.cachesim.config import CacheSimConfig, register_schemas, to_config
from grbench.config import command


def main() -> None:
    """Entry point. Exits."""
    command.run("grbench.cachesim", "cachesim", register_schemas, to_config, _session)


def _session(config: CacheSimConfig, hydra: HydraConf, total: int) -> command.Session:
    from grbench.cachesim.session import Session

    return Session(config, hydra)


if __name__ == "__main__":
    main()
