"""Typed options with ranges, shared by every configuration dataclass.

Hydra and OmegaConf check keys and types when a configuration is composed; what they can't
express (ranges, choices) is declared here beside the field and checked by `violations`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from grkernels.nearest import nearest

TENSOR_PARALLEL = "processes that share the heads of each layer, each with a GPU of its own; a CPU only checks answers"
GRAPHS = ("auto", "true", "false")  # engine.cuda_graphs
WITH_GRAPHS = {"cuda_graphs": ("auto", "true"), "device": ("auto", "cuda")}  # where graphs are possible
URLS = "http://HOST:PORT or https://HOST:PORT, such as http://127.0.0.1:8000"


def option(
    default: Any,
    help: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: Sequence[str] | None = None,
    file: bool = False,
    url: bool = False,
    only_with: Mapping[str, Sequence[str]] = {},
) -> Any:
    """A dataclass field with a default, its meaning in words, and the values it allows (None: as its type says).

    file: the value names a file or a folder, whose content counts. url: it is the URL of a server. only_with: the
    option is read only if each of these others has one of the values; without values, one that is not 0, false or null.
    """
    allowed = {"ge": ge, "gt": gt, "le": le, "choices": tuple(choices) if choices else None, "url": url or None}
    allowed = {key: value for key, value in allowed.items() if value is not None}
    metadata = {"help": help, "file": file, "only_with": only_with, "allowed": allowed}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def describe(field: dataclasses.Field[Any]) -> str:
    """Return the values that a field allows, in words: type, then range or choices."""
    allowed = field.metadata.get("allowed", {})
    if "choices" in allowed:
        some = "any of" if str(field.type).startswith("list[") else "one of"
        return f"{some} {', '.join(allowed['choices'])}"
    if "url" in allowed:
        return URLS
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)  # str: of postponed annotations
    kind = kind.replace("]", "").replace("list[", "list of ").replace(" | None", " or null")
    bounds = [f"{sign} {allowed[key]}" for key, sign in (("ge", ">="), ("gt", ">"), ("le", "<=")) if key in allowed]
    return " ".join([kind, " and ".join(bounds)]).strip()


def allowed_instead(field: dataclasses.Field[Any], value: Any) -> str:
    """Return what a field allows instead of `value`, with the choice that is nearest to it."""
    return f"{nearest(value, field.metadata.get('allowed', {}).get('choices', ()))}allowed is {describe(field)}"


def violations(config: Any) -> Iterator[str]:
    """Yield one line for each value outside its range and each file that can't be read: key, value, what is allowed.

    `config` is an instance of a configuration dataclass; nested dataclasses are followed.
    """
    yield from _outside(config)
    for key, name in files(config).items():
        if not Path(name).exists():
            yield f"{key}={name}: no such file; set {key} to one that exists"
        elif not os.access(name, os.R_OK):
            yield f"{key}={name}: it can't be read; change its permissions or name another"


def _outside(config: Any, path: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        key = f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _outside(value, f"{key}.")
            continue
        for item in value if isinstance(value, list) else [value]:
            if item is not None and not _allows(allowed := field.metadata.get("allowed", {}), item):
                named = "url" in allowed and names_user(item)
                yield user_refused(key) if named else f"{key}={item}: {allowed_instead(field, item)}"


def idle(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each option that is not read because of another one: its key, and the reason with what changes it."""
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from idle(value, f"{path}{field.name}.")
        for other, needed in field.metadata.get("only_with", {}).items():
            has = getattr(config, other)
            if has not in needed if needed else not has:
                shown = has if isinstance(has, str) else json.dumps(has)
                change = f"set it to {' or '.join(needed)}" if needed else f"set {path}{other} too"
                yield f"{path}{field.name}", f"it is not read with {path}{other}={shown}; {change}, or leave it out"


def files(config: Any) -> dict[str, str]:
    """Return the options that name a file or a folder: key and value."""
    return {key: getattr(owner, key.rpartition(".")[2]) for key, owner in _file_options(config)}


def expand_home(config: Any) -> None:
    """Write the home folder for ~ into the options that name a file."""
    for key, owner in _file_options(config):
        name = key.rpartition(".")[2]
        setattr(owner, name, str(Path(getattr(owner, name)).expanduser()))


def _file_options(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _file_options(value, f"{path}{field.name}.")
        elif field.metadata.get("file") and value is not None:
            yield f"{path}{field.name}", config


def _allows(allowed: dict[str, Any], value: Any) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return (
        ("choices" not in allowed or value in allowed["choices"])
        and ("url" not in allowed or is_url(value))
        and ("ge" not in allowed or value >= allowed["ge"])
        and ("gt" not in allowed or value > allowed["gt"])
        and ("le" not in allowed or value <= allowed["le"])
    )


def is_url(text: str) -> bool:
    """Return whether a text is the URL of a server, as URLS says."""
    if names_user(text):
        return False
    try:
        parts = urlsplit(text)
        named = parts.port != 0 and bool(parts.hostname)  # a port that is no number raises ValueError
    except ValueError:
        return False
    return named and parts.scheme in ("http", "https") and (parts.path, parts.query, parts.fragment) in (
        ("", "", ""), ("/", "", ""),
    )  # fmt: skip


def names_user(url: str) -> bool:
    """Return whether a URL has a user or a password in it, which records would keep."""
    return "@" in url


def user_refused(key: str) -> str:
    """Return the error for a URL that names a user. It does not repeat the URL."""
    return f"{key}: a URL with a user or a password would be recorded; allowed is {URLS}; give engine.api_key_file=FILE"


@dataclass
class DeviceOptions:
    """Options of every engine that computes on a device of its choice."""

    name: str = option("engine", "name of the engine")
    device: str = option("auto", "auto: cuda if the engine can use a GPU here", choices=["auto", "cpu", "cuda"])
    precision: str = option("auto", "auto: bf16 on cuda, fp32 on cpu", choices=["auto", "fp32", "fp16", "bf16"])
    cpu_threads: int = option(0, "0: the choice of the library that computes", ge=0, le=1024)


@dataclass
class GraphOptions(DeviceOptions):
    """Options of an engine that captures CUDA graphs."""

    cuda_graphs: str = option("auto", "whether steps are captured", choices=GRAPHS)

    def __post_init__(self) -> None:
        self.cuda_graphs = str(self.cuda_graphs).lower()  # true and false come as booleans


@dataclass
class BucketOptions(GraphOptions):
    """Options of an engine whose CUDA graphs have buckets of batches."""

    cuda_graphs: str = option(
        "auto",
        "graphs of batches, by sequences and total tokens; auto: those that are measured to pay, none on a CPU or with "
        "tensor_parallel",
        choices=GRAPHS,
    )
    graph_lengths: list[int] = option(
        [], "tokens of a sequence for which there are graphs; empty: those that the requests need", ge=16,
        only_with=WITH_GRAPHS,
    )  # fmt: skip
