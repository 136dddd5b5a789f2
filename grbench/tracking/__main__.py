"""`python -m grbench.tracking`: the MLflow UI of an output root, and records that MLflow has not seen."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sqlite3
import sys
from pathlib import Path

from grbench.execution.records import one_line
from grbench.tracking import import_records
from grbench.tracking.config import MlflowConfig


def main() -> int:
    """Entry point. Exit codes: 0 done, 1 some records could not be logged, 2 what was asked for can't be done."""
    parser = argparse.ArgumentParser(prog="python -m grbench.tracking", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ui = commands.add_parser("ui", help="open MLflow's pages on this machine (127.0.0.1)")
    ui.add_argument("--port", type=int, default=5000, help="(default: %(default)s)")
    imports = commands.add_parser("import", help="log the records that have no run yet")
    for command in (ui, imports):
        command.add_argument("root", nargs="?", type=Path, default=Path("outputs"), help="(default: %(default)s)")
    imports.add_argument("--uri", help="of the store (default: the sqlite file of the output root)")
    imports.add_argument("--experiment", default=MlflowConfig.experiment, help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        if args.command == "ui":
            open_ui(args.root, args.port)
            return 0
        logged, known, failed = import_records(args.root, MlflowConfig(uri=args.uri, experiment=args.experiment))
    except (ValueError, OSError) as e:
        print(f"grbench.tracking: {one_line(e)}", file=sys.stderr)
        return 2
    print(f"{logged} records logged, {known} were there already, {failed} failed")
    return 1 if failed else 0


def open_ui(root: Path, port: int) -> None:
    """Become `mlflow ui` for the root's database, on localhost only. Raises ValueError if there is none."""
    database = root.absolute() / "mlruns.db"
    if not database.is_file():
        raise ValueError(f"{database}: no such database; `python -m grbench` makes it with its first run")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise ValueError(f"port {port}: {e.strerror}; choose another with --port") from None
    page = f"#/experiments/{experiment}/runs" if (experiment := _latest_experiment(database)) else ""
    print(f"MLflow at http://127.0.0.1:{port}/{page} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [*command, "--backend-store-uri", f"sqlite:///{database}"])


def _latest_experiment(database: Path) -> str | None:
    """The experiment of the newest run: its page is the one to open."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=1)) as connection:
            row = connection.execute("SELECT experiment_id FROM runs ORDER BY start_time DESC LIMIT 1").fetchone()
    except sqlite3.Error:  # only the link gets less direct
        return None
    return str(row[0]) if row else None


if __name__ == "__main__":
    sys.exit(main())
