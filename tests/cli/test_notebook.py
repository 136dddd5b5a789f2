"""The notebooks, each executed in a kernel of its own against records."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.cells import ink, write_cell
from helpers.checkout import ROOT
from helpers.command import Grbench
from helpers.forks import Fork
from helpers.searches import SEARCH

from grbench.execution import records, results
from grbench.execution.records import Status

nbformat = pytest.importorskip("nbformat", reason="the extra `notebook` is not installed")
from ipykernel import kernelapp, zmqshell  # noqa: E402, F401
from jupyter_client.provisioning import local_provisioner  # noqa: E402
from nbclient import NotebookClient  # noqa: E402
from nbclient.exceptions import CellExecutionError  # noqa: E402

NOTEBOOKS = ROOT / "notebooks"
PLOTLY = "application/vnd.plotly.v1+json"
NAMES = ["cache", "compare_runs", "kernels", "quality", "strategy", "tune"]


class Kernel(Fork):
    """A kernel that need not import what this process has. It has the parts of `Popen` that jupyter_client uses."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], *, cwd: str, env: dict[str, str], **_: Any) -> None:
        def work() -> None:
            os.chdir(cwd)
            asyncio.set_event_loop(asyncio.new_event_loop())
            kernelapp.launch_new_instance(argv=command[command.index("-f") :])

        super().__init__(work, Path(cwd) / "kernel.txt", env=env)
        while os.getpgid(self.pid) != self.pid:  # signals go to its group, which is ours until it has its own
            time.sleep(0.01)


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a notebook on this very interpreter, whichever kernels are installed here; `probe` is printed at its end.

    fresh: start the interpreter anew, as Jupyter does, which takes three seconds of a core.
    """
    kernel = tmp_path / "jupyter" / "kernels" / "grbench_test"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "test", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(name: str, root: Path, probe: str = "None", fresh: bool = False) -> nbformat.NotebookNode:
        if not fresh:
            monkeypatch.setattr(local_provisioner, "launch_kernel", Kernel)
        monkeypatch.setenv("GRBENCH_OUTPUT", str(root))
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({probe}))"))
        client = NotebookClient(notebook, timeout=200, startup_timeout=200, kernel_name="grbench_test")
        try:
            client.execute(cwd=str(tmp_path))
        except CellExecutionError:
            notebook.metadata["failed"] = True
        return notebook

    return run


def outputs(notebook: nbformat.NotebookNode, kind: str) -> list[Any]:
    given = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in given if output.output_type == kind]


def probed(notebook: nbformat.NotebookNode) -> Any:
    assert "failed" not in notebook.metadata, outputs(notebook, "error")
    return json.loads(notebook.cells[-1].outputs[-1].text)


def pictures(notebook: nbformat.NotebookNode) -> int:
    """The number of pictures, each of which shows something."""
    shown = [*outputs(notebook, "display_data"), *outputs(notebook, "execute_result")]
    pngs = [output.data["image/png"] for output in shown if "image/png" in output.data]
    assert all(ink(base64.b64decode(png)) > 0.005 for png in pngs)
    return len(pngs)


def test_each_is_stored_without_outputs_and_begins_with_its_question() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES
    for name in NAMES:
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.outputs == [] and cell.execution_count is None for cell in code), name
        title, _, question, *_ = notebook.cells[0].source.splitlines()
        assert title.startswith("# ") and question.startswith("**") and question.endswith("?**"), name


def test_compare_runs_ranks_the_cells_of_a_group(execute: Any, tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    write_cell(root / "0", "kernel=torch", "scenario.max_batch=8")
    write_cell(root / "1", "kernel=triton", "scenario.max_batch=8", queries=2000, scale=0.4)
    write_cell(root / "2", "kernel=cutlass", status=Status.OOM, error="memory ran out")
    notebook = execute(
        "compare_runs",
        root,
        "[[g.sentence for g in groups], failures.error.tolist(), [r.name for r in groups[0].rows]]",
        fresh=True,
    )
    [sentence], failed, names = probed(notebook)
    assert sentence.startswith("At 100 requests/s, hstu kernel=triton has the lowest p99: ")
    assert failed == ["memory ran out"]
    assert names == ["hstu kernel=triton", "hstu kernel=torch", "hstu kernel=cutlass"]
    assert pictures(notebook) == 3


def test_an_empty_root_is_explained_in_one_line(execute: Any, tmp_path: Path) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    notebook = execute("compare_runs", root)
    assert notebook.metadata["failed"]
    (error,) = outputs(notebook, "error")
    message = f"no record found under {root}; `python -m grbench runner.output_root={root}` makes one"
    assert error.traceback == [f"grbench: {message}"]
    assert error.evalue == message


def test_strategy_finds_the_highest_load_within_the_limit(execute: Any, tmp_path: Path) -> None:
    for engine, scale in (("hstu", 1.0), ("aoti", 4.0)):
        for load in (50, 100):
            folder = tmp_path / "outputs" / f"{engine}{load}"
            record = write_cell(folder, f"engine={engine}", f"scenario.target_qps={load}", scale=scale * load / 50)
            record.metrics["throughput_rps"] = load
            records.save(record, folder)
    notebook = execute("strategy", tmp_path / "outputs", "[groups[0].sentence, table.in_limit.tolist()]")
    sentence, verdicts = probed(notebook)
    assert sentence.startswith("In server, hstu: the highest load with p99 within 80 ms is 100 requests/s")
    assert verdicts[:3] == ["yes", "no", "yes"]  # both engines at 100 requests/s, then at 50
    assert pictures(notebook) == 2


def test_cache_compares_policies_with_the_optimum(execute: Any) -> None:
    """The data are the records that the project keeps."""
    notebook = execute("cache", ROOT / "reports", "[len(jobs), of_belady['mean'].to_dict(), len(drawn)]")
    jobs, of_belady, drawn = probed(notebook)
    assert jobs == 16 and drawn >= 1
    assert {"lru", "lfu", "gdsf", "predictive"} <= of_belady.keys()
    assert all(50 < share <= 100 for share in of_belady.values())
    assert pictures(notebook) == 1 + drawn


def test_kernels_names_the_fastest_variant(execute: Any, tmp_path: Path) -> None:
    def row(variant: str, ms: float, **facts: Any) -> dict[str, Any]:
        metrics = {"latency_ms/p50": ms, "tflops": 1 / ms, "speedup_torch": 2 / ms, "roofline_share": 0.5 / ms}
        shape = {"family": "layer_norm", "shape": "64x512", "dtype": "fp32"}
        return {
            **shape,
            "variant": variant,
            "status": "OK",
            "flops": 10**6,
            "bytes": 10**5,
            "metrics": metrics,
            **facts,
        }

    rows = [row("torch", 2.0), row("compile", 1.0), row("triton", 9.0, status="UNAVAILABLE", metrics={})]
    ceilings = {"dtype": "fp32", "tflops": 2.0, "tbps": 0.05, "matmul_size": 1024}
    facts = {**results.origin(["x"]), "kind": "kernels", "ceilings": ceilings}
    results.save(tmp_path / "outputs" / "kernels", facts, rows)
    notebook = execute("kernels", tmp_path / "outputs", "[fastest.variant.tolist(), fastest.x_torch.tolist()]")
    assert probed(notebook) == [["compile"], [2.0]]
    assert pictures(notebook) == 1


def test_quality_says_what_a_precision_costs(execute: Any, tmp_path: Path) -> None:
    for precision, auc in (("fp32", 0.8), ("int8", 0.78)):
        folder = tmp_path / "outputs" / precision
        record = write_cell(folder, f"engine.precision={precision}")
        record.actual["precision"], record.gate["quality"] = precision, {"tasks": {"rated": {"auc": auc}}}
        records.save(record, folder)
    notebook = execute("quality", tmp_path / "outputs", "loss.to_dict()")
    assert probed(notebook) == {"fp32": 0.0, "int8": pytest.approx(2.5)}
    assert pictures(notebook) == 1


@pytest.mark.usefixtures("forked_workers")
def test_tune_works_through_a_search(execute: Any, grbench_here: Grbench, tmp_path: Path) -> None:
    words = ["tune", *SEARCH, "objective=latency", "rate=400"]
    assert (done := grbench_here(*words, "latency_ms.p99=60000", "budget=2cells")).returncode == 0, done.stderr
    probe = "[trials['p99 ms'].notna().tolist(), len(front), len(steps)]"
    notebook = execute("tune", tmp_path / "outputs", probe)
    found, front, steps = probed(notebook)
    assert found == [True, True] and front >= 1 and steps == 1
    assert pictures(notebook) >= 1
    drawn = [output.data for output in outputs(notebook, "display_data") if PLOTLY in output.data]
    [lines] = [data[PLOTLY]["data"][0] for data in drawn]
    assert lines["type"] == "parcoords" and lines["dimensions"][0]["label"] == "cpu_threads"
    said = "".join(output.text for output in outputs(notebook, "stream"))
    assert said.startswith(done.stdout.splitlines()[0]) and "binds" in said

    assert grbench_here(*words, "latency_ms.p99=0.001", "budget=0cells").returncode == 1
    notebook = execute(
        "tune", tmp_path / "outputs", probe.replace("trials['p99 ms'].notna()", "trials.rate_low.notna()")
    )
    assert probed(notebook) == [[False, False], 0, 0] and pictures(notebook) == 0
