"""`grbench kernels`: benchmark operators one by one."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from grbench.config import command
from grbench.config.jobs import Invocation, Job, Session
from grbench.kernelbench.config import KernelBenchConfig, device_of, register_schemas, to_config


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 done, 1 a row is INCORRECT or ERROR, 2 the configuration is wrong, 130 Ctrl-C."""
    return command.run("grbench kernels", words, "kernelbench", register_schemas, _checked, _session)


def _checked(cfg: DictConfig) -> KernelBenchConfig:
    config = to_config(cfg)
    device_of(config)  # a device that this machine lacks stops the command before the first job
    return config


def _session(first: Job, invocation: Invocation) -> Session:
    from grbench.kernelbench.session import KernelSession

    return KernelSession(first, invocation)
