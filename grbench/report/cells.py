"""Labels and commands of cells: flattened specs, and the options in which cells differ.

The module does without pandas, so that the table at the end of a run imports none.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grbench.execution.records import RunRecord

Cell = tuple[Path, RunRecord]  # a cell's folder and its record

GROUPS = ("model", "engine", "kernel", "cache", "workload", "scenario")
IDENTITY = ["engine", "kernel", "workload", "scenario"]  # names a cell when nothing differs
MISSING = "-"


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts and lists of dicts by dotted key. A group's name has the group's key.

    {"engine": {"name": "hstu", "device": "cpu"}, "seed": 0} gives engine, engine.device and seed.
    """
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {path: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        own_name = key == "name" and path in GROUPS
        leaves |= flatten(value, path if own_name else f"{path}.{key}" if path else str(key))
    return leaves


def knobs(records: Sequence[RunRecord], ignore: Sequence[str] = ()) -> list[str]:
    """Return the dotted keys in which the specs differ, groups first, or `IDENTITY` if nothing differs.

    The value of some keys follows from the group's name, such as a model's layers. Such a key counts only if one name
    has two values of it, or if the user typed it.
    """
    specs = [flatten(record.spec) for record in records]
    typed = {text.lstrip("+~").split("=", 1)[0] for record in records for text in record.overrides}
    keys = dict.fromkeys(key for spec in specs for key in spec if key not in ignore)
    chosen = [key for key in keys if _differs(specs, key) and (key in typed or not _implied(specs, key))]
    if not chosen:
        return IDENTITY
    order = {group: i for i, group in enumerate(GROUPS)}
    return sorted(chosen, key=lambda key: (order.get(key.split(".")[0], len(order)), key))


def _differs(specs: Sequence[dict[str, Any]], key: str) -> bool:
    return len({shown(spec[key]) if key in spec else None for spec in specs}) > 1


def _implied(specs: Sequence[dict[str, Any]], key: str) -> bool:
    group, _, option = key.partition(".")
    if group not in GROUPS or not option:
        return False
    values: dict[str, set[str]] = {}
    for spec in specs:
        values.setdefault(shown(spec.get(group)), set()).add(shown(spec[key]) if key in spec else MISSING)
    return all(len(seen) == 1 for seen in values.values())


def labels(records: Sequence[RunRecord], ignore: Sequence[str] = ()) -> list[str]:
    """Return a short name for each cell, such as "kernel=triton max_batch=8". Repeats are numbered.

    Cells that a study names, one file each, keep those names. ignore: keys that are no part of a name.
    """
    if named := study_names(records):
        return named
    keys = knobs(records, ignore)
    leaves = Counter(key.rpartition(".")[2] for key in keys)
    names = {key: leaf if leaves[leaf := key.rpartition(".")[2]] == 1 else key for key in keys}
    texts = []
    for record in records:
        spec = flatten(record.spec)
        texts.append(" ".join(f"{names[key]}={shown(spec[key])}" for key in keys if key in spec))
    total, seen = Counter(texts), Counter[str]()
    for i, text in enumerate(texts):
        seen[text] += 1
        if total[text] > 1:
            texts[i] = f"{text} #{seen[text]}"
    return texts


def study_names(records: Sequence[RunRecord]) -> list[str]:
    """Return the names that a study gives its cells, as in study/reference@_global_=rank_offline.

    Empty if some cell has none, or if two share one.
    """
    names = [next((o.partition("=")[2] for o in r.overrides if o.startswith("study/")), "") for r in records]
    return names if all(names) and len(set(names)) == len(names) > 1 else []


def shown(value: Any) -> str:
    """Return a value as a user types it: null, true, 0.5, [16,32]."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def command(record: RunRecord) -> str:
    """Return the command line that measures this cell again."""
    one_cell = (
        ["hydra.mode=RUN"] if any(o.startswith("study=") for o in record.overrides) else []
    )  # not the whole study
    return shlex.join(["python", "-m", "grbench", *one_cell, *record.overrides])


def figure(value: float | None) -> str:
    """Format a number for a table: at least three significant digits, two below 0.1; "-" for None and NaN."""
    if value is None or value != value:
        return MISSING
    if abs(value) >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:#.3g}".removesuffix(".") if abs(value) >= 0.1 else f"{value:.2g}"
