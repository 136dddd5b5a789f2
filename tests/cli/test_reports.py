"""Reports that are kept: each page is what its records give, and records of doubtful origin are refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.checkout import ROOT

from grbench.cli import main
from grbench.execution import results
from grbench.execution.records import ARTIFACTS, RECORD_FILE, RESAMPLES_FILE, SAMPLES_FILE
from grbench.report import ReportError
from grbench.report.results import results_sections
from grbench.report.studies import PAGE, folders, keep, rebuild, stale, study_page

REPORTS = ROOT / "reports"
KEPT = list(folders(REPORTS))
Capture = pytest.CaptureFixture[str]
# Sections of pages whose tables are made of reports, and the columns that are.
TABLES = [
    ("README.md", "Results", ["reference"]),
    ("docs/PERFORMANCE.md", "End to end", ["reference"]),
    ("docs/PERFORMANCE.md", "MLPerf's lengths under load", ["gpu_dlrm_server"]),
    ("docs/PERFORMANCE.md", "Order of a batch", ["gpu_order"]),
    ("docs/PERFORMANCE.md", "A hit in the KV cache", ["user_cache"]),
]
_MEASURED = re.compile(r"requests/s|^p(50|90|99)( ms|, 95%|$)|J a request|joules|cached|no cache|times|loaded|copied")
_METRICS = {
    "requests/s": "throughput_rps",
    "^p50": "latency_ms/p50",
    "^p90": "latency_ms/p90",
    "^p99": "latency_ms/p99",
    "J a request|joules": "energy_joules_per_request",
}
_FIGURE = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_each_page_is_what_its_records_give(folder: Path) -> None:
    assert stale(folder) is None
    commits = {json.loads(path.read_text())["environment"]["git_sha"] for path in folder.rglob("re*.json")}
    assert [commit[:12] for commit in commits] == re.findall(r"\bcommit ([0-9a-f]{7,})", (folder / PAGE).read_text())


def figures_of(column: str, records: Iterable[dict[str, Any]]) -> list[float]:
    """Return the figures of records that a column may have: a metric and its interval, or those of an experiment."""
    found: list[float] = []
    metrics = [metric for words, metric in _METRICS.items() if re.search(words, column)]
    for record in records:
        if "rows" in record:
            found += [float(figure) for figure in _FIGURE.findall(json.dumps(record["rows"]))]
        for metric in metrics:
            found += [value for name, value in record.get("metrics", {}).items() if name == metric]
            found += [end for name, ends in record.get("intervals", {}).items() if name == metric for end in ends]
    return found


def strange_figures(section: str, records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the figures of the measured columns of a section's tables that no record has, rounded."""

    def is_known(figure: str, column: str) -> bool:
        half = 0.5 / 10 ** len(figure.partition(".")[2]) + 1e-9
        return any(abs(float(figure) - other) <= half for other in figures_of(column, records))

    strange: list[str] = []
    columns: dict[int, str] | None = None
    for line in section.splitlines():
        cells = line.split("|")[1:-1]
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = {i: name for i, cell in enumerate(cells) if _MEASURED.search(name := cell.strip())}
        else:
            strange += [f for i, name in columns.items() for f in _FIGURE.findall(cells[i]) if not is_known(f, name)]
    return strange


@pytest.mark.parametrize("page, heading, names", TABLES, ids=[heading for _, heading, _ in TABLES])
def test_tables_of_other_pages_have_the_figures_of_the_reports(page: str, heading: str, names: list[str]) -> None:
    section = (ROOT / page).read_text().partition(f"# {heading}\n")[2].partition("\n#")[0]
    records = [json.loads(path.read_text()) for name in names for path in (REPORTS / name).rglob("re*.json")]
    assert "|---|" in section and strange_figures(section, records) == []


def test_a_figure_that_no_record_has_is_found() -> None:
    table = "| load | requests/s | limit |\n|---|---|---|\n| 400/s | 399 | 0.123 |\n| | 41.2 | |\n"
    record = {"metrics": {"throughput_rps": 399.2, "latency_ms/p50": 41.2}, "intervals": {"latency_ms/p50": [2.68, 3]}}
    assert strange_figures(f"{table}\n| x | p50 |\n|---|---|\n| | 2.7 |\n", [record]) == ["41.2"]


def test_the_folder_holds_reports_and_nothing_else() -> None:
    assert KEPT
    kept = {"README.md", "notes.md", RECORD_FILE, results.RESULTS_FILE, RESAMPLES_FILE, SAMPLES_FILE}
    for path in (path for path in REPORTS.rglob("*") if path.is_file() and path.parent.name != "figures"):
        assert path.name in kept, path
        assert path.parent == REPORTS or path.relative_to(REPORTS).parts[0] in {folder.name for folder in KEPT}, path


def test_the_commits_are_in_the_history() -> None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    if git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("no checkout with its whole history")
    for path in REPORTS.rglob("re*.json"):
        commit = json.loads(path.read_text())["environment"]["git_sha"]
        assert git("cat-file", "-t", commit) == "commit", path


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A copy of a kept report, to damage."""
    folder = tmp_path / "reports" / "gpu_order"
    shutil.copytree(REPORTS / "gpu_order", folder, ignore=shutil.ignore_patterns("figures"))
    return folder


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Edit one of the records; returns its path."""
    path = min(folder.rglob(RECORD_FILE))
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize("file", [PAGE, "notes.md", "record"])
def test_a_page_that_says_something_else_is_found(report: Path, file: str, capsys: Capture) -> None:
    if file == "record":
        change(report, lambda record: record["metrics"].update(throughput_rps=1e6))
    else:
        (report / file).write_text((report / file).read_text() + "\nIt is ten times as fast.\n")
    assert main(["reports", "--root", str(report.parent), "--check"]) == 1
    assert "not what its records and notes give; `make reports` rebuilds it" in capsys.readouterr().out
    assert main(["reports", "--root", str(report.parent)]) == 0
    assert main(["reports", "--root", str(report.parent), "--check"]) == 0
    assert ("ten times" in (report / PAGE).read_text()) == (file == "notes.md")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.update(git_sha=e["git_sha"] + "+dirty"), "+dirty; commit the changes, then measure again"),
        (lambda e: e.update(git_sha=None), "git_sha is missing; measure again in a checkout"),
        (lambda e: e.update(git_sha="0" * 40), "a report has records of one commit and one machine"),
        (lambda e: e["gpus"][0].update(name="NVIDIA H100"), "13 cores, NVIDIA H100, NVIDIA H200; "),
    ],
    ids=["dirty", "unknown", "two commits", "two machines"],
)
def test_records_of_doubtful_origin_make_no_page(
    report: Path, edit: Callable[[dict[str, Any]], Any], message: str, capsys: Capture
) -> None:
    path, before = change(report, lambda record: edit(record["environment"])), (report / PAGE).read_text()
    assert main(["reports", "--root", str(report.parent)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and message in error and error.count("\n") == 1
    with pytest.raises(ReportError):
        stale(report)
    assert (report / PAGE).read_text() == before
    with pytest.raises(ReportError):
        keep(report / "records", report.parent / "other")
    assert not (report.parent / "other").exists()


def test_what_is_missing_is_named(report: Path) -> None:
    change(report, lambda record: record.pop("spec"))
    with pytest.raises(ReportError, match=r"record\.json: missing or unknown key 'spec'"):
        study_page(report)
    shutil.rmtree(report / "records")
    with pytest.raises(ReportError, match=r"records: no record\.json and no results\.json below it"):
        study_page(report)
    (report / "notes.md").write_text("no title\n")
    with pytest.raises(ReportError, match=r"notes\.md: needed, with a title as its first line"):
        study_page(report)


@pytest.mark.parametrize("size", [1000, 200_000])
def test_records_are_kept_under_the_names_of_their_cells(report: Path, tmp_path: Path, size: int) -> None:
    runs = tmp_path / "outputs"
    for number, path in enumerate(sorted(report.glob("records/*"))):
        shutil.copytree(path, runs / str(number))
        (runs / str(number) / SAMPLES_FILE).write_bytes(bytes(size))
        (runs / str(number) / "worker.log").write_text("a log\n")
        file = runs / str(number) / RECORD_FILE
        logged = {"run_id": "1", "uri": "sqlite:////home/me/mlruns.db"}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tracking": logged}))
    results.save(runs / "job", {**results.origin(["a", "command"]), **origin_of(report)}, [{"variant": "a"}])
    shutil.copytree(runs / "job", runs / ARTIFACTS / "a run" / "artifacts")  # MLflow's copy
    shutil.copytree(runs / "0", runs / ARTIFACTS / "another" / "artifacts")
    before = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    keep(runs, report)
    added = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()} - before
    samples = {name for name in added if name.endswith(SAMPLES_FILE)}
    assert added - samples == {"records/job/results.json"}
    assert len(samples) == (4 if size == 1000 else 0)  # small ones are kept, large ones are not
    assert not any("mlruns" in path.read_text() for path in report.rglob(RECORD_FILE))


def test_records_of_the_report_itself_are_kept(report: Path) -> None:
    before = {path.relative_to(report): path.read_bytes() for path in report.rglob("records/*/*")}
    keep(report / "records", report)
    assert before and {path.relative_to(report): path.read_bytes() for path in report.rglob("records/*/*")} == before
    assert not list(report.glob(".records*"))


def origin_of(report: Path) -> dict[str, Any]:
    return {"environment": json.loads(min(report.rglob(RECORD_FILE)).read_text())["environment"]}


def test_rows_of_any_program_become_a_table(report: Path) -> None:
    rows = [
        {"engine": "hstu", "status": "OK", "batch": 8, "p50_ms": 1.23456, "graphs": True, "samples_ms": [1.0, 2.0]},
        {"engine": "aoti", "status": "UNAVAILABLE", "batch": 8, "reason": "no C++ compiler"},
        {"engine": "onnxruntime", "status": "UNAVAILABLE", "batch": 8, "reason": "no C++ compiler"},
    ]
    shutil.rmtree(report / "records")
    results.save(report / "records" / "job", {**results.origin(["python", "x y"]), **origin_of(REPORTS)}, rows)
    rebuild(report)
    page = (report / PAGE).read_text()
    assert "## Commands\n\n    python 'x y'\n\n## job\n\n| engine | batch | p50 ms | graphs |\n" in page
    assert "\n| hstu | 8 | 1.23 | yes |\n" in page
    assert "- UNAVAILABLE: no C++ compiler (aoti 8; onnxruntime 8)\n\n## Environment\n\n|  | all rows |\n" in page
    (report / "records" / "job" / "results.json").write_text('{"schema_version": 1}')
    with pytest.raises(ReportError, match=r"results\.json: missing key 'command'"):
        study_page(report)


def test_jobs_of_a_simulation_are_side_by_side_in_the_order_of_their_options() -> None:
    def job(seed: int, rate: float | None) -> dict[str, Any]:
        metrics = {"limit": {"hit_rate": 0.9}, "lru": {"hit_rate": 0.5, "over_lru": 0.0}}
        metrics["predictive"] = {"hit_rate": 0.5 + seed / 1000, "over_lru": seed / 1000}
        rows = [{"policy": name, "metrics": metrics[name]} for name in metrics for _ in range(2)]
        config = {"seed": seed, "workload": {"name": "synthetic", "revisit_rate": rate}}
        config |= {"sizes_gb": [], "shares": [0.01, 0.5]}
        return {"kind": "cachesim", "command": "c", "config": config, "rows": rows}

    jobs = [job(10, 0.3), job(2, 0.3), job(2, None)]
    sections = results_sections([(str(i), one) for i, one in enumerate(jobs)])
    assert sections[-2:] == [
        "### Points of hit rate over lru",
        "| seed | revisit rate | policy | 1% | 50% |\n| --- | --- | --- | --- | --- |\n"
        "| 2 | null | predictive | +0.20 | +0.20 |\n"
        "| 2 | 0.3 | predictive | +0.20 | +0.20 |\n"
        "| 10 | 0.3 | predictive | +1.00 | +1.00 |",
    ]
    assert "| 10 | 0.3 | limit | 90.00 | 90.00 |" in sections[-3]


def test_the_study_is_what_the_commands_name(report: Path) -> None:
    (report.parent.parent / "experiments" / "study").mkdir(parents=True)
    for name in ("experiments/study/batching.yaml", "experiments/study/gpu_order.yaml", "experiments/engines.py"):
        (report.parent.parent / name).touch()
    for path in report.rglob(RECORD_FILE):
        path.write_text(path.read_text().replace('"study=gpu_order"', '"seed=0"'))
    assert "The study: [experiments/study/gpu_order.yaml](" in study_page(report)  # the report's name
    change(report, lambda record: record["overrides"].append("study=batching"))
    facts = {**results.origin(["python", "experiments/engines.py", "model=a"]), **origin_of(report)}
    results.save(report / "records" / "job", facts, [{"variant": "a"}])
    links = re.findall(r"The study: \[(.*?)\]", study_page(report))
    assert links == ["experiments/study/batching.yaml", "experiments/engines.py"]


def test_rows_without_a_result_have_no_table() -> None:
    row = {"family": "layer_norm", "variant": "a", "status": "INCORRECT", "reason": "zeros", "p50_ms": 9.0}
    assert results_sections([("job", {"command": "c", "rows": [row]})])[3:] == ["- INCORRECT: zeros (layer_norm a)"]
