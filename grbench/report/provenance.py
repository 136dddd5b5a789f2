"""Origin of records: commit, machine and day, as a page names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grbench.execution.environment import machine_of
from grbench.report.frame import ReportError


@dataclass(frozen=True)
class Origin:
    """The commit and the machine of one record or results file."""

    commit: str  # 40 hex digits, then "+dirty" if files differed from the commit; "" if unknown
    machine: str  # processor, cores, GPUs

    @classmethod
    def of(cls, environment: dict[str, Any]) -> Origin:
        """Return the origin that `describe_environment` recorded."""
        return cls(environment.get("git_sha") or "", machine_of(environment))

    def __str__(self) -> str:
        sha, plus, dirty = self.commit.partition("+")
        return f"commit {sha[:12] + plus + dirty or 'unknown'}, {self.machine}"


def origin_line(environments: Sequence[dict[str, Any]]) -> str:
    """Return one line with every commit and machine. If they differ, it lists the rows (from 1) of each."""
    rows: dict[Origin, list[str]] = {}
    for number, environment in enumerate(environments, 1):
        rows.setdefault(Origin.of(environment), []).append(str(number))
    if len(rows) == 1:
        [origin] = rows
        text = str(origin)
        return f"{text[0].upper()}{text[1:]}."
    each = "; ".join(f"rows {', '.join(numbers)}: {origin}" for origin, numbers in rows.items())
    return f"**Rows of different origin are not comparable.** {each}."


def check_origin(environments: dict[str, dict[str, Any]]) -> Origin:
    """Return the one clean commit and machine of all records. environments: by the record's file.

    Raises ReportError, which names the files, if a commit is unknown or dirty, or if two records differ.
    """
    origins = {name: Origin.of(environment) for name, environment in environments.items()}
    for name, origin in origins.items():
        if not origin.commit:
            raise ReportError(f"{name}: git_sha is missing; measure again in a checkout, or set GRBENCH_GIT_SHA")
        if "+dirty" in origin.commit:
            raise ReportError(f"{name}: git_sha is {origin.commit}; commit the changes, then measure again")
    (first, one), *others = origins.items()
    for name, origin in others:
        if origin != one:
            raise ReportError(
                f"{first} has {one}, {name} has {origin}; a report has records of one commit and one machine"
            )
    return one
