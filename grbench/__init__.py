"""Experiments and benchmarks of generative-recommender inference.

`grbench.run` measures cells and `grbench.frame` reads their records. Importing the package imports nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grbench.api import frame, run
    from grbench.config.schema import ConfigError
    from grbench.execution.records import RunRecord, Status

__version__ = "0.1.0"
__all__ = ["ConfigError", "RunRecord", "Status", "__version__", "frame", "run"]

_HOMES = {
    "run": "grbench.api",
    "frame": "grbench.api",
    "ConfigError": "grbench.config.schema",
    "RunRecord": "grbench.execution.records",
    "Status": "grbench.execution.records",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
