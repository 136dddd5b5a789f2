"""Processes that the kernel's out-of-memory killer has ended."""

from __future__ import annotations

from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def kills() -> int:
    """Return how many processes of this one's control group were ended so far, of the machine if it has no group.

    A worker is in the group of its launcher. Of the machine's other processes another user's or container's may have
    been ended while something else ended the worker. 0 if no file says.
    """
    for path in (*_of_group(), PROC / "vmstat"):
        try:
            pairs = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
        except (OSError, ValueError):
            continue
        if "oom_kill" in pairs:
            return int(pairs["oom_kill"])
    return 0


def _of_group() -> list[Path]:
    """Return the files that may count the kills of this process's group, the most specific first."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:  # number:controllers:path, without controllers in version 2
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            found.append((CGROUPS / "memory", path, ["memory.oom_control"]))
        elif not controllers:
            found.append((CGROUPS, path, ["memory.events.local", "memory.events"]))
    # In a container the path may be the host's: the group is then at the root of what the container sees.
    return [root / at / file for root, path, files in found for at in (path.lstrip("/"), ".") for file in files]
