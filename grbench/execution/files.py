"""Files that cells name: what is wrong with them is said before a cell is recorded."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from grbench import __version__, workloads
from grbench.config.schema import ConfigError, RunSpec, weights_of
from grbench.workloads.config import TRACES, FileConfig
from grengines.models import header
from grengines.models.hstu.config import HSTUConfig, not_read
from grengines.runtime.cache_dir import content
from grkernels.cache_folder import cache_folder


def require_files(specs: Iterable[RunSpec]) -> None:
    """Raise ConfigError for a file that a cell can't use, before it is recorded: data with a wrong row, other weights.

    Of weights the header is read. Data is read through once: the cache folder remembers the content that was found to
    be usable. Each cell's worker reads it for itself.
    """
    checked: list[FileConfig] = []
    for spec in specs:
        require_weights(spec)
        if isinstance(spec.workload, FileConfig) and spec.workload not in checked:
            checked.append(spec.workload)
            try:
                known = _known_as_usable(spec.workload)
                if known is None or not known.exists():
                    workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
            except ValueError as e:
                raise ConfigError(str(e)) from None
            if known is not None:
                with contextlib.suppress(OSError):  # then the next command reads the file again
                    known.parent.mkdir(parents=True, exist_ok=True)
                    known.touch()


def _known_as_usable(config: FileConfig) -> Path | None:
    """Return the empty file that says that this content can be used with these options; None: there is no place."""
    try:
        of = {**dataclasses.asdict(config), "path": content(Path(config.path)), "name": Path(config.path).suffix}
        digest = hashlib.sha256(json.dumps([__version__, TRACES, of], sort_keys=True).encode()).hexdigest()
        return cache_folder() / "usable" / digest
    except (OSError, ValueError):
        return None


def require_weights(spec: RunSpec) -> None:
    """Raise ConfigError for weights or semantic IDs that the cell's models can't be filled from, by their headers."""
    generator = header.GENERATOR if isinstance(spec.model, HSTUConfig) else header.DECODER
    needed = {"model": ("rank", header.RANKER), "retrieval": ("generate", generator)}
    for part, path in weights_of(spec).items():
        if path is not None:
            task, kind = needed[part]
            _require_kind(f"{part}.weights", path, kind, header.MAKE_WEIGHTS)
            if isinstance(spec.model, HSTUConfig):
                with _named(f"{part}.weights"):
                    header.read(path).check_options(spec.model, not_read(task))
    if spec.retrieval is not None and spec.retrieval.semantic_ids is not None:
        _require_kind("retrieval.semantic_ids", spec.retrieval.semantic_ids, header.IDS, header.MAKE_IDS)


def _require_kind(key: str, path: str, kind: str, make: str) -> None:
    with _named(key):
        found = header.read(path, make).holds()
    if found != kind:
        raise ConfigError(f"{key}={path}: it holds {found}, and {kind} are needed here; {make}")


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """Put the option before an error that begins with its value."""
    try:
        yield
    except ValueError as e:
        raise ConfigError(f"{key}={e}") from None
