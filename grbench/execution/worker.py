"""The worker: a fresh process for one cell, or for several of one engine. Only workers touch engines and devices.

    python -m grbench.execution.worker JOB.json

It reads the cell from the job file and reports on file descriptor `report_fd`, one JSON object a line: {"stage": ...},
{"answered": n}, {"so_far": {...}} with the outcome so far, {"again": why} for a cell to be measured again, and at the
end {"outcome": {...}}. Its standard output and errors are the cell's log. If `keep` is true in the job file, it keeps
its engine after a cell that is OK and reads the path of the next job file from `jobs_fd`.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import resource
import select
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from grbench.config.schema import spec_from_json
from grbench.execution.clock import ClockMovedError
from grbench.execution.environment import code_digest
from grbench.execution.kept import KeptEngine
from grbench.execution.records import Outcome, Status, one_line

# How libraries say it that have no exception for it: PyTorch, the system, C++, ONNX Runtime, CUDA.
NO_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "Failed to allocate memory"),
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
)
GRACE_S = 60  # of a launcher that does not stop its worker at the time limit: it may be stopped itself


def main() -> None:
    """Measure the cell of the job file and report its outcome; then, if it says so, the cells that follow."""
    code = code_digest()  # of what is imported now: a file may be edited before a later cell
    job = json.loads(Path(sys.argv[1]).read_text())
    channel = os.fdopen(job["report_fd"], "w", buffering=1)
    threading.Thread(target=_end_with_launcher, args=[job["report_fd"]], daemon=True).start()
    if limit := job["memory_limit_bytes"]:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    kept = KeptEngine() if job["keep"] else None

    def report(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    with os.fdopen(job["jobs_fd"]) as jobs:
        while job is not None:
            faulthandler.dump_traceback_later(job["timeout_s"] + GRACE_S, exit=True)
            _measure(job, code, report, kept)
            faulthandler.cancel_dump_traceback_later()
            job = _next_job(jobs) if kept is not None and kept.fit else None
    if kept is not None and kept.fit:
        kept.close()
    channel.close()
    os._exit(0)  # a load generator's thread may be waiting for answers that will not come


def _measure(job: dict[str, Any], code: str, report: Callable[[dict[str, Any]], None], kept: KeptEngine | None) -> None:
    """Measure one cell and report its outcome. code: the digest of this process's code."""
    outcome = Outcome(code=code)
    try:
        from grbench.execution.cell import Cell  # imports torch, which may take more memory than the limit

        Cell(spec_from_json(job["spec"]), Path(job["folder"]), outcome, report).run(kept)
        outcome.status = Status.OK
    except BaseException as e:
        outcome.status, outcome.error = classify(e)
        if isinstance(e, ClockMovedError):
            report({"again": str(e)})
        with contextlib.suppress(OSError):  # the log's disk may be full: the outcome is still reported
            if outcome.status is Status.STOPPED:  # as asked, and nothing is wrong
                print(outcome.error, file=sys.stderr)
            else:
                traceback.print_exc()
    outcome.waits = kept is not None and kept.fit
    report({"outcome": asdict(outcome)})


def _next_job(jobs: TextIO) -> dict[str, Any] | None:
    """Wait for the next cell, whose log takes the output from now on. Returns None if there is none."""
    line = jobs.readline().strip()
    if not line:
        return None
    job: dict[str, Any] = json.loads(Path(line).read_text())
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return job


def _end_with_launcher(report_fd: int) -> None:
    """Wait until the launcher is gone, then end this process and its helpers: nobody takes the result."""
    gone = select.poll()
    gone.register(report_fd, 0)  # it reports POLLERR once a pipe has no reader
    gone.poll()
    os.killpg(0, signal.SIGKILL)


def classify(error: BaseException) -> tuple[Status, str]:
    """Return the status that an exception means, and one line about it."""
    from grbench.scenarios.growth import HopelessError
    from grengines.api import UnavailableError
    from grengines.numerics import IncorrectError
    from grengines.runtime.cache_dir import in_cache

    line = one_line(error, most=5000)
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        return Status.DISK_FULL, f"no space left while the cell ran: {line}; free some and run it again"
    if any(out_of_memory(e) for e in chain):
        return Status.OOM, f"memory ran out: {textwrap.shorten(line, 160)}; try a smaller batch, history or model"
    if isinstance(error, HopelessError):
        return Status.STOPPED, line
    if isinstance(error, UnavailableError):
        return Status.UNAVAILABLE, line
    if isinstance(error, IncorrectError):
        return Status.INCORRECT, line
    if any(isinstance(e, OSError) and in_cache(e.filename) for e in chain):
        return Status.ERROR, f"{line}; set GRBENCH_CACHE to a folder that can be written"
    if isinstance(error, ValueError):  # bad data or options: the message is enough
        return Status.ERROR, line
    return Status.ERROR, f"{type(error).__name__}: {line}"


def out_of_memory(error: BaseException) -> bool:
    """Return True if the host's or the device's memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in NO_MEMORY)  # of any type: ONNX Runtime has its own


if __name__ == "__main__":
    main()
