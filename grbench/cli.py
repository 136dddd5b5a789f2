"""`python -m grbench`: compose with Hydra, run every cell, print one table, exit non-zero if a cell failed."""

from __future__ import annotations

from hydra.conf import HydraConf

from grbench.config import command
from grbench.config.compose import prepare_hydra
from grbench.config.schema import RunConfig, RunSpec, to_spec


def main() -> None:
    """Entry point. Exit codes: 0 every cell OK, 1 a cell failed, 2 the configuration is wrong, 130 Ctrl-C."""
    command.run("grbench", "config", prepare_hydra, to_spec, _session)


def _session(cell: tuple[RunSpec, RunConfig], hydra: HydraConf, total: int) -> command.Session:
    from grbench.execution.session import Session  # rich, runner and records: --help needs none of them

    return Session(cell[1], hydra, total)
