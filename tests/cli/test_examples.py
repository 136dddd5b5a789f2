"""The programs of examples/, as a user runs them, on less work."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from helpers.checkout import ROOT
from helpers.forks import fork_workers, in_fork
from helpers.serving import TINY, serving


def example(name: str, *arguments: str, folder: Path) -> str:
    """Run a program of examples/ in a folder, in a fork and with forked workers, and return its output."""
    path = str(ROOT / "examples" / name)

    def work() -> None:
        os.chdir(folder)
        sys.argv = [path, *arguments]
        fork_workers(pytest.MonkeyPatch())
        runpy.run_path(path, run_name="__main__")

    done = in_fork(work, folder, timeout=240)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_the_examples_measure_and_read_what_they_measured(tmp_path: Path) -> None:
    less = ["scenario.queries=32", "gate.requests=2", "warmup_batches=1"]
    compared = example("01_compare_engines.py", "workload=synthetic", "workload.visits=64", *less, folder=tmp_path)
    assert re.findall(r"^(\S+) +p50 \d", compared, re.MULTILINE) == ["hstu", "onnxruntime"]

    own = example("02_custom_workload.py", *less, folder=tmp_path)
    assert "the trace: requests 185, users 30, items 60" in own
    assert re.search(r"^\d+ requests/s on (cpu|cuda)$", own, re.MULTILINE)

    read = example("03_read_records.py", folder=tmp_path)
    assert sorted(re.findall(r"^ *(hstu|onnxruntime)\b", read, re.MULTILINE)) == ["hstu", "hstu", "onnxruntime"]


def test_the_example_client_ranks_and_appends(tmp_path: Path) -> None:
    with serving(*TINY, "engine=hstu", "serve.grpc_port=null") as server:
        said = example("client.py", server.url, folder=tmp_path)
    found = re.fullmatch(
        r"best first: \[(.*)\]\nanswered by hstu in [\d.]+ ms\nthe server has 4 events of user 7\n", said
    )
    assert found is not None, said
    assert sorted(map(int, found[1].split(", "))) == [50, 51, 52, 53]
