"""Composing configurations with Hydra, and saying in one line what is wrong with one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grbench.config import (
    ConfigError,
    RunConfig,
    RunSpec,
    checkout_or_packaged,
    register_schemas,
    to_spec,
)
from grengines.options import describe

CONFIG_DIR = str(checkout_or_packaged("conf"))


def prepare_hydra() -> None:
    """Register the schemas and the resolver that conf/config.yaml uses. Safe to call twice."""
    register_schemas()
    OmegaConf.register_new_resolver(
        "grbench_experiments", lambda: str(checkout_or_packaged("experiments")), replace=True
    )


def compose_spec(overrides: Sequence[str]) -> tuple[RunSpec, RunConfig]:
    """Compose one cell from Hydra overrides. Raises ConfigError."""
    return next(compose_cells(overrides))


def compose_cells(
    overrides: Sequence[str], multirun: bool = False, config_dir: str | None = None
) -> Iterator[tuple[RunSpec, RunConfig]]:
    """Compose and check every cell that a command line describes, without running any. Raises ConfigError.

    `multirun` and `config_dir` are Hydra's flags of that name; a study can ask for a sweep as well.
    """
    prepare_hydra()
    folders = [config_dir, str(checkout_or_packaged("experiments"))]
    extra = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders)}]"] if config_dir else []
    try:
        with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
            for cell in _cells(list(overrides), extra, multirun):
                yield to_spec(hydra_compose("config", [*cell, *extra]))
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(explain(e)) from None
    finally:
        GlobalHydra.instance().clear()


def _cells(overrides: list[str], extra: list[str], multirun: bool) -> list[list[str]]:
    """The overrides of each cell, as Hydra's basic sweeper would make them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parser = OverridesParser.create()
    parsed = parser.parse_overrides(overrides)  # this one names the override that it can't read
    fixed = [o.input_line for o in parsed if o.input_line and not o.is_sweep_override()]
    hydra = hydra_compose("config", [*fixed, *extra], return_hydra_config=True).hydra
    if not multirun and hydra.mode is not RunMode.MULTIRUN:
        return [overrides]
    swept = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    batches = BasicSweeper.split_arguments(parser.parse_overrides(swept + overrides), None)
    return [list(cell) for batch in batches for cell in batch]


def explain(error: BaseException) -> str:
    """One line for any error that composing raises: the key, what is wrong, what is allowed."""
    cause = error
    while cause.__cause__ is not None and isinstance(cause.__cause__, OmegaConfBaseException | HydraException):
        cause = cause.__cause__
    text = " ".join(line.strip() for line in str(cause).splitlines() if line.strip())
    text = re.sub(r"\s*(full_key: \S+|object_type=\w+|reference_type=\S+|Config search path:.*)", "", text)
    if override := getattr(error, "override", None):
        return f"{override}: not an override, which is key=value ({text.partition(' See https')[0]})"
    if key := getattr(cause, "full_key", None):
        return f"{key}: {text}{_allowed(key, getattr(cause, 'object_type', None))}"
    return text


def _allowed(key: str, schema: Any) -> str:
    """What may stand at `key`, from the dataclass of its node."""
    if not dataclasses.is_dataclass(schema):
        return ""
    fields = {f.name: f for f in dataclasses.fields(schema)}
    name = key.rpartition(".")[2]
    return f"; allowed: {describe(fields[name])}" if name in fields else f"; known keys: {', '.join(sorted(fields))}"
