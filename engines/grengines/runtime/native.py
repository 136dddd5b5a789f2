"""The host's loops over the requests of a batch, in C (native.c), compiled when they are first used on a machine."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import shlex
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from grengines.runtime.atomic_io import replacing
from grkernels.cache_folder import cache_folder

SOURCE = Path(__file__).with_suffix(".c")
NAME = "grengines_native"
FLAGS = ("-O3", "-fwrapv", "-shared", "-fPIC")
NEEDS = "it needs a C compiler and Python's headers (apt-get install gcc python3-dev)"
LOADS = "delete the file, or set GRBENCH_CACHE to a folder whose files may be executed"

logger = logging.getLogger(__name__)


class Native:
    """The functions of native.c. If it can't be compiled or loaded, `functions` is None, and `problem` says why."""

    def __init__(self) -> None:
        self.functions: Any = None
        self.problem = ""
        try:
            self.functions = _load(_built())
        except (OSError, ValueError, ImportError) as e:
            self.problem = f"native.c can't be used: {e}"
            logger.warning("NumPy does the host's loops, more slowly: %s", self.problem)

    def actual(self) -> dict[str, str]:
        """Return the entry of a record."""
        return {"host_loops": f"NumPy: {self.problem}" if self.functions is None else "C"}


@cache
def native() -> Native:
    """Return the compiled functions. The first call on a machine compiles them, in about a second."""
    return Native()


def _built() -> Path:
    """Return the compiled file, which is made if it is not in the cache folder."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    include = [f"-I{sysconfig.get_path('include')}", f"-I{np.get_include()}"]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")  # has the version of Python and the kind of machine
    key = hashlib.sha256(repr((SOURCE.read_bytes(), FLAGS, np.__version__, suffix)).encode()).hexdigest()[:16]
    path = cache_folder() / "native" / f"{NAME}-{key}{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as made:
            _compile([*compiler, *FLAGS, *include, str(SOURCE), "-o", str(made)])
    return path


def _compile(command: list[str]) -> None:
    """Run the compiler. Raises ImportError with its first error."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=120)
    except subprocess.CalledProcessError as e:
        errors = [line.strip() for line in e.stderr.splitlines() if "error:" in line]
        raise ImportError(f"{[*errors, f'{command[0]} ended with {e.returncode}'][0]}; {NEEDS}") from e
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ImportError(f"{e}; {NEEDS}") from e


def _load(path: Path) -> Any:
    """Load the compiled file. Raises ImportError if the machine refuses it."""
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    spec = importlib.util.spec_from_file_location(NAME, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
    except ImportError as e:
        raise ImportError(f"{e}; {LOADS}") from e
    loader.exec_module(module)
    return module
