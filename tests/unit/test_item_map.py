"""Weights of one's own: the example of docs/WEIGHTS.md, its list of tensors, and the map from rows to items."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.checkout import ROOT
from safetensors import safe_open

from grbench.config.compose import compose_spec
from grbench.execution.cell import Cell
from grbench.execution.records import Outcome
from grbench.workloads.events import DataError, load_csv
from grbench.workloads.item_map import check_items, save_items

PAGE = (ROOT / "docs" / "WEIGHTS.md").read_text()


def write(path: Path, items: str) -> Path:
    rows = [f"u{n % 3},{item},{n % 5 + 1},{1_700_000_000 + n * 4000}" for n, item in enumerate(items)]
    path.write_text("userId,movieId,rating,timestamp\n" + "\n".join(rows) + "\n")
    return path


def test_the_example_makes_weights_that_a_run_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ratings.csv", "dabcdbacabcdabcd" * 3)
    vectors = {item: torch.full((64,), ord(item) / 100) for item in "abcd"}
    torch.save(vectors, "vectors.pt")
    [example] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "WEIGHTS.md", "exec"), {})
    assert (tmp_path / "mine.items.csv").read_text().splitlines() == ["row,item", "0,d", "1,a", "2,b", "3,c"]
    with safe_open("mine.safetensors", framework="pt") as f:
        assert f.get_tensor("token_table")[:, 0].tolist() == pytest.approx([ord(item) / 100 for item in "dabc"])
        names = {re.sub(r"\d+", "N", name) for name in f.keys()}  # noqa: SIM118
    table = re.search(r"^## Tensors\n.*?((?:^\|[^\n]*\n)+)", PAGE, re.DOTALL | re.MULTILINE)
    assert table is not None
    rows = re.findall(r"^\| (`.*?`) \|", table[1], re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(.+?)`", row)}
    assert names == listed
    [command] = re.findall(r"^    python -m grbench (engine=.*mine\b.*)$", PAGE, re.MULTILINE)
    words = command.replace("'", "").split()
    small = [
        "workload.num_candidates=2",
        "gate.quality_requests=0",
        "scenario=closed_loop",
        "scenario.queries=8",
        "warmup_batches=0",
    ]
    outcome = Outcome()
    Cell(compose_spec([*words, *small, "gate.requests=2"])[0], tmp_path, outcome, lambda message: None).run()
    assert outcome.gate["passed"] and outcome.metrics["throughput_rps"] > 0
    write(tmp_path / "ratings.csv", "abcdabcd" * 3)
    with pytest.raises(DataError, match=r"mine\.items\.csv: table row 0 is item 'd', in the workload it is 'a'"):
        Cell(compose_spec([*words, *small])[0], tmp_path, Outcome(), lambda message: None).run()


def test_a_map_of_other_items_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    events = load_csv(write(tmp_path / "a.csv", "abc"), "auto", False)
    check_items(events, weights)  # there is no map
    path = save_items(events, weights)
    check_items(events, weights)
    with pytest.raises(DataError, match="3 items, the workload has 4; use the data that the weights were made for"):
        check_items(load_csv(write(tmp_path / "b.csv", "abcd"), "auto", False), weights)
    path.write_text("x\n")
    with pytest.raises(DataError, match="row 1 is not the header row,item"):
        check_items(events, weights)
