"""`grbench load`: measure a server through the network, with the scenarios, records and reports of any run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from grbench.config.arguments import Arguments
from grbench.config.schema import ConfigError, RunConfig
from grbench.execution import command
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
    args, flags = parser().parse_known_args(words)
    return command.main([*flags, *as_run(args.overrides)], _require_server)


def _require_server(run: RunConfig) -> None:
    """Raise ConfigError where no server answers, which may still be loading its models.

    The machines of a cluster may reach one that this machine does not.
    """
    from grengines.remote.client import ServerError
    from grengines.remote.engine import START, clients_of, key_of

    if run.runner.cluster == "none":
        for place, client in enumerate(clients_of(run.engine)):
            try:
                client.reach()
            except ServerError as e:
                raise ConfigError(f"{key_of(place)}: {e}; {START}") from None


def as_run(words: Sequence[str]) -> list[str]:
    """Return the overrides of the run that measures servers, from those of the command.

    Several are words `url=URL`, or a list, `url=[URL,URL]`. Each gets its connections (`usual`).
    """
    given = [word.removeprefix("url=") for word in words if word.startswith("url=")]
    urls = [url for text in given for url in (text[1:-1].split(",") if text.startswith("[") else [text])]
    servers = [f"engine.url={url}" for url in urls[:1]]
    if len(urls) > 1:
        servers.append(f"engine.more_urls=[{','.join(urls[1:])}]")
    rest = [word for word in words if not word.startswith("url=")]
    known = {word.partition("=")[0] for word in rest}
    ours = [f"{key}={value}" for key, value in usual(max(len(urls), 1)).items() if key not in known]
    return ["engine=remote", *servers, *ours, *rest]
