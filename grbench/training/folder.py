"""The folder of a training: whose weights lie there, and what a stop leaves in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from grbench.config.schema import ConfigError
from grbench.execution import results
from grbench.execution.records import finite
from grbench.report.cells import flatten
from grbench.training import loop
from grbench.training.config import WEIGHTS

NAMED = 3  # options that an error names
NO_PART = ("out", "output_root", "tracking")  # options that change no figure


def require_own(folder: Path, config: dict[str, Any], identity: str) -> None:
    """Raise ConfigError if a folder has weights that a training of this configuration would not make.

    A checkpoint beside weights without results is of a training that was stopped; `loop.train` checks whose it is.
    """
    file, remedy = folder / WEIGHTS, "set another out=FOLDER, or remove the file to train anew"
    if not file.is_file():
        return
    made = _training(folder)
    if made is None:
        if (folder / loop.CHECKPOINT).is_file():
            return
        unknown = f"weights without the {results.RESULTS_FILE} of their training"
        raise ConfigError(f"{os.path.relpath(file)}: {unknown}; {remedy}")
    if made.get("identity") == identity:
        return
    theirs, own = _options(made["config"]), _options(config)
    different = [f"{key}={theirs.get(key)} and not {value}" for key, value in own.items() if theirs.get(key) != value]
    if different or "identity" in made:
        more = [f"{len(different) - NAMED} more"] * (len(different) > NAMED)
        what = ", ".join([*different[:NAMED], *more]) or "other contents of the files that the options name"
        raise ConfigError(f"{os.path.relpath(file)}: of a training with {what}; {remedy}")


def kept_line(folder: Path, out: str | None) -> str:
    """Return what is kept of a training that a signal ends, and how it goes on."""
    file = folder / loop.CHECKPOINT
    if not file.is_file():
        return "stopped before the first checkpoint: nothing of this training is kept; the same command begins it again"
    how = "the same command" if out else f"the same command with out={os.path.relpath(folder)}"
    kept = f"keeps the finished epochs, except those of the last {loop.SAVE_S:.0f} s"
    return f"stopped: {os.path.relpath(file)} {kept}; {how} goes on from there"


def _training(folder: Path) -> dict[str, Any] | None:
    """Return the results of the training whose weights lie in a folder; None if there are none."""
    try:
        made = results.load(folder / results.RESULTS_FILE)
    except (ValueError, OSError):
        return None
    return made if made.get("kind") == "train" and isinstance(made.get("config"), dict) else None


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a training depends on, by dotted key, as JSON keeps it."""
    values = {key: value for key, value in config.items() if key not in NO_PART}
    return flatten(json.loads(json.dumps(finite(values))))
