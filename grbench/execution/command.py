"""`grbench run`: compose with Hydra, measure every cell, print one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grbench.config import command
from grbench.config.compose import prepare_hydra
from grbench.config.jobs import Invocation, Job, Session
from grbench.config.schema import ConfigError
from grbench.config.unread import unread
from grbench.execution.files import require_files
from grbench.execution.ranks import require_gpus, to_spec_here

FORMS = {"--json": "runner.print=json", "--csv": "runner.print=csv"}  # flags for an option, as other programs have them


def main(words: Sequence[str], require: Callable[[Sequence[Job]], None] = lambda jobs: None) -> int:
    """Run the command. Exit codes: 0 every cell is OK, 1 a cell failed, 2 the configuration is wrong, 130 Ctrl-C.

    require: takes the cells before anything is recorded, and raises ConfigError to refuse them.
    """

    gpus = 1

    def require_all(jobs: Sequence[Job]) -> None:
        nonlocal gpus
        require(jobs)
        require_files(job.config[0] for job in jobs)
        gpus = require_gpus((job.config[0] for job in jobs), jobs[0].config[1].runner.cluster)

    def session(first: Job, invocation: Invocation) -> Session:
        from grbench.execution.session import CellSession  # imports rich and the runner: --help needs none of them

        return CellSession(first.config[1], invocation, gpus=gpus)

    if len(forms := [word for word in dict.fromkeys(words) if word in FORMS]) > 1:
        raise ConfigError(f"{' '.join(forms)}: only one of them at a time; leave the others out")
    words = [FORMS.get(word, word) for word in words]
    return command.run("grbench", words, "config", prepare_hydra, to_spec_here, session, require_all, unread)
