"""`python -m grbench.cachesim`: exit codes 0 done, 2 the configuration or the data is wrong, 130 Ctrl-C."""

from __future__ import annotations

from typing import Any

from grbench import side_command
from grbench.cachesim.config import register_schemas, to_config


def main() -> None:
    """Entry point. Exits."""
    side_command.run("cachesim", register_schemas, to_config, _session)


def _session(config: Any, hydra: Any) -> side_command.Session:
    from grbench.cachesim.session import Session

    return Session(config, hydra)


if __name__ == "__main__":
    main()
