"""`grbench ui` and `grbench import`: MLflow's pages of an output root, and records that MLflow does not have."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from grbench.config.arguments import Arguments, CommandError
from grbench.execution.records import one_line
from grbench.tracking import import_records
from grbench.tracking.config import VIEW, VIEW_TAG, MlflowConfig, check_uri
from grbench.tracking.database import FILE, uri_of

# Runs a command until it ends or this shell's standard input does, however its parent ends, then ends all processes of
# the command: by SIGTERM, because on Ctrl-C those of MLflow print tracebacks.
TOGETHER = '{ "$@"; kill -TERM 0; } & read -r _; kill -TERM 0'


def ui_parser() -> argparse.ArgumentParser:
    """Return the parser of `grbench ui`."""
    parser = Arguments("ui", "Open MLflow's pages on this machine (127.0.0.1).", ["ui", "ui outputs --port 5001"])
    _add_root(parser)
    parser.add_argument("--port", type=int, default=5000, help="port of the pages (default: %(default)s)")
    return parser


def ui(words: Sequence[str]) -> int:
    """Run `grbench ui` until MLflow's server ends. Exit codes: 1 it ended by itself, 2 no database, or a taken port."""
    args = ui_parser().parse_args(words)
    if not 1 <= args.port <= 65535:
        raise CommandError(f"--port {args.port}: allowed is 1 to 65535")
    try:
        return open_ui(args.root, args.port)
    except (ValueError, OSError) as e:
        raise CommandError(one_line(e)) from e


def import_parser() -> argparse.ArgumentParser:
    """Return the parser of `grbench import`."""
    about = "Log every record under a folder that has no MLflow run yet."
    parser = Arguments("import", about, ["import outputs", "import outputs --uri http://127.0.0.1:5000"])
    _add_root(parser)
    parser.add_argument("--uri", help="MLflow store (default: the sqlite file of the output root)")
    where = f"experiment of the runs (default: any has them, new ones go to {MlflowConfig.experiment})"
    parser.add_argument("--experiment", help=where)
    return parser


def import_(words: Sequence[str]) -> int:
    """Run `grbench import`. Exit codes: 0 done, 1 some records could not be logged, 2 there are no records."""
    args = import_parser().parse_args(words)
    try:
        check_uri("--uri", args.uri)
        logged, known, failed = import_records(args.root, args.uri, args.experiment)
    except (ValueError, OSError) as e:
        raise CommandError(one_line(e)) from e
    print(f"{logged} records logged, {known} were there already, {failed} failed")
    return 1 if failed else 0


def _add_root(parser: argparse.ArgumentParser) -> None:
    where = "folder with records (default: %(default)s)"
    parser.add_argument("root", nargs="?", type=Path, default=Path("outputs"), metavar="ROOT", help=where)


def open_ui(root: Path, port: int) -> int:
    """Run `mlflow ui` for the root's database, on localhost only. Returns 1 if it ends by itself.

    Raises ValueError if there is no database, and KeyboardInterrupt for a signal.
    """
    database = root.resolve() / FILE
    if not database.is_file():
        raise ValueError(f"{database}: no such database; the first run of `python -m grbench` creates it")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise ValueError(f"port {port}: {e.strerror}; choose another with --port") from None
    print(f"MLflow at http://127.0.0.1:{port}/{_page(database)} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--uvicorn-opts", "--log-level warning"]  # else it prints a line for each request
    command += ["--registry-store-uri", uri_of(database)]
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # eight processes that runs never use
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # MLflow's own
    shell = ["sh", "-c", TOGETHER, "sh", *command, "--backend-store-uri", uri_of(database)]
    server = subprocess.Popen(shell, stdin=subprocess.PIPE, start_new_session=True)
    try:
        _end_abandoned(database)
        server.wait()
        return 1
    finally:
        assert server.stdin is not None
        server.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def _end_abandoned(database: Path) -> None:
    """End the runs of sweeps that were killed. The pages show also without it."""
    from grbench.tracking.database import client
    from grbench.tracking.store import end_abandoned

    with contextlib.suppress(Exception):
        store = client(uri_of(database))
        end_abandoned(store, [experiment.experiment_id for experiment in store.search_experiments()])


def _page(database: Path) -> str:
    """Return the page that is opened: the runs of the newest run's experiment, as a table of the main figures."""
    newest = "SELECT experiment_id FROM runs ORDER BY start_time DESC LIMIT 1"
    view = "SELECT 1 FROM experiment_tags WHERE experiment_id = ? AND key = ?"
    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=1)) as connection:
            if not (row := connection.execute(newest).fetchone()):
                return ""
            shared = connection.execute(view, (row[0], VIEW_TAG)).fetchone()
    except sqlite3.Error:  # the link then leads to the start page
        return ""
    # Without the type of work MLflow shows its pages for language models.
    page = f"#/experiments/{row[0]}/runs?workflowType=machine_learning"
    return f"{page}&viewStateShareKey={VIEW}" if shared else page
