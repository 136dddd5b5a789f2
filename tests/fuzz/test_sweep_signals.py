"""Signals at random moments of a sweep: records are whole, and no process is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.fuzz import for_seconds
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from grbench.execution import records
from grbench.execution.records import Status

SWEEP = [
    "-m",
    "engine=hstu",
    "model=hstu_tiny",
    "workload=synthetic",
    "workload.max_requests=64",
    "workload.max_history=64",
    "scenario=closed_loop",
    "scenario.queries=64",
    "gate.requests=2",
    "warmup_batches=1",
    "seed=0,1",
    "engine.cpu_threads=1,2",
]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)


def left(root: Path) -> list[str]:
    """Return the commands of the processes that name a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(root) in word for word in words) and process.pid != os.getpid():
            found.append(" ".join(words))
    return found


def signalled(
    command: list[str], folder: Path, number: signal.Signals, after_s: float, times: int, ends_within_s: float = 60
) -> tuple[int, str]:
    """Run a command, send it a signal, and return its exit code and output.

    Raises TimeoutExpired where it does not end in time, and then ends its whole group: `with` waits for the command.
    """
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as run:
        try:
            output, _ = run.communicate(timeout=after_s)
        except subprocess.TimeoutExpired:
            for _ in range(times):
                run.send_signal(number)
                time.sleep(0.05)
            try:
                output, _ = run.communicate(timeout=ends_within_s)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)
                raise
    return run.returncode, output


DEAF = "import os, time; os.fork(); time.sleep(600)"


def test_a_sweep_that_ignores_the_signal_fails_and_is_ended(tmp_path: Path) -> None:
    """It inherits that it ignores it. Its child holds the output open as well."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            signalled([sys.executable, "-S", "-c", DEAF, str(tmp_path)], tmp_path, signal.SIGTERM, 0.5, 1, 0.5)
    finally:
        signal.signal(signal.SIGTERM, before)
    deadline = time.monotonic() + 60
    while (still := left(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not still


@pytest.mark.timeout(0)
def test_a_signal_at_any_moment_leaves_whole_records_and_no_process(tmp_path: Path, seconds: float) -> None:
    """Send one signal, or the same several times, to a sweep. The next call of it goes on from what is kept."""
    sent = 0

    phases = [Phase.explicit] if seconds == 0 else [Phase.explicit, Phase.generate]

    @settings(max_examples=4, deadline=None, phases=phases)
    @given(st.sampled_from(SIGNALS), st.floats(0, 25), st.integers(1, 3))
    @example(signal.SIGTERM, 6.0, 2)
    def check(number: signal.Signals, after_s: float, times: int) -> None:
        nonlocal sent
        sent += 1
        root = tmp_path / f"o{sent % 3}"  # most roots have records of an earlier call
        command = [sys.executable, "-m", "grbench", *SWEEP, f"runner.output_root={root}"]
        code, output = signalled(command, tmp_path, number, after_s, times)
        assert "Traceback" not in output, output
        assert code in (0, 128 + number, -number), (code, output)
        deadline = time.monotonic() + 60
        while (still := left(root)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not still
        assert records.unreadable([root]) == []
        kept = [record.status for _, record in records.find(root)]
        assert set(kept) <= {Status.OK, Status.INTERRUPTED}, kept
        if code == 0:
            assert kept.count(Status.OK) >= 4

    for_seconds(seconds, check)
