"""A place of a parallel sweep: a process that measures one cell at a time, on cores and a GPU of its own.

    python -m grbench.execution.place CORE,CORE,...

It reads one JSON object a line from standard input, the arguments of a cell. It writes the messages of the cell's
worker to standard output, one a line, and at the end {"done": FOLDER, "signal": NUMBER}; 0: no signal ended the cell.
It ends with the command that started it, however that ends, and keeps the record of a cell that is running then.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from grbench.config.schema import RunnerConfig, spec_from_json
from grbench.execution.runner import Interrupted, run_cell
from grbench.execution.workers import KeptWorker
from grbench.signals import raised

_running = threading.Event()  # a cell is measured


def main() -> None:
    """Measure the cells of standard input."""
    os.sched_setaffinity(0, [int(core) for core in sys.argv[1].split(",")])
    threading.Thread(target=_end_with_command, daemon=True).start()
    kept = KeptWorker()
    try:
        with raised():
            for line in sys.stdin:
                _running.set()
                _measure(json.loads(line), kept)
                _running.clear()
    except KeyboardInterrupt:
        pass
    finally:
        kept.close()


def _measure(cell: dict[str, Any], kept: KeptWorker) -> None:
    """Measure one cell, and keep its worker if the options say so. Raises Interrupted after saying so."""
    runner = RunnerConfig(**cell["runner"])
    try:
        _, folder = run_cell(
            spec_from_json(cell["spec"]),
            runner,
            Path(cell["folder"]),
            sweep_id=cell["sweep_id"],
            overrides=cell["overrides"],
            config_dir=Path(cell["config_dir"]) if cell["config_dir"] else None,
            on_event=_say,
            kept=kept if runner.keep_engine else None,
            beside=cell["beside"],
        )
    except Interrupted as interruption:
        _say({"done": str(interruption.folder), "signal": interruption.number})
        raise
    _say({"done": str(folder), "signal": 0})


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _end_with_command() -> None:
    """Wait until the command has gone, which shows as a closed pipe, then end a running cell as by a signal."""
    gone = select.poll()
    gone.register(sys.stdin.fileno(), 0)
    gone.poll()
    if _running.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
