"""A place of a parallel sweep: a process that measures one cell at a time, on cores and a GPU of its own.

    python -m grbench.execution.place CORE,CORE,...

It reads a JSON list a line from standard input, the arguments of cells. It writes the messages of a cell's worker to
standard output, one a line, and at the end of the cell {"done": FOLDER, "signal": NUMBER}; 0: no signal ended it.
{"failed": WHY}: the cell cannot be measured here. It ends with the command that started it, however that ends, and
keeps the record of a cell that is running then.
"""

from __future__ import annotations

import json
import os
import platform
import select
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from grbench.config.schema import RunnerConfig, RunSpec, spec_from_json
from grbench.execution.gpu import visible_gpus
from grbench.execution.ranks import gpus_of
from grbench.execution.runner import Interrupted, run_cell
from grbench.execution.workers import Event, KeptWorker
from grbench.signals import ENDING, raised

Say = Callable[[Event], None]
_running = threading.Event()  # a cell is measured
_gone = threading.Event()  # the command is


def main() -> None:
    """Measure the cells of standard input."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # Ray blocks SIGINT in its processes, and this one inherits that
    os.sched_setaffinity(0, [int(core) for core in sys.argv[1].split(",")])
    threading.Thread(target=_end_with_command, daemon=True).start()
    measure(sys.stdin, lambda message: print(json.dumps(message), flush=True))


def measure(lines: Iterable[str], say: Say) -> None:
    """Measure the cells of each line until a signal comes. say: takes the messages."""
    kept: defaultdict[str, KeptWorker] = defaultdict(KeptWorker)
    try:
        with raised():
            for line in lines:
                _running.set()
                for cell in json.loads(line):
                    if _gone.is_set():  # since before `_running` was set: no signal comes
                        return
                    _measure(cell, kept[cell["lane"]], say)
                _running.clear()
    except KeyboardInterrupt:
        pass
    finally:
        for lane in kept.values():
            lane.close()


def _measure(cell: dict[str, Any], kept: KeptWorker, say: Say) -> None:
    """Measure one cell, and keep its worker if the options say so. Raises Interrupted after saying so."""
    spec, runner = spec_from_json(cell["spec"]), RunnerConfig(**cell["runner"])
    if cell["spec_hash"] and (why := _other_files(spec, cell["spec_hash"])):
        say({"failed": why})
        return
    gpu = ",".join(visible_gpus()[: gpus_of(spec.engine)]) or None
    own = {"cores": sorted(os.sched_getaffinity(0)), "gpu": gpu}
    try:
        _, folder = run_cell(
            spec,
            runner,
            Path(cell["folder"]),
            sweep_id=cell["sweep_id"],
            overrides=cell["overrides"],
            config_dir=Path(cell["config_dir"]) if cell["config_dir"] else None,
            on_event=say,
            kept=kept if runner.keep_engine else None,
            beside={"cells": cell["beside"], **own},
            facts=cell["facts"],
        )
    except Interrupted as interruption:
        say({"done": str(interruption.folder), "signal": interruption.number})
        raise
    say({"done": str(folder), "signal": 0})


def _other_files(spec: RunSpec, spec_hash: str) -> str:
    """Return in words why the files that options name are not here; "": they are those of the command."""
    try:
        if spec.hash == spec_hash:
            return ""
        why = f"the files that its options name ({', '.join(spec.file_contents()) or 'none'}) have other contents"
    except OSError as e:
        why = f"{e.filename}: {e.strerror}"
    return f"on {platform.node()}, {why}; copy them to every machine, under the same names"


def _end_with_command() -> None:
    """Wait until the command has gone, which shows as a closed pipe, then end a running cell as by a signal."""
    closed = select.poll()
    closed.register(sys.stdin.fileno(), 0)
    closed.poll()
    _gone.set()
    if _running.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
