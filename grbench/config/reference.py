"""`grbench config`: every key of the configuration with its allowed values, default and meaning, as Markdown."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
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

`grbench config > docs/CONFIG.md` writes this page; `grbench config engine scenario` prints two sections of it.

A run is a choice for each group, such as `engine=hstu`, and values for keys, such as `engine.precision=bf16`:

    python -m grbench engine=hstu engine.precision=bf16 scenario=server scenario.target_qps=100

In a value, `${KEY}` reads another option; `\\${` gives these letters themselves, as in `'model.weights=/data/\\${x}'`.
`python -m grbench --cfg job` prints all values of a run.
Choices of one *kind* have the same keys, and "sets" has the values that differ from the defaults of the kind.
Most sweeps change `engine`, `engine.precision`, `kernel`, `cache`, `scenario.max_batch` and `scenario.max_wait_ms`.

## A choice of your own

A model of another shape, or any other choice that you reuse, is a file on one of the kinds, `FOLDER/model/NAME.yaml`:

    defaults: [/schema/model/hstu@_here_, _self_]
    name: NAME
    layers: 8

`python -m grbench --config-dir FOLDER engine=hstu model=NAME` takes it.
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
    groups = {name: "\n".join(_group(name, kinds)) + "\n" for name, kinds in schemas().items()}
    return {"run": parts.pop("run"), **groups, **parts}


def _group(name: str, kinds: Mapping[str, type]) -> Iterator[str]:
    several = len(kinds) > 1
    yield f"## `{name}`\n"
    yield f"| `{name}=` | {'kind | ' * several}description | sets |"
    yield f"|---|{'---|' * several}---|---|"
    for path in sorted((Path(CONFIG_DIR) / name).glob("*.yaml")):
        lines = path.read_text().splitlines()
        about = " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
        values = OmegaConf.load(path)
        assert isinstance(values, DictConfig)
        kind = str(values.defaults[0]).removeprefix(f"/schema/{name}/").removesuffix("@_here_")
        own = " ".join(f"`{key}={_shown(values[key])}`" for key in map(str, values) if key not in ("defaults", "name"))
        yield f"| `{path.stem}` | {f'{kind} | ' * several}{about} | {own} |"
    yield ""
    yield from _keys(kinds) if several else _table(*kinds.values())


def _keys(kinds: Mapping[str, type]) -> Iterator[str]:
    """One row for each key of a group and each meaning that it has, with the kinds that have it so."""
    rows: dict[str, dict[str, list[str]]] = {}
    for kind, schema in kinds.items():
        for key, row in _rows(schema):
            rows.setdefault(key, {}).setdefault(row, []).append(kind)
    yield "| key | of kind | allowed | default | meaning |"
    yield "|---|---|---|---|---|"
    rows.pop("name")  # a choice sets it
    for key, meanings in rows.items():
        for row, having in meanings.items():
            yield f"| `{key}` | {', '.join(having) if len(having) < len(kinds) else 'all'} | {row} |"


def _table(schema: type) -> Iterator[str]:
    yield "| key | allowed | default | meaning |"
    yield "|---|---|---|---|"
    for key, row in _rows(schema):
        yield f"| `{key}` | {row} |"


def _rows(schema: type) -> Iterator[tuple[str, str]]:
    """Each key of a schema and the rest of its row. Groups, which have sections of their own, are left out."""
    for field in dataclasses.fields(schema):
        if "help" in field.metadata:
            yield field.name, f"{describe(field)} | {_default(field)} | {field.metadata['help']}{_only_with(field)}"


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
    return typed if typed and isinstance(typed, str) else json.dumps(typed, separators=(",", ":"))
