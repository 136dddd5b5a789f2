"""`grbench run`: compose with Hydra, measure every cell, print one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grbench.config import command
from grbench.config.compose import prepare_hydra
from grbench.config.jobs import Invocation, Job, Session
from grbench.config.schema import RunConfig, to_spec

FORMS = {"--json": "runner.print=json", "--csv": "runner.print=csv"}  # flags for an option, as other programs have them


def main(words: Sequence[str], require: Callable[[RunConfig], None] = lambda run: None) -> int:
    """Run the command. Exit codes: 0 every cell is OK, 1 a cell failed, 2 the configuration is wrong, 130 Ctrl-C.

    require: takes the options of the first cell before anything is recorded, and raises ConfigError to refuse them.
    """

    def new_session(first: Job, invocation: Invocation) -> Session:
        require(first.config[1])
        return _session(first, invocation)

    words = [FORMS.get(word, word) for word in words]
    return command.run("grbench", words, "config", prepare_hydra, to_spec, new_session)


def _session(first: Job, invocation: Invocation) -> Session:
    from grbench.execution.session import CellSession  # imports rich, the runner and records: --help needs none of them

    return CellSession(first.config[1], invocation)
