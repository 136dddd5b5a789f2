"""`grbench load`: measure a server through the network, with the scenarios, records and reports of any run."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from grbench import workloads
from grbench.config.arguments import Arguments, replaced
from grbench.config.compose import set_by_study
from grbench.config.jobs import Job
from grbench.config.schema import ConfigError
from grbench.execution import command
from grbench.workloads.config import FileConfig, WorkloadOptions
from grbench.workloads.events import DataError
from grengines.api import Catalogue
from grengines.remote.config import usual

if TYPE_CHECKING:
    from grengines.remote.client import Client

QUALITY = "gate.quality_requests"
WAIT = "look into its log, set engine.timeout_s to wait longer"


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = "Measure a server of `grbench serve` through the network: the scenarios, records and reports of any run."
    examples = [
        "load url=http://127.0.0.1:8000 scenario=server scenario.target_qps=100",
        "load url=http://a:8000 url=http://b:8000 scenario=offline",
    ]
    overrides = (
        "url=URL, for each server; and overrides as in `grbench`: the workload, the model and the seed are the server's"
    )
    return Arguments("load", about, examples, overrides)


def main(words: Sequence[str]) -> int:
    """Run the command: a run with engine=remote. Exit codes: as of a run; 2 also where no server answers."""
    parser().parse_known_args(words)  # answers --help; a run takes the other flags
    return command.main(as_run(words), partial(_require_servers, words))


def _require_servers(words: Sequence[str], jobs: Sequence[Job]) -> None:
    """Raise ConfigError where no server gets ready, or it serves something else than a cell asks for.

    One that still loads its models does not say what it serves, so it is waited for, once for all cells. The machines
    of a cluster may reach one that this machine does not. words: of the command, for the line that says how to ask for
    what the server has.
    """
    from grengines.remote.client import NOT_READY, UNKNOWN_CALLER, ServerError
    from grengines.remote.engine import KEY, START, clients_of, key_of
    from grengines.remote.served import differences, overrides, refusal

    catalogues: dict[str, Catalogue] = {}  # of each workload, which takes a second to read
    for spec, run in (job.config for job in jobs):
        for place, client in enumerate(clients_of(run.engine) if run.runner.cluster == "none" else ()):
            try:
                status = _status_when_ready(client, run.engine.timeout_s)
            except ServerError as e:
                fix = {UNKNOWN_CALLER: KEY, NOT_READY: f"{WAIT}, or {START}"}.get(e.status, START)
                raise ConfigError(f"{key_of(place)}: {e}; {fix}") from None
            known = None
            # A file is not read where the server has one too: it may take long, and the cell compares them.
            if not (isinstance(spec.workload, FileConfig) and spec.workload.name == status["workload"]):
                if (key := repr(spec.workload)) not in catalogues:
                    catalogues[key] = _catalogue(spec.workload)
                known = catalogues[key]
            longest = spec.workload.max_history
            if asked := differences(status, spec.task, known, longest, spec.seed, spec.model, spec.retrieval):
                theirs = status.get("config_dir")
                own = ["--config-dir", theirs] if theirs and theirs not in words else []  # the last one of two counts
                again = f"; type python -m grbench load {shlex.join([*replaced(words, overrides(asked)), *own])}"
                raise ConfigError(f"{key_of(place)}: {refusal(client.url, status, asked)}{again}")


def _status_when_ready(client: Client, timeout_s: float) -> dict[str, Any]:
    """Return a server's status once it is ready. Raises ServerError, at once where no server of grbench answers."""
    from grengines.remote.client import NOT_READY, ServerError

    def say(line: str) -> None:
        print(f"grbench load: {line}", file=sys.stderr, flush=True)

    try:
        client.status()
    except ServerError as e:
        if e.status != NOT_READY:  # which a proxy answers until one of its servers is ready
            raise
    client.wait_until_ready(timeout_s, say)
    return client.status()


def _catalogue(workload: WorkloadOptions) -> Catalogue:
    """Return the catalogue of a workload. Raises ConfigError for unusable data."""
    try:
        return workloads.catalogue(workload)
    except DataError as e:
        raise ConfigError(str(e)) from None


def as_run(words: Sequence[str]) -> list[str]:
    """Return the words of the run that measures servers, from those of the command.

    Several are words `url=URL`, or a list, `url=[URL,URL]`. Each gets its connections (`usual`). Quality is evaluated
    only if `gate.quality_requests` is typed or a study sets it: it is that of the weights, and takes minutes through
    the network. Raises ConfigError for a study that can't be.
    """
    given = [word.removeprefix("url=") for word in words if word.startswith("url=")]
    urls = [url for text in given for url in (text[1:-1].split(",") if text.startswith("[") else [text])]
    servers = [f"engine.url={url}" for url in urls[:1]]
    if len(urls) > 1:
        servers.append(f"engine.more_urls=[{','.join(urls[1:])}]")
    rest = [word for word in words if not word.startswith("url=")]
    options = {**usual(max(len(urls), 1)), QUALITY: 0}
    args, _ = parser().parse_known_intermixed_args(rest)
    overrides = [word for word in args.overrides if "=" in word]
    known = set_by_study([*options, "scenario.mode"], overrides, args.config_dir)
    known |= {word.lstrip("+").partition("=")[0]: word.partition("=")[2] for word in overrides}
    if "accuracy" in known.get("scenario.mode", ""):  # LoadGen issues the requests that quality is computed from
        del options[QUALITY]
    ours = [f"{key}={value}" for key, value in options.items() if key not in known]
    return ["engine=remote", *servers, *ours, *rest]
