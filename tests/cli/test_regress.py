"""`make regress`: measure, compare with the baselines in reports/, and fail if a cell is slower."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers.cells import write_cell
from helpers.checkout import ROOT
from helpers.command import Grbench

SHA = "0123456789" * 4
HERE = {"git_sha": SHA, "cpu": "Some CPU", "cpu_cores": 2, "gpus": []}
THERE = {"git_sha": SHA, "cpu": "Another CPU", "cpu_cores": 64, "gpus": []}


def measure(folder: Path, environment: dict[str, object], rate: float) -> None:
    for seed in range(5):
        metrics = {"throughput_rps": rate * (1 + 0.001 * seed)}
        options = ["scenario=offline", f"seed={seed}"]
        write_cell(folder / str(seed), *options, metrics=metrics, environment=environment)


def make(folder: Path, compared: int = 0) -> tuple[int, str, list[list[str]]]:
    """Run `make regress` with a program that does nothing as Python: its exit code, output, and what it was to run."""
    (folder / "venv").mkdir(exist_ok=True)
    for name in ("pyproject.toml", "constraints.txt", "venv/.ready"):
        (folder / name).touch()
    program, commands = folder / "program", folder / "commands"
    program.write_text(f'#!/bin/sh\necho "$@" >> {commands}\ncase $3 in compare) exit {compared};; esac\n')
    program.chmod(0o755)
    commands.write_text("")
    words = ["make", "-f", str(ROOT / "Makefile"), "regress", "VENV=venv", f"PY={program}", "GPU=0"]
    # `make test ARGS=...` passes its ARGS on to each make below it.
    env = {name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES")}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, env=env)
    return done.returncode, done.stdout + done.stderr, [line.split() for line in commands.read_text().splitlines()]


def test_without_a_baseline_nothing_is_measured(tmp_path: Path) -> None:
    code, said, ran = make(tmp_path)
    assert code and "experiments/README.md (regress) has the commands" in said and not ran


@pytest.mark.parametrize(("rate", "expected"), [(100.0, 0), (97.0, 0), (80.0, 1), (120.0, 0)])
def test_the_baseline_of_this_machine_judges(tmp_path: Path, grbench_here: Grbench, rate: float, expected: int) -> None:
    """The commands of experiments/README.md make baselines; that of another machine does not count."""
    for name, environment, base in (("here", HERE, 100.0), ("there", THERE, 500.0)):
        measure(tmp_path / "outputs" / name, environment, base)
        keep = ["reports", f"regress_{name}", "--keep", f"outputs/{name}"]
        refused = grbench_here(*keep)
        assert refused.returncode == 2 and "echo '# TITLE' > reports/" in refused.stderr
        (tmp_path / "reports" / f"regress_{name}").mkdir(parents=True)
        (tmp_path / "reports" / f"regress_{name}" / "notes.md").write_text(f"# Baseline of {name}\n")
        assert grbench_here(*keep).returncode == 0
    code, said, [measured, compared] = make(tmp_path)
    assert code == 0, said
    new = measured[-1].removeprefix("hydra.sweep.dir=")
    assert measured[2] == "study=regress" and compared[-3:] == [new, "--tolerance", "0.05"]
    measure(tmp_path / new, HERE, rate)
    done = grbench_here(*compared[2:])
    assert done.returncode == expected, done.stdout
    assert make(tmp_path, done.returncode)[0] == (2 if expected else 0)  # make exits with 2 for any failure
    assert make(tmp_path, 3)[0] == 0  # undecided
    assert make(tmp_path, 4)[0] == 2  # a change without an interval


def test_a_baseline_of_another_machine_alone_is_nothing_to_compare_with(tmp_path: Path, grbench_here: Grbench) -> None:
    measure(tmp_path / "base", THERE, 100.0)
    measure(tmp_path / "new", HERE, 100.0)
    done = grbench_here("compare", "base", "new")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
