"""`grbench config`: every key of the configuration with its allowed values, default and meaning, as Markdown."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grbench.cachesim.config import CacheSimConfig
from grbench.cachesim.fleet import FleetConfig
from grbench.config.arguments import Arguments
from grbench.config.compose import CONFIG_DIR
from grbench.config.schema import (
    ConfigError,
    GateConfig,
    RetrievalConfig,
    RunConfig,
    RunnerConfig,
    SlurmConfig,
    schemas,
)
from grbench.kernelbench.config import KernelBenchConfig
from grbench.serve.options import ServeConfig
from grbench.training.config import TrainConfig, TrainingConfig
from grbench.tune.config import TuneConfig
from grengines.options import describe
from grkernels.nearest import nearest

INTRODUCTION = """\
# Configuration

`grbench config > docs/CONFIG.md` writes this page from the schemas.

A run is a choice for each group, `engine=hstu`, and values for keys, `engine.precision=bf16`.
A file of `conf/<group>/` holds only the values that differ from its schema.
`python -m grbench --cfg job` prints all values of a run.
"""
ROOTS = {
    "run": ("Keys without a group", RunConfig),
    "retrieval": ("`retrieval`: for the tasks that generate", RetrievalConfig),
    "gate": ("`gate`: the checks before and after measuring, and of measured answers", GateConfig),
    "runner": ("`runner`: worker processes, which are no part of the measurement", RunnerConfig),
    "slurm": ("`slurm`: what a job asks for, with `runner.cluster=slurm`", SlurmConfig),
    "tune": ("`grbench tune`", TuneConfig),
    "kernels": ("`grbench kernels`", KernelBenchConfig),
    "cachesim": ("`grbench cachesim`", CacheSimConfig),
    "fleet": ("`fleet`: the plan of `grbench cachesim`", FleetConfig),
    "train": ("`grbench train`", TrainConfig),
    "training": ("`training`: the epochs of `grbench train`", TrainingConfig),
    "serve": ("`grbench serve`: `serve.KEY=VALUE`", ServeConfig),
}


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = "Print every key of the configuration with its allowed values, default and meaning, as Markdown."
    parser = Arguments("config", about, ["config engine", "config > docs/CONFIG.md"])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{', '.join(sections())} (default: all)")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 done, 2 there is no such group."""
    chosen, known = parser().parse_args(words).groups, sections()
    if unknown := [name for name in chosen if name not in known]:
        raise ConfigError(f"{unknown[0]}: no such group; {nearest(unknown[0], known)}groups: {', '.join(known)}")
    print("\n".join(known[name] for name in chosen) if chosen else reference(), end="")
    return 0


def reference() -> str:
    """Return the page docs/CONFIG.md."""
    return "\n".join([INTRODUCTION, *sections().values()])


def sections() -> dict[str, str]:
    """Return the page's sections by the name of the group or command."""
    parts = {name: "\n".join([f"## {title}\n", *_table(schema)]) + "\n" for name, (title, schema) in ROOTS.items()}
    groups = {name: "\n".join(_group(name)) + "\n" for name in schemas()}
    commands = {name: parts.pop(name) for name in ("kernels", "cachesim", "fleet", "train", "training", "serve")}
    return {**parts, **groups, **commands}


def _group(name: str) -> Iterator[str]:
    yield f"## `{name}`\n"
    yield f"| `{name}=` | description | sets |"
    yield "|---|---|---|"
    for path in sorted((Path(CONFIG_DIR) / name).glob("*.yaml")):
        lines = path.read_text().splitlines()
        about = " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
        values = OmegaConf.load(path)
        assert isinstance(values, DictConfig)
        own = " ".join(f"`{key}={_shown(values[key])}`" for key in map(str, values) if key not in ("defaults", "name"))
        yield f"| `{path.stem}` | {about} | {own} |"
    for base, schema in schemas()[name].items():
        yield f"\n### `{name}`, schema `{base}`\n\n{_summary(schema)}\n"
        yield from _table(schema)


def _table(schema: type) -> Iterator[str]:
    """One row for each key of a schema; groups, which have sections of their own, are left out."""
    yield "| key | allowed | default | meaning |"
    yield "|---|---|---|---|"
    for field in dataclasses.fields(schema):
        if "help" in field.metadata:
            meaning = field.metadata["help"] + _only_with(field)
            yield f"| `{field.name}` | {describe(field)} | {_default(field)} | {meaning} |"


def _only_with(field: dataclasses.Field[Any]) -> str:
    """The other options without which a key is not read."""
    needed = field.metadata.get("only_with", {}).items()
    others = [f"`{other}`" + (f" {' or '.join(values)}" if values else "") for other, values in needed]
    return f"; only with {' and '.join(others)}" if others else ""


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "required" if value == "???" else f"`{_shown(value)}`"


def _shown(value: Any) -> str:
    """A value as one types it: null, true, 0.5, [16,32]."""
    typed = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return typed if isinstance(typed, str) else json.dumps(typed, separators=(",", ":"))


def _summary(schema: type) -> str:
    """The first paragraph of a docstring, one sentence per line."""
    return " ".join((inspect.getdoc(schema) or "").partition("\n\n")[0].split()).replace(". ", ".\n")
