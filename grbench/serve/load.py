"""`grbench load`: measure a server through the network, with the scenarios, records and reports of any run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from grbench.config.arguments import Arguments
from grbench.config.schema import ConfigError, RunConfig
from grbench.execution import command

CONNECTIONS = 64
USUAL = {"scenario.max_batch": "1", "scenario.in_flight": str(CONNECTIONS)}  # a call for each request


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = "Measure a server of `grbench serve` through the network: the scenarios, records and reports of any run."
    examples = ["load url=http://127.0.0.1:8000 scenario=server scenario.target_qps=100"]
    overrides = "url=URL, and overrides as in `grbench`: the workload, the model and the seed are the server's"
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
    from grengines.remote.engine import START, client_of

    if run.runner.cluster == "none":
        try:
            client_of(run.engine).reach()
        except ServerError as e:
            raise ConfigError(f"engine.url: {e}; {START}") from None


def as_run(words: Sequence[str]) -> list[str]:
    """Return the overrides of the run that measures a server, from those of the command."""
    url = [f"engine.{word}" for word in words if word.startswith("url=")]
    rest = [word for word in words if not word.startswith("url=")]
    given = {word.partition("=")[0] for word in rest}
    usual = [f"{key}={value}" for key, value in USUAL.items() if key not in given]
    return ["engine=remote", *url, *usual, *rest]
