"""notebooks/compare_runs.ipynb, executed in a fresh kernel against records and an MLflow store."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from helpers.cells import ink, log_to_mlflow, write_cell
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from grbench.execution import records
from grbench.execution.records import Status

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "compare_runs.ipynb"
PROBE = """
import json
print(json.dumps({
    "found": [finding.sentence for finding in found],
    "knobs": knobs,
    "comparison": comparison["status"].tolist(),
    "failures": failures["error"].tolist(),
    "torch_rps": pivots["throughput_rps"].loc["torch"].tolist(),
    "costliest": costliest.to_dict(),
    "verdicts": verdicts["within_limit"].tolist(),
    "in_time": verdicts["in_time"].iloc[0],
    "tracked": sorted(runs["metrics.throughput_rps"].dropna()),
}))
"""


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the notebook on this very interpreter, whichever kernels are installed here."""
    kernel = tmp_path / "jupyter" / "kernels" / "grbench_test"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "test", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(root: Path, probe: str | None = None) -> nbformat.NotebookNode:
        monkeypatch.setenv("GRBENCH_OUTPUT", str(root))
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        if probe:
            notebook.cells.append(nbformat.v4.new_code_cell(probe))
        client = NotebookClient(notebook, timeout=120, kernel_name="grbench_test")
        try:
            client.execute(cwd=str(tmp_path))
        except CellExecutionError:
            notebook.metadata["failed"] = True
        return notebook

    return run


def outputs(notebook: nbformat.NotebookNode, kind: str) -> list[Any]:
    given = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in given if output.output_type == kind]


def test_stored_without_outputs_and_explained() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= 6


def test_compares_cells_and_picks_the_best_within_the_limit(execute: Any, tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    write_cell(root / "0", "kernel=torch", "scenario.max_batch=8")
    write_cell(root / "1", "kernel=triton", "scenario.max_batch=8", queries=2000, scale=0.4)
    write_cell(root / "2", "kernel=triton", "scenario.max_batch=32", queries=4000, scale=9.0)  # too late
    write_cell(root / "3", "kernel=torch", "scenario.max_batch=32", queries=1200)
    write_cell(root / "4", "kernel=cutlass", status=Status.OOM, error="memory ran out")
    log_to_mlflow(root, root)

    notebook = execute(root, PROBE)

    assert "failed" not in notebook.metadata, outputs(notebook, "error")
    found = json.loads(notebook.cells[-1].outputs[-1].text)
    (sentence,) = found["found"]
    assert sentence.startswith("At 100 requests/s, hstu kernel=triton max_batch=8 has the lowest p99: ")
    assert found["knobs"] == ["kernel", "scenario.max_batch"]
    assert found["comparison"] == ["OK", "OK", "OK", "OK", "OOM"]
    assert found["failures"] == ["memory ran out"]
    assert found["torch_rps"] == [150.0, 120.0]
    assert set(found["costliest"].values()) == {"queue_ms"}
    assert found["verdicts"] == ["yes", "yes", "no", "yes", "-"]
    metrics = records.load(root / "0").metrics
    assert found["in_time"] == pytest.approx(metrics["goodput_rps"] / metrics["throughput_rps"])
    assert found["tracked"] == [120.0, 150.0, 200.0, 400.0]
    pngs = [o.data["image/png"] for o in outputs(notebook, "execute_result") if "image/png" in o.data]
    assert len(pngs) == 3
    assert all(ink(base64.b64decode(png)) > 0.01 for png in pngs)


def test_an_empty_root_is_explained_in_one_line(execute: Any, tmp_path: Path) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    notebook = execute(root)
    assert notebook.metadata["failed"]
    (error,) = outputs(notebook, "error")
    message = f"no record found under {root}; `python -m grbench runner.output_root={root}` makes one"
    assert error.traceback == [f"grbench: {message}"]
    assert error.evalue == message


def test_a_single_untracked_cell_is_enough(execute: Any, tmp_path: Path) -> None:
    write_cell(tmp_path / "outputs" / "0", queries=300)
    notebook = execute(tmp_path / "outputs")
    assert "failed" not in notebook.metadata, outputs(notebook, "error")
    text = "".join(output.text for output in outputs(notebook, "stream"))
    assert "named by: engine, scenario" in text
    assert "At 100 requests/s, hstu has a p90 of " in text
    assert "these runs were not tracked" in text
