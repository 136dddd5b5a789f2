"""`grbench load`: measure a server through the network, with the scenarios, records and reports of any run."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial

from grbench import workloads
from grbench.config.arguments import Arguments, replaced
from grbench.config.jobs import Job
from grbench.config.schema import ConfigError
from grbench.execution import command
from grbench.workloads.config import FileConfig, WorkloadOptions
from grbench.workloads.events import DataError
from grengines.api import Catalogue
from grengines.remote.config import usual


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
    """Raise ConfigError where no server answers, or it serves something else than a cell asks for.

    One that still loads its models does not say what it serves, so it is waited for; if that takes too long, the cell
    reports it. The machines of a cluster may reach one that this machine does not. words: of the command, for the line
    that says how to ask for what the server has.
    """
    from grengines.remote.client import FOREIGN, NO_ANSWER, UNKNOWN_CALLER, ServerError
    from grengines.remote.engine import KEY, START, clients_of, key_of
    from grengines.remote.served import differences, overrides, refusal

    def say(line: str) -> None:
        print(f"grbench load: {line}", file=sys.stderr, flush=True)

    catalogues: dict[str, Catalogue] = {}  # of each workload, which takes a second to read
    for spec, run in (job.config for job in jobs):
        for place, client in enumerate(clients_of(run.engine) if run.runner.cluster == "none" else ()):
            try:
                status = client.status()
                if not status["strategies"]:
                    client.wait_until_ready(run.engine.timeout_s, say)
                    status = client.status()
            except ServerError as e:
                if e.status in (NO_ANSWER, FOREIGN, UNKNOWN_CALLER):
                    raise ConfigError(f"{key_of(place)}: {e}; {KEY if e.status == UNKNOWN_CALLER else START}") from None
                continue
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


def _catalogue(workload: WorkloadOptions) -> Catalogue:
    """Return the catalogue of a workload. Raises ConfigError for unusable data."""
    try:
        return workloads.catalogue(workload)
    except DataError as e:
        raise ConfigError(str(e)) from None


def as_run(words: Sequence[str]) -> list[str]:
    """Return the words of the run that measures servers, from those of the command.

    Several are words `url=URL`, or a list, `url=[URL,URL]`. Each gets its connections (`usual`). Quality is evaluated
    only if `gate.quality_requests` is typed: it is that of the weights, and takes minutes through the network.
    """
    given = [word.removeprefix("url=") for word in words if word.startswith("url=")]
    urls = [url for text in given for url in (text[1:-1].split(",") if text.startswith("[") else [text])]
    servers = [f"engine.url={url}" for url in urls[:1]]
    if len(urls) > 1:
        servers.append(f"engine.more_urls=[{','.join(urls[1:])}]")
    rest = [word for word in words if not word.startswith("url=")]
    known = {word.lstrip("+").partition("=")[0]: word.partition("=")[2] for word in rest}
    options = usual(max(len(urls), 1))
    if "accuracy" not in known.get("scenario.mode", ""):  # LoadGen issues the requests that quality is computed from
        options["gate.quality_requests"] = 0
    ours = [f"{key}={value}" for key, value in options.items() if key not in known]
    return ["engine=remote", *servers, *ours, *rest]
