"""Ranking model and catalogue of a command line, from overrides, a weights file and flags."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError, RunSpec
from grbench.execution.folders import require_parent
from grengines.api import Catalogue
from grengines.models import header

OVERRIDES = "overrides as in `grbench`: the model and its weights, the seed, the workload"


def add_catalogue_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `compose_ranking` reads."""
    source = "(default: as the table in model.weights, else as the workload)"
    parser.add_argument("--items", type=int, help=f"items in the catalogue {source}")
    parser.add_argument("--actions", type=int, help=f"action bits of an event {source}")
    parser.add_argument("--users", type=int, help="users in the catalogue (default: 1 if the others are known)")


def compose_ranking(args: argparse.Namespace) -> tuple[RunSpec, Catalogue]:
    """Return the cell of `args.overrides`, whose model ranks, and its catalogue. Raises ConfigError.

    The weights file records the options of its training. They apply if no `model=` is given, and `model.KEY=VALUE`
    overrides them.
    """
    overrides = ["engine=hstu", *args.overrides]
    spec, _ = compose_spec(overrides, args.config_dir)
    shapes: dict[str, list[int]] = {}
    if spec.ranking_model.weights:
        path = Path(spec.ranking_model.weights)
        trained, shapes = _read_weights(path)
        if not any(override.startswith("model=") for override in args.overrides):
            recorded = [f"model.{key}={json.dumps(value)}" for key, value in trained.items()]
            spec, _ = compose_spec([*recorded, *overrides], args.config_dir)
    return spec, _catalogue(args, spec, shapes)


def require_folder(out: Path) -> None:
    """Raise ConfigError unless a folder can be written at `out`, which is not made yet."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: it is a file; give a folder")
    require_parent(out)


def _catalogue(args: argparse.Namespace, spec: RunSpec, shapes: dict[str, list[int]]) -> Catalogue:
    items, users, actions = args.items, args.users, args.actions
    for name, value, least in (("items", items, 1), ("users", users, 1), ("actions", actions, 0)):
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: allowed is >= {least}")
    if shapes:
        model = spec.ranking_model
        context_rows = min((users or 1) * model.contextual_seq_len, model.embedding_rows)
        items = shapes["token_table"][0] - context_rows if items is None else items
        actions = shapes["action_table"][0] if actions is None else actions
    if items is not None and actions is not None:
        return Catalogue(num_users=users or 1, num_items=items, num_actions=actions)
    try:
        known = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms).catalogue
    except ValueError as e:
        raise ConfigError(f"{e}; or give the catalogue: --items 1682 --users 943 --actions 2") from None
    return Catalogue(
        num_users=users or known.num_users,
        num_items=items or known.num_items,
        num_actions=known.num_actions if actions is None else actions,
    )


def _read_weights(path: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Read the model's options and the shapes of its tables from a weights file. Raises ConfigError."""
    from safetensors import safe_open

    try:
        if (found := header.read(path).holds()) != header.RANKER:
            raise ValueError(f"{path}: it holds {found}, and {header.RANKER} are needed here; {header.MAKE_WEIGHTS}")
        with safe_open(str(path), framework="np") as f:
            model = json.loads((f.metadata() or {}).get("model", "{}"))
            shapes = {name: f.get_slice(name).get_shape() for name in ("token_table", "action_table")}
    except ValueError as e:
        raise ConfigError(f"model.weights={e}") from None
    return dict(model), shapes
