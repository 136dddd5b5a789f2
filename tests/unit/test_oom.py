"""The count of processes that the kernel's out-of-memory killer has ended: of the own group, not of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from grbench.execution import oom


@pytest.mark.parametrize(
    ("line", "file", "kills"),
    [
        ("4:memory:/docker/ab", "memory/docker/ab/memory.oom_control", 2),
        ("7:cpu,memory:/docker/ab", "memory/memory.oom_control", 2),  # in a container the path is the host's
        ("0::/user.slice", "user.slice/memory.events.local", 2),
        ("0::/user.slice", "user.slice/memory.events", 2),  # before Linux 5.2
        ("0::/", "memory.stat", 9),  # the root group counts nothing
        ("3:cpuset:/", "memory/memory.oom_control", 9),
    ],
)
def test_another_groups_processes_are_not_counted(
    line: str, file: str, kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oom, "PROC", tmp_path / "proc")
    monkeypatch.setattr(oom, "CGROUPS", tmp_path / "cgroup")
    assert oom.kills() == 0  # no file says
    for path, text in {
        tmp_path / "proc/self/cgroup": f"9:name=systemd:/\n{line}\n",
        tmp_path / "proc/vmstat": "nr_free_pages 5\noom_kill 9\n",
        tmp_path / "cgroup" / file: "under_oom 0\noom_kill 2\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert oom.kills() == kills
