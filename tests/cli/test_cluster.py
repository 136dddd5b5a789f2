"""Sweeps on clusters: a real Ray of one node, and jobs of submitit under programs that stand for Slurm's."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers.beside import QUICK, SLOW, found, measures, two_cores, until
from helpers.cells import write_cell
from helpers.checkout import ROOT
from helpers.command import Grbench
from helpers.forks import fork_command
from helpers.ray_cluster import LOCAL_ONLY

from grbench.config.schema import ConfigError, RunnerConfig, SlurmConfig
from grbench.execution import ray_places, records, slurm_places
from grbench.execution.environment import describe_environment
from grbench.execution.records import Status

RAY = ["runner.cluster=ray", "runner.parallel=2"]
SLURM = ["runner.cluster=slurm", "runner.parallel=2"]
on_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core holds one place")


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[psutil.Process]:
    """A Ray cluster of one node with two cores, to which commands connect."""
    start = [sys.executable, "-m", "helpers.ray_cluster", "2"]
    with two_cores():
        cluster = subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert cluster.stdin is not None and cluster.stdout is not None
    address = cluster.stdout.readline().strip()
    assert address, "its errors are above"
    for name, value in {"RAY_ADDRESS": address, **LOCAL_ONLY}.items():
        monkeypatch.setenv(name, value)
    yield psutil.Process(cluster.pid)
    cluster.stdin.close()
    cluster.wait(60)


@on_two_cores
def test_a_sweep_on_ray_keeps_the_record_of_every_cell(
    ray_cluster: psutil.Process, grbench: Grbench, tmp_path: Path
) -> None:
    """One of three cells ends well, one loses the process of Ray, one is stopped with the command.

    The command's output root is the folder out of whichever process names it, so that Ray's node has another one. It is
    no fork: gRPC, which other tests of this process may have used, does not connect in one.
    """
    words = ["-m", *SLOW, "scenario.queries=16,5000,6000", *RAY, "runner.output_root=/proc/self/cwd/out"]
    said = tmp_path / "err.txt"
    with said.open("w") as errors:
        command = subprocess.Popen([sys.executable, "-m", "grbench", *words], cwd=tmp_path, stderr=errors, text=True)
    try:
        until(lambda: measures(said.read_text(), 2) and measures(said.read_text(), 3), command)
        fine = found(tmp_path)[16]
        assert fine.status is Status.OK, fine.error
        assert fine.environment["host"] == os.uname().nodename
        assert fine.environment["cpu_cores"] == 1
        assert fine.environment["beside"]["cells"] == 1
        [freed] = fine.environment["beside"]["cores"]  # the third cell runs there
        places = {
            process.cmdline()[-1]: process
            for process in ray_cluster.children(recursive=True)
            if "grbench.execution.place" in process.cmdline()
        }
        [actor] = [place.parent() for core, place in places.items() if core != str(freed)]
        assert actor is not None and actor.name().startswith("ray::Remote")
        on_node = Path(actor.environ()["TMPDIR"])
        assert list(on_node.glob("grbench-*/2")), "the node does not see the output root"
        actor.kill()
        until(lambda: 5000 in found(tmp_path), command)
        lost = found(tmp_path)[5000]
        assert lost.status is Status.KILLED
        assert lost.error is not None and "was lost" in lost.error and lost.error.endswith("; run it again")
        assert lost.environment["cpu_cores"] == 1
        os.kill(command.pid, signal.SIGINT)
        assert command.wait(60) == 130, said.read_text()
        stopped = found(tmp_path)[6000]
        assert stopped.status is Status.INTERRUPTED
        assert stopped.error == "SIGINT ended the command while the cell ran", "it came to the place"
        assert "Traceback" not in said.read_text()
        _, alive = psutil.wait_procs(places.values(), 30)
        assert not alive
        assert not list(on_node.glob("grbench-*/[02]")), "they are here now"
    finally:
        command.kill()

    again = grbench("-m", *SLOW, "scenario.queries=16,5000,32", *RAY, "runner.output_root=out")
    assert again.returncode == 1, again.stderr
    assert "16: OK in a record of" in again.stderr
    assert "5000: KILLED in a record of" in again.stderr
    assert "kept (rerun_failed=true measures it again)" in again.stderr
    assert again.stderr.count(": measuring") == 1
    assert found(tmp_path)[32].status is Status.OK, "written where both see it"


SILENT = """
import sys, time
from pathlib import Path

from grbench.cli import main
from grbench.execution import places, ray_places


class Silent(ray_places.Remote):
    def pack(self, folder):
        Path(asked).touch()
        time.sleep(600)


asked, places.END_S, ray_places.Remote = sys.argv[1], 1.0, Silent
sys.exit(main(sys.argv[2:]))
"""


def test_a_node_that_sends_no_record_keeps_no_signal_from_the_command(
    ray_cluster: psutil.Process, tmp_path: Path
) -> None:
    """Its place is killed after a second, where the command itself gives it longer."""
    words = ["-m", *QUICK, "scenario.queries=16", "runner.cluster=ray", "runner.parallel=1"]
    asked, said = tmp_path / "asked", tmp_path / "err.txt"
    start = [sys.executable, "-c", SILENT, str(asked), *words, "runner.output_root=/proc/self/cwd/out"]
    with said.open("w") as errors:
        command = subprocess.Popen(start, cwd=tmp_path, stderr=errors, text=True)
    try:
        until(asked.exists, command)
        os.kill(command.pid, signal.SIGINT)
        assert command.wait(60) == 130, said.read_text()
        stopped = found(tmp_path)[16]
        assert stopped.status is Status.INTERRUPTED
        assert stopped.error == "a signal ended the command before the record of the cell came"
        assert "Traceback" not in said.read_text()
    finally:
        command.kill()


def test_places_are_spread_over_the_nodes_of_ray() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}]
    assert ray_places._counts("gpus", nodes) == ([2, 0, 4], 2)
    assert ray_places._counts("3", nodes) == ([2, 0, 1], 4)
    assert ray_places._counts("2", nodes) == ([1, 0, 1], 8)
    with pytest.raises(ConfigError, match="has 6 GPUs, and cells never share one; allowed is at most 6"):
        ray_places._counts("7", nodes)
    processors = [{"CPU": 2.0}, {"CPU": 4.0}, {"memory": 1.0}]
    assert ray_places._counts("4", processors) == ([2, 2, 0], 1)
    assert ray_places._counts("3", processors) == ([1, 2, 0], 2), "nodes of different sizes give equal cores"
    assert ray_places._counts("2", [{"CPU": 8.0}, {"CPU": 32.0}]) == ([0, 2], 16)
    for parallel, why in (("gpus", "has no GPU"), ("none", "allowed are gpus and a number"), ("7", "6 cores")):
        with pytest.raises(ConfigError, match=why):
            ray_places._counts(parallel, processors)


def test_a_node_of_ray_with_fewer_cores_than_places_is_refused() -> None:
    part = object.__new__(ray_places.RayPart)
    part.host, part._size = "node", 2
    part.known = {"environment": describe_environment(), "host": "node", "cores": [0]}
    with pytest.raises(ConfigError, match=r"^runner\.cluster=ray: node: a cell needs 2 cores, and 1 are available"):
        part.check()


def test_a_record_that_comes_onto_a_full_disk_is_kept_elsewhere(tmp_path: Path) -> None:
    record = write_cell(tmp_path / "node")
    with tarfile.open(tmp_path / "packed", "w") as tar:
        tar.add(tmp_path / "node", ".")
    (tmp_path / "out").touch()  # no folder can be made in it
    folder = ray_places.unpacked((tmp_path / "packed").read_bytes(), tmp_path / "out" / "0")
    try:
        assert folder.parent == Path(tempfile.gettempdir())
        [note] = set(records.load(folder).notes) - set(record.notes)
        assert note.startswith(f"{tmp_path}/out/0 could not be written (")
        assert note.endswith(f"): this record is kept in {folder}")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state of programs that stand for Slurm's: a file for each job, named as its number."""
    programs, state = tmp_path / "bin", tmp_path / "state"
    programs.mkdir()
    state.mkdir()
    for program in ("sbatch", "srun", "sacct", "scancel"):
        (programs / program).symlink_to(ROOT / "tests" / "helpers" / "fake_slurm.sh")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(state))
    return state


def test_a_sweep_on_slurm_keeps_the_record_of_every_cell(slurm: Path, tmp_path: Path) -> None:
    """One of three cells ends well, the job of one is cancelled, and the node of one is lost."""
    cells, options = "scenario.queries=16,5000,6000", ["slurm.partition=night", "slurm.cores=2"]
    command = fork_command(tmp_path, "-m", *SLOW, cells, *SLURM, *options)
    said = tmp_path / "err.txt"
    try:
        until(lambda: any((tmp_path / "outputs" / "slurm").glob("*/3_*.out")), command)  # it has begun
        until(lambda: (slurm / "3").is_file() and bool((slurm / "3").read_text()), command)
        os.killpg(int((slurm / "3").read_text()), signal.SIGKILL)
        until(lambda: measures(said.read_text(), 2), command)
        fine = found(tmp_path)[16]
        assert fine.status is Status.OK, fine.error
        assert fine.environment["host"] == os.uname().nodename
        assert fine.environment["slurm"] == {"partition": "night", "cores": 2}
        assert fine.environment["beside"]["cells"] == 1
        [script] = (tmp_path / "outputs" / "slurm").glob("*/1_submission.sh")
        for line in ("--partition=night", "--cpus-per-task=2", "--no-requeue", "--time=35"):
            assert f"#SBATCH {line}\n" in script.read_text()
        subprocess.run(["scancel", "2"], check=True)
        assert command.wait(120) == 1, said.read_text()
        cancelled, lost = (found(tmp_path)[queries] for queries in (5000, 6000))
        assert (cancelled.status, lost.status) == (Status.KILLED, Status.KILLED)
        assert cancelled.error == "SIGTERM ended the process that measured it in job 2 of Slurm; run it again"
        assert lost.error is not None and "job 3 of Slurm ended as NODE_FAIL (its log is " in lost.error
        assert "Traceback" not in said.read_text()
    finally:
        command.kill()

    full = os.environ | {"FAKE_SLURM_IS_FULL": "1"}
    command = fork_command(tmp_path, "-m", *SLOW, f"{cells},32", *SLURM, *options, env=full)
    try:
        until((slurm / "4").exists, command)
        os.kill(command.pid, signal.SIGTERM)
        assert command.wait(60) == 143, said.read_text()
        assert (slurm / "4.cancelled").exists()
        assert said.read_text().count(", kept (rerun") == 3
        assert "interrupted with 1 of 4 cells to go; the same sweep goes on from here" in said.read_text()
        assert found(tmp_path)[32].status is Status.INTERRUPTED
    finally:
        command.kill()


@pytest.mark.parametrize(
    ("states", "ended"),
    [(["PREEMPTED"], True), (["SUSPENDED"], False), (["SUSPENDED", "CANCELLED by 0"], True), (["RESIZING"], False)],
)
def test_a_job_has_ended_by_what_slurm_says(slurm: Path, tmp_path: Path, states: list[str], ended: bool) -> None:
    """A suspended job goes on. A preempted one does not, since it is not queued again."""
    slurm_places.slurm_parts(RunnerConfig(), SlurmConfig(), tmp_path)
    watcher = importlib.import_module("submitit").SlurmJob.watcher
    (slurm / "1").touch()
    for state in states:
        (slurm / "1.state").write_text(f"{state}\n")
        watcher._last_status_check = 0.0
        found = watcher.is_done("1", mode="force")
    assert found == ended


def test_a_job_that_has_its_node_alone_has_no_cell_beside_it(slurm: Path, tmp_path: Path) -> None:
    runner = RunnerConfig(parallel="3")
    beside = [
        part.beside
        for exclusive in (False, True)
        for part in slurm_places.slurm_parts(runner, SlurmConfig(exclusive=exclusive), tmp_path)
    ]
    assert beside == [2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize(
    ("address", "words", "why"),
    [
        (
            "127.0.0.1:1",
            RAY,
            "no cluster answers at RAY_ADDRESS=127.0.0.1:1 ([Errno 111] Connection refused); start one with ",
        ),
        ("local", RAY, "RAY_ADDRESS=local: Ray would start here and listen on every network; start one with "),
        ("", ["runner.cluster=slurm"], "sbatch is not on the PATH; start this on a login node of the cluster"),
        ("", ["runner.cluster=kubernetes"], "allowed is one of none, ray, slurm"),
    ],
)
def test_a_cluster_that_is_not_there_is_refused(
    grbench_here: Grbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, words: list[str], why: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    done = grbench_here("-m", *QUICK, "seed=0,1", *words)
    assert done.returncode == 2
    assert why in done.stderr
    assert not list(records.find(tmp_path))


@pytest.mark.parametrize(
    ("module", "cluster", "fix"),
    [(ray_places, "ray", "pip install 'grbench[ray]'"), (slurm_places, "slurm", "pip install 'grbench[slurm]'")],
)
def test_a_package_that_is_not_there_is_refused(
    grbench_here: Grbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: object, cluster: str, fix: str
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    done = grbench_here("-m", *QUICK, "seed=0,1", f"runner.cluster={cluster}")
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith(f"is not installed; {fix}")
    assert not list(records.find(tmp_path))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["runner.parallel=gpus"], "it is the number of jobs at a time, from 1; slurm.gpus=1 gives each a GPU"),
        (["slurm.options=[reservation]"], "slurm.options=reservation: each is NAME=VALUE"),
        (["slurm.partition=closed"], "Slurm takes no job (sbatch: error: invalid partition specified: closed"),
        (["slurm.partition=closed", "runner.parallel=2"], "); places left: 1\n"),
        (
            ["runner.cluster=none", "slurm.gpus=1"],
            "slurm.gpus=1: only jobs of Slurm take it; add runner.cluster=slurm, or leave it out",
        ),
    ],
)
def test_what_slurm_cannot_do_is_refused(
    slurm: Path, grbench_here: Grbench, tmp_path: Path, words: list[str], why: str
) -> None:
    cluster = [] if "runner.cluster=none" in words else ["runner.cluster=slurm"]
    done = grbench_here("-m", *QUICK, "seed=0,1", *cluster, *words)
    assert done.returncode in (1, 2)
    assert why in done.stderr
    assert not list(records.find(tmp_path))
