"""Names and commands of cells: flattened specs, and the options in which cells differ.

A cell has one name: in the line of progress, in tables, in reports and in MLflow.

The module does without pandas, so that the table at the end of a run imports none.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from grbench.execution.records import RunRecord
from grengines.pipeline.config import STAGES
from grengines.remote.config import usual

Cell = tuple[Path, RunRecord]  # a cell's folder and its record

GROUPS = ("model", "engine", "kernel", "cache", "workload", "scenario")
REMOTE = "remote"  # the engine that is a server
BARE = ("engine", "scenario", "study", "case")  # parts of a name whose key is not shown
MISSING = "-"
MOST_NAMES = 200  # characters of the names of cells in a note
_PATH = re.compile(r"(?!.*://)[^\s\[{]*(/[^\s\[{]*|\.[A-Za-z]\w{1,11})")  # of a file, with folders or a suffix


class Planned(NamedTuple):
    """A cell that is about to run: its spec as a dict, and what was typed for it."""

    spec: dict[str, Any]
    overrides: list[str]


class Named(Protocol):
    """Record or planned cell: both have a name."""

    @property
    def spec(self) -> dict[str, Any]: ...
    @property
    def overrides(self) -> list[str]: ...


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


def knobs(records: Sequence[Named], ignore: Sequence[str] = ()) -> list[str]:
    """Return the dotted keys in which the specs differ, groups first, or engine and scenario if nothing differs.

    The value of some keys follows from the group's name, such as a model's layers. Such a key counts only if one name
    has two values of it, or if the user typed it. An option that some cells lack counts only if the others differ in
    it.
    """
    specs = [flatten(record.spec) for record in records]
    typed = {text.lstrip("+~").split("=", 1)[0] for record in records for text in record.overrides}
    keys = dict.fromkeys(key for spec in specs for key in spec if key not in ignore)
    chosen = [key for key in keys if _differs(specs, key) and (key in typed or not _implied(specs, key))]
    if not chosen:
        return ["engine", "scenario"]
    order = {group: i for i, group in enumerate(GROUPS)}
    return sorted(chosen, key=lambda key: (order.get(key.split(".")[0], len(order)), key))


def _differs(specs: Sequence[dict[str, Any]], key: str) -> bool:
    return len({shown(spec[key]) for spec in specs if key in spec}) > 1


def _implied(specs: Sequence[dict[str, Any]], key: str) -> bool:
    group, _, option = key.partition(".")
    if group not in GROUPS or not option:
        return False
    values: dict[str, set[str]] = {}
    for spec in specs:
        values.setdefault(shown(spec.get(group)), set()).add(shown(spec[key]) if key in spec else MISSING)
    return all(len(seen) == 1 for seen in values.values())


def label(cell: Named) -> str:
    """Return a cell's name: engine, scenario, and what the user chose, such as "hstu server bf16 cache=lru".

    A study that has a file for each cell gives the name: "reference rank_offline".
    """
    return labels([cell])[0]


def labels(cells: Sequence[Named], ignore: Sequence[str] = ()) -> list[str]:
    """Return the names of cells that are seen together. Parts that all of them have are left out, except the engine.

    If two names are equal and the cells are not, the options in which they differ are added, or the commits of their
    code. Cells that are equal in all of that get "(2 of 3)": "#" is the number of a row.
    ignore: keys that are no part of a name.
    """
    specs = [flatten(cell.spec) for cell in cells]
    parts = [
        {key: value for key, value in _parts(cell).items() if key not in ignore} or {"engine": engine_name(cell.spec)}
        for cell in cells
    ]
    if len(cells) > 1:
        shared = {
            key
            for key in _union(parts)
            if len({part.get(key, shown(_value(spec, key))) for part, spec in zip(parts, specs, strict=True)}) == 1
        }
        parts = [{k: v for k, v in part.items() if k not in shared or k in ("engine", "case")} for part in parts]
    _add_differences(cells, parts, ignore)
    for key in _union(parts):
        short = short_paths({part[key] for part in parts if key in part and key not in BARE})
        parts = [{k: short.get(v, v) if k == key else v for k, v in part.items()} for part in parts]
    texts = [" ".join(_text(part, spec)) for part, spec in zip(parts, specs, strict=True)]
    texts = _with_commits(texts, cells)
    total, seen = Counter(texts), Counter[str]()
    for i, text in enumerate(texts):
        seen[text] += 1
        if total[text] > 1:
            texts[i] = f"{text} ({seen[text]} of {total[text]})"
    return texts


def short_paths(values: Collection[str]) -> dict[str, str]:
    """Return a name for each path among values of one option: its stem, or what distinguishes it from the others."""
    paths = {value for value in values if _PATH.fullmatch(value)}
    names = {path: path for path in paths}
    for depth in range(1, max((path.count("/") for path in paths), default=0) + 2):
        for cut in (True, False):  # without the suffix, then with it
            ends = {path: "/".join(path.rstrip("/").split("/")[-depth:]) for path in paths}
            names = {path: _without_suffix(end) if cut else end for path, end in ends.items()}
            if len(set(names.values())) == len(paths):
                return names
    return names


def _without_suffix(name: str) -> str:
    folder, slash, file = name.removesuffix(".gz").rpartition("/")
    return folder + slash + (file.rpartition(".")[0] or file)


def _with_commits(texts: Sequence[str], cells: Sequence[Named]) -> list[str]:
    """Add the commit to names that are equal where the commits are not."""
    of: dict[str, set[str]] = {}
    commits = []
    for text, cell in zip(texts, cells, strict=True):
        sha, plus, dirty = str((getattr(cell, "environment", None) or {}).get("git_sha") or "unknown").partition("+")
        commits.append(sha[:7] + plus + dirty)
        of.setdefault(text, set()).add(commits[-1])
    pairs = zip(texts, commits, strict=True)
    return [f"{text} commit={commit}" if len(of[text]) > 1 else text for text, commit in pairs]


def engine_name(spec: dict[str, Any]) -> str:
    """Return the engine's name, of a pipeline the names of its stages' engines, of a server where it is.

    "hstu", "vllm+hstu", "remote 127.0.0.1:8000", "remote a:8000 and 3 more".
    """
    engine = spec.get("engine") or {}
    if engine.get("name") == REMOTE and engine.get("url"):
        more = engine.get("more_urls")
        return f"{REMOTE} {engine['url'].partition('://')[2].rstrip('/')}" + (f" and {len(more)} more" if more else "")
    return "+".join(engine[stage]["name"] for stage in STAGES if stage in engine) or str(engine.get("name"))


def _parts(cell: Named) -> dict[str, str]:
    """Return the parts of a cell's name by key: engine, scenario, study, then what was typed, where it has effect."""
    spec = flatten(cell.spec)
    typed = dict(text.lstrip("+").split("=", 1) for text in cell.overrides if "=" in text)
    case = next((value for key, value in typed.items() if key.startswith("study/")), None)
    parts = {"study": typed["study"]} if "study" in typed else {}
    chosen = {"engine": engine_name(cell.spec), "scenario": shown(spec.get("scenario"))}
    if case:  # a study that has a file for each cell names them
        parts |= {"case": case} | {key: value for key, value in chosen.items() if key in typed}
    else:
        parts = chosen | parts
    ours = usual(1 + len(spec.get("engine.more_urls") or ())) if spec.get("engine") == REMOTE else {}
    for key in (key.rpartition("@")[2] for key in typed):
        if ours and (key in ("engine.url", "engine.more_urls") or spec.get(key) == ours.get(key)):
            continue  # in the engine's name, or what `grbench load` chose
        if key not in parts and (value := _value(spec, key)) is not None and not _is_stage(key):
            parts[key] = shown(value)
    return parts


def _is_stage(key: str) -> bool:
    group, _, stage = key.partition(".")
    return group == "engine" and stage in STAGES


def _value(spec: dict[str, Any], key: str) -> Any:
    return spec.get(key, spec.get(f"{key}.name"))


def _add_differences(cells: Sequence[Named], parts: Sequence[dict[str, str]], ignore: Sequence[str]) -> None:
    """Add the options in which cells with equal parts differ."""
    alike: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
        alike.setdefault(str(part), []).append(i)
    for group in alike.values():
        specs = [flatten(cells[i].spec) for i in group]
        if all(spec == specs[0] for spec in specs):
            continue
        for key in knobs([cells[i] for i in group], ignore):
            for i, spec in zip(group, specs, strict=True):
                if key in spec:
                    parts[i].setdefault(key, shown(spec[key]))


def _union(parts: Sequence[dict[str, str]]) -> dict[str, None]:
    return dict.fromkeys(key for part in parts for key in part)


def _text(parts: dict[str, str], spec: dict[str, Any]) -> Iterator[str]:
    """Yield the parts of a name as texts. An option has its last word, or its key if two options end alike."""
    words = Counter(key.rpartition(".")[2] for key in spec)
    for key, value in parts.items():
        word = key.rpartition(".")[2]
        if key in BARE or (key == "engine.precision" and value != "auto"):
            yield value
            continue
        yield f"{word if words[word] < 2 else key.removeprefix('engine.')}={value}"


def shown(value: Any) -> str:
    """Return a value as a user types it: null, true, 0.5, 200, [16,32]."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


class Code(str):
    """A text that pages show as code, such as a command."""


def command(record: RunRecord) -> Code:
    """Return the command line that measures this cell again."""
    own = ["--config-dir", record.config_dir] if record.config_dir else []
    if any(o.startswith("study=") for o in record.overrides):
        own.append("hydra.mode=RUN")  # not the whole study
    return Code(shlex.join(["python", "-m", "grbench", *own, *record.overrides]))


def named(names: Sequence[str]) -> str:
    """Return names as one text, as many of them as MOST_NAMES allows, and how many more there are."""
    fit = next(count for count in range(len(names), 0, -1) if count == 1 or len("; ".join(names[:count])) <= MOST_NAMES)
    return "; ".join(names[:fit]) + (f"; and {len(names) - fit} more" if fit < len(names) else "")


def number_of(count: int, noun: str) -> str:
    """Return a number with its noun: "1 cell", "2 cells"."""
    return f"{count} {noun}" + "s" * (count != 1)


def counted(count: int, noun: str) -> str:
    """Return a number with its noun and the verb: "1 cell is", "2 cells are"."""
    return f"{number_of(count, noun)} {'is' if count == 1 else 'are'}"


def figure(value: float | None) -> str:
    """Format a number for a table: at least three significant digits, two below 0.1; "-" for None and NaN."""
    if value is None or value != value:
        return MISSING
    if abs(value) >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:#.3g}".removesuffix(".") if abs(value) >= 0.1 else f"{value:.2g}"


def with_interval(value: float | None, ends: Sequence[float] | None) -> str:
    """Return a figure with its interval, if there is one: "5.23 [4.91, 6.02]"."""
    text = figure(value)
    return f"{text} [{figure(ends[0])}, {figure(ends[1])}]" if ends and text != MISSING else text
