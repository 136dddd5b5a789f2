"""`grbench cachesim`: simulate cache policies on traces."""

from __future__ import annotations

from collections.abc import Sequence

from grbench.cachesim.config import register_schemas, to_config
from grbench.config import command
from grbench.config.jobs import Invocation, Job, Session


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 done, 2 the configuration or the data is wrong, 130 Ctrl-C."""
    return command.run("grbench cachesim", words, "cachesim", register_schemas, to_config, _session)


def _session(first: Job, invocation: Invocation) -> Session:
    from grbench.cachesim.session import CacheSession

    return CacheSession(first, invocation)
