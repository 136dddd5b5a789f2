"""The records of earlier runs, which a sweep keeps instead of measuring a cell again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grbench.config.schema import RunSpec
from grbench.execution import records
from grbench.execution.environment import describe_environment, machine_of
from grbench.execution.records import RunRecord, Status

CONFIGURING = ("hydra-core", "mlflow")  # packages that read options and log results: no measurement depends on them


class EarlierRecords:
    """Records by measurement. Of each, the latest one that was made by this code on such a machine counts.

    machines: where cells run, each as the fields of its environment that are not as in this process.
    """

    def __init__(self, machines: Sequence[dict[str, Any]] = ({},)) -> None:
        self._machines = machines
        self._kept: dict[str, list[tuple[Path, RunRecord]]] = {}

    def read(self, root: Path, failed: bool) -> None:
        """Take the records under an output root. failed: also those that are not OK, except INTERRUPTED ones."""
        for folder, record in records.find(root):
            if record.status is not Status.INTERRUPTED and (record.ok or failed):
                self.add(folder, record)

    def add(self, folder: Path, record: RunRecord) -> None:
        """Take a record that was made since."""
        self._kept.setdefault(record.spec_hash, []).append((folder, record))

    def of(self, spec: RunSpec, timeout_s: float = 0.0) -> tuple[tuple[Path, RunRecord] | None, str]:
        """Return the record of a cell and its folder, or None, and then why its latest record is not kept ("": none).

        timeout_s: time limit of the cell. A TIMEOUT after less time does not tell whether it would end within it.
        Raises OSError for a file of the cell that can't be read.
        """
        why = ""
        here = describe_environment(spec.packages)
        for folder, record in reversed(self._kept.get(spec.hash, [])):
            differences = [environment_difference(record.environment, here | machine) for machine in self._machines]
            if record.status is Status.TIMEOUT and record.duration_s < timeout_s:
                ended = f"the TIMEOUT of {record.started_at} came after {record.duration_s:.0f} s"
                why = why or f"{ended}, and runner.timeout_s={timeout_s:g} is more"
            elif not all(differences):
                return (folder, record), ""
            why = why or f"the record of {record.started_at} is from {differences[0]}"
        return None, why


def environment_difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Return in words what sets the environment of a record apart from this one; "" if a figure would be the same.

    Which machine a job of Slurm gets is known only once it runs: what was asked for stands for it.
    """
    if "slurm" in here:
        if there.get("slurm") != here["slurm"]:
            return f"another request to Slurm ({there.get('slurm') or 'none'})"
        here = here | {"gpus": there.get("gpus")}
    elif (machine := machine_of(there)) != machine_of(here):
        return f"another machine ({machine})"
    if there.get("code") != here["code"]:
        commit = (there.get("git_sha") or "unknown")[:12]
        return f"other code (commit {commit})"
    drivers = [[gpu.get("driver") for gpu in environment.get("gpus") or []] for environment in (there, here)]
    if drivers[0] != drivers[1]:
        return f"GPU driver {drivers[0][0]}, here is {drivers[1][0]}"
    old, new = _versions(there), _versions(here)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            return f"{name} {old.get(name, '(none)')}, here is {new.get(name, '(none)')}"
    return ""


def _versions(environment: dict[str, Any]) -> dict[str, str]:
    found = {"python": environment.get("python"), **(environment.get("versions") or {})}
    return {name: str(version) for name, version in found.items() if name not in CONFIGURING}
