"""Two commands at once in one folder, and files that others read: nothing is overwritten, and each file is whole."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkout import ROOT, files
from helpers.command import Grbench

from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError
from grbench.execution import folders, records, runner
from grbench.execution.folders import left_out, only_command, only_writer, unused
from grbench.execution.records import Outcome, Status
from grbench.execution.results import save as save_results
from grbench.execution.workers import Worker
from grbench.report.frame import ReportError, read_cells
from grbench.workloads.events import Events
from grbench.workloads.item_map import save_items
from grengines.api import Catalogue
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import HSTURanker
from grengines.models.hstu.weights import save_weights
from grengines.runtime import atomic_io
from grengines.semantic.ids import SemanticIds
from grkernels.operators import Operators


def test_a_folder_in_use_is_left_to_its_user(tmp_path: Path) -> None:
    wanted = tmp_path / "a" / "0"
    with unused(wanted) as first, unused(wanted) as second:
        assert (first, second) == (wanted, wanted.with_name("0.1"))
        (second / records.RECORD_FILE).touch()
    with unused(wanted) as again:
        assert again == wanted  # it was held, and got no record
        (again / records.RECORD_FILE).touch()
    with unused(wanted) as third:
        assert third == wanted.with_name("0.2")


def test_a_command_is_refused_while_an_equal_one_runs_and_not_once_that_was_killed(tmp_path: Path) -> None:
    begun, says = os.pipe()
    if (command := os.fork()) == 0:
        with only_command(tmp_path, ["-m", "seed=0,1"]):
            os.write(says, b"!")
            signal.pause()
        os._exit(1)
    os.read(begun, 1)
    try:
        refusal = f"^process {command} runs the same command in .*output_root=FOLDER$"
        with pytest.raises(ConfigError, match=refusal), only_command(tmp_path, ["seed=0,1", "-m"]):
            raise AssertionError
        with only_command(tmp_path, ["-m", "seed=0,2"]):
            pass
    finally:
        os.kill(command, signal.SIGKILL)
        os.waitpid(command, 0)
    with only_command(tmp_path, ["-m", "seed=0,1"]):
        pass
    assert not list((tmp_path / ".running").iterdir())


def test_a_command_that_opened_the_file_of_one_that_ended_holds_the_next_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, opened = folders._locked, list[int]()

    def late(handle: int) -> bool:
        if not opened:
            next((tmp_path / ".running").iterdir()).unlink()  # as the command before does at its end
        opened.append(handle)
        return locked(handle)

    monkeypatch.setattr(folders, "_locked", late)
    with only_command(tmp_path, ["seed=0"]):
        with pytest.raises(ConfigError, match=f"^process {os.getpid()} "), only_command(tmp_path, ["seed=0"]):
            raise AssertionError
        (name,) = (tmp_path / ".running").iterdir()
        name.write_text("")  # as before the other one writes its number
        with pytest.raises(ConfigError, match=r"^another process runs "), only_command(tmp_path, ["seed=0"]):
            raise AssertionError


def test_a_command_makes_the_folder_again_that_another_removes_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, removed = Path.mkdir, list[Path]()

    def late(folder: Path, *args: Any, **options: Any) -> None:
        make(folder, *args, **options)
        if folder.name == ".running" and options.get("parents") and len(removed) < 2:
            removed.append(folder)
            folder.rmdir()
            folder.parent.rmdir()

    monkeypatch.setattr(Path, "mkdir", late)
    with only_command(tmp_path / "out", ["seed=0"]):
        assert len(list((tmp_path / "out" / ".running").iterdir())) == 1
    assert len(removed) == 2


@pytest.mark.parametrize("words", [["-m", "seed=0,1"], ["tune", "engine=hstu", "budget=1cells"]])
def test_a_sweep_and_a_search_are_refused_while_an_equal_one_runs(
    grbench_here: Grbench, forked_workers: None, tmp_path: Path, words: list[str]
) -> None:
    typed = [*words, f"runner.output_root={tmp_path}", "tracking=none"]
    with only_command(tmp_path, typed):
        refused = grbench_here(*typed)
        assert [path.name for path in tmp_path.iterdir()] == [".running"]  # no folder for results that never come
    assert refused.returncode == 2 and f"process {os.getpid()} runs the same command in " in refused.stderr


def test_a_search_is_refused_before_its_space_is_composed(grbench_here: Grbench, tmp_path: Path) -> None:
    """A search without any legal configuration says so, but not while an equal one runs."""
    typed = ["tune", "engine=onnxruntime", "engine.precision=bf16", f"runner.output_root={tmp_path / 'out'}"]
    alone = grbench_here(*typed)
    assert alone.returncode == 2 and "CPU provider has no bf16 kernels" in alone.stderr
    assert not list(tmp_path.iterdir())
    with only_command(tmp_path / "out", typed):
        refused = grbench_here(*typed)
    assert refused.returncode == 2 and "runs the same command in " in refused.stderr


def test_a_search_is_refused_in_the_folder_that_a_file_of_a_group_sets(grbench_here: Grbench, tmp_path: Path) -> None:
    """The run's options of one group, which such a file sits beside, need not fit the group's default."""
    (tmp_path / "own" / "lab").mkdir(parents=True)
    text = f"# @package _global_\nrunner:\n  output_root: {tmp_path / 'out'}\n"
    (tmp_path / "own" / "lab" / "here.yaml").write_text(text)
    typed = ["tune", "--config-dir", "own", "engine=hstu", "+lab=here", "cache=lru,none", "cache.memory_gb=1"]
    with only_command(tmp_path / "out", typed):
        refused = grbench_here(*typed)
    assert refused.returncode == 2 and "runs the same command in out" in refused.stderr, refused.stderr


@pytest.mark.parametrize("command", [["engine=hstu", "slurm.partition=gpu"], ["-m", "seed=0,1", "slurm.partition=gpu"]])
def test_a_refused_command_leaves_no_folder(grbench_here: Grbench, tmp_path: Path, command: list[str]) -> None:
    refused = grbench_here(*command, f"runner.output_root={tmp_path / 'out'}")
    assert refused.returncode == 2 and "only jobs of Slurm take it" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_a_cell_without_a_record_is_named_with_what_became_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, run = compose_spec(["engine=hstu", "tracking=none"])
    begun, says = os.pipe()

    def work(*args: Any) -> Outcome:
        given = SimpleNamespace(_report_fd=0, _jobs_fd=0)
        Worker._job(given, spec, run.runner, tmp_path / "0", keep=False)  # type: ignore[arg-type]
        os.write(says, b"!")
        signal.pause()
        raise AssertionError

    monkeypatch.setattr(runner._Work, "_measured", work)
    if (command := os.fork()) == 0:
        runner.run_cell(spec, run.runner, tmp_path / "0")
        os._exit(1)
    os.read(begun, 1)
    assert left_out([tmp_path, tmp_path / "0"]) == [f"{tmp_path / '0'}: its cell is being measured"]
    os.kill(command, signal.SIGKILL)
    os.waitpid(command, 0)
    why = "its command was killed and left no record; run it again, or remove the folder"
    assert left_out([tmp_path]) == [f"{tmp_path / '0'}: {why}"]
    with pytest.raises(ReportError, match=why):
        read_cells([tmp_path])
    monkeypatch.setattr(runner._Work, "_measured", lambda self: (Outcome(Status.ERROR, "nothing ran"), None))
    runner.run_cell(spec, run.runner, tmp_path / "1")
    assert left_out([tmp_path]) == []


def test_two_cells_at_once_keep_two_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, run = compose_spec(["engine=hstu", "tracking=none"])
    found: list[Path] = []

    def work(*args: Any) -> tuple[Outcome, None]:
        if not found:  # while the first measures, another process is asked for the same folder
            found.append(Path())
            found[0] = runner.run_cell(spec, run.runner, tmp_path / "0")[1]
        return Outcome(Status.ERROR, "nothing ran"), None

    monkeypatch.setattr(runner._Work, "_measured", work)
    found.append(runner.run_cell(spec, run.runner, tmp_path / "0")[1])
    assert found == [tmp_path / "0.1", tmp_path / "0"]
    assert len(list(records.find(tmp_path))) == 2


def test_results_have_one_writer(tmp_path: Path, grbench_here: Grbench) -> None:
    words = ["cachesim", "tracking=none", "hydra.run.dir=sim", "workload=synthetic", "workload.max_requests=20"]
    with only_writer(tmp_path / "sim", "out"):
        refused = grbench_here(*words)
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        "grbench cachesim: sim: another command is writing there; wait for it, or set hydra.run.dir=FOLDER"
    )
    assert grbench_here(*words).returncode == 0
    assert grbench_here(*words).returncode == 0  # the folder is free again


def test_two_trainings_do_not_share_a_checkpoint(tmp_path: Path, grbench_here: Grbench) -> None:
    with only_writer(tmp_path / "weights", "out"):
        refused = grbench_here("train", "task=rank", "tracking=none", "out=weights")
    assert refused.returncode == 2 and refused.stderr.strip().endswith("or set out=FOLDER"), refused.stderr


def weights(path: Path, seed: int) -> None:
    config = HSTUConfig(layers=1, embedding_dim=8, heads=1, qk_dim=8, v_dim=8, head_dim=4)
    model = HSTURanker.build(
        config, Catalogue(2, 4, 1), Operators.eager(), seed=seed, device="cpu", dtype=torch.float32
    )
    save_weights(model, path)


def items(path: Path, seed: int) -> None:
    one = np.zeros(1, np.int64)
    save_items(Events(one, one, one, one.astype(np.float32), one, 1, 1, ("a",), item_ids=(f"item {seed}",)), path)


WRITERS: dict[str, tuple[str, Callable[[Path, int], Any]]] = {  # by the file's name: what writes it
    "weights": ("a.safetensors", weights),
    "semantic ids": ("a.safetensors", lambda path, i: SemanticIds(np.int32([[i, 0], [1, i]]), (9, 9)).save(path)),
    "map of items": ("a.items.csv", lambda path, i: items(path.with_name("a.safetensors"), i)),
    "results": ("results.json", lambda path, i: save_results(path.parent, {}, [{"row": i}])),
    "bytes": ("a.txt", lambda path, i: atomic_io.write(path, b"%d" % i)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_others_read_appears_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = WRITERS[name]
    path = tmp_path / file
    write(path, 2)
    whole = path.read_bytes()
    (tmp_path / "probe").touch()
    assert path.stat().st_mode == (tmp_path / "probe").stat().st_mode  # not for its owner alone

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", stop)
        write(path, 3)
    assert path.read_bytes() == whole and {p.name for p in tmp_path.iterdir()} == {file, "probe"}
    write(path, 3)
    assert path.read_bytes() != whole


def test_an_error_names_the_file_and_not_what_was_to_replace_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, number in ((tmp_path / "none" / "a", errno.ENOENT), (tmp_path / "file" / "a", errno.ENOTDIR)):
        with pytest.raises(OSError, match=re.escape(f"'{path}'")) as caught, atomic_io.replacing(path):
            pass
        assert caught.value.errno == number


IN_PLACE = {  # modules that write files which no other process reads, or that replace a file themselves
    "engines/grengines/runtime/atomic_io.py", "kernels/grkernels/cute_cache.py", "kernels/grkernels/tuning.py",
    "engines/grengines/models/decoder/weights.py", "engines/grengines/vllm/folder.py",  # of vLLM in this process
    "engines/grengines/export/exporter.py", "engines/grengines/tensorrt/plan.py",  # into a folder that appears whole
    "grbench/execution/records.py", "grbench/tracking/database.py", "grbench/workloads/movielens.py",
    "grbench/execution/workers.py", "grbench/serve/haproxy.py", "grbench/streams.py",  # of a child process; none
    "grbench/execution/worker.py", "grbench/execution/measure.py",  # a pipe; samples, which are read after the record
    "grbench/execution/places.py", "grbench/execution/ray_places.py",  # pipes; an archive in memory
    "grbench/execution/slurm_places.py",  # messages that are read line by line as they come
}  # fmt: skip
_WRITES = re.compile(r"\.write_(text|bytes)\(|\bsave_file\(|write_table\(|open\([^)]*[\"'][wa]b?[\"']")


def test_no_other_module_writes_a_file_in_place() -> None:
    found = set()
    for path in files("grbench/*.py", "engines/*.py", "kernels/*.py"):
        for line in _WRITES.finditer(text := (ROOT / path).read_text()):
            before = text[: line.start()].splitlines()[-3:]
            if not any("atomic_io" in each for each in before):
                found.add(path)
    assert found == IN_PLACE
