"""`python -m grbench.kernelbench`: exit codes 0 done, 1 a row is INCORRECT or ERROR, 2 the configuration is wrong,
130 Ctrl-C."""

from __future__ import annotations

from hydra.conf import HydraConf
from omegaconf import DictConfig

from grbench.config import command
from grbench.kernelbench.config import KernelBenchConfig, device_of, register_schemas, to_config


def main() -> None:
    """Entry point. Exits."""
    command.run("grbench.kernelbench", "kernelbench", register_schemas, _checked, _session)


def _checked(cfg: DictConfig) -> KernelBenchConfig:
    config = to_config(cfg)
    device_of(config)  # a device that isn't there stops the command before the first job
    return config


def _session(config: KernelBenchConfig, hydra: HydraConf, total: int) -> command.Session:
    from grbench.kernelbench.session import Session

    return Session(config, hydra)


if __name__ == "__main__":
    main()
