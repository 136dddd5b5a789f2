"""`grbench run`: compose with Hydra, measure every cell, print one table."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from grbench import __version__, workloads
from grbench.config import command
from grbench.config.compose import prepare_hydra
from grbench.config.jobs import Invocation, Job, Session
from grbench.config.schema import ConfigError, RunConfig, RunSpec, to_spec
from grbench.execution.ranks import require_gpus
from grbench.workloads.config import TRACES, FileConfig
from grengines.runtime.cache_dir import content
from grkernels.cache_folder import cache_folder

FORMS = {"--json": "runner.print=json", "--csv": "runner.print=csv"}  # flags for an option, as other programs have them


def main(words: Sequence[str], require: Callable[[RunConfig], None] = lambda run: None) -> int:
    """Run the command. Exit codes: 0 every cell is OK, 1 a cell failed, 2 the configuration is wrong, 130 Ctrl-C.

    require: takes the options of each cell before anything is recorded, and raises ConfigError to refuse them.
    """

    gpus = 1

    def require_all(jobs: Sequence[Job]) -> None:
        nonlocal gpus
        for _, run in (job.config for job in jobs):
            require(run)
        require_files(job.config[0] for job in jobs)
        gpus = require_gpus((job.config[0] for job in jobs), jobs[0].config[1].runner.cluster)

    def session(first: Job, invocation: Invocation) -> Session:
        from grbench.execution.session import CellSession  # imports rich and the runner: --help needs none of them

        return CellSession(first.config[1], invocation, gpus=gpus)

    words = [FORMS.get(word, word) for word in words]
    return command.run("grbench", words, "config", prepare_hydra, to_spec, session, require_all)


def require_files(specs: Iterable[RunSpec]) -> None:
    """Raise ConfigError for a workload's file with a row that cannot be used, before a cell is recorded.

    A file is read through once: the cache folder remembers the content that was found to be usable. Each cell's worker
    reads it for itself.
    """
    checked: list[FileConfig] = []
    for spec in specs:
        if isinstance(spec.workload, FileConfig) and spec.workload not in checked:
            checked.append(spec.workload)
            try:
                known = _known_as_usable(spec.workload)
                if known is None or not known.exists():
                    workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
            except ValueError as e:
                raise ConfigError(str(e)) from None
            if known is not None:
                with contextlib.suppress(OSError):  # then the next command reads the file again
                    known.parent.mkdir(parents=True, exist_ok=True)
                    known.touch()


def _known_as_usable(config: FileConfig) -> Path | None:
    """Return the empty file that says that this content can be used with these options; None: there is no place."""
    try:
        of = {**dataclasses.asdict(config), "path": content(Path(config.path)), "name": Path(config.path).suffix}
        digest = hashlib.sha256(json.dumps([__version__, TRACES, of], sort_keys=True).encode()).hexdigest()
        return cache_folder() / "usable" / digest
    except (OSError, ValueError):
        return None
