"""`grbench train`: train a model on a workload."""

from __future__ import annotations

from collections.abc import Sequence

from grbench.config import command
from grbench.config.jobs import Invocation, Job, Session
from grbench.training.config import register_schemas, to_config, unread


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 trained, 2 the configuration or the data is wrong, 130 Ctrl-C."""
    return command.run("grbench train", words, "train", register_schemas, to_config, _session, unread=unread)


def _session(first: Job, invocation: Invocation) -> Session:
    from grbench.training.session import TrainSession

    return TrainSession(first, invocation)
