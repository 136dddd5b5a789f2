"""Damaged files of every kind: each is read as far as it is whole, or refused in one line."""

from __future__ import annotations

import gzip
import io
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers.cells import write_cell
from helpers.fuzz import altered, damaged, drawn, for_seconds, require_one_line
from hypothesis import given
from rich.console import Console

from grbench import deployment
from grbench.config.schema import ConfigError
from grbench.execution import records, results
from grbench.report import compare
from grbench.report.frame import ReportError, read_cells
from grbench.report.markdown import sections
from grbench.report.page import blocks
from grbench.report.table import print_cells
from grbench.report.write import write_report
from grbench.workloads import load_events
from grbench.workloads.config import CsvConfig, RecBoleConfig
from grbench.workloads.events import DataError, Events
from grbench.workloads.item_map import check_items, save_items
from grbench.workloads.trace import build_trace, find_visits
from grengines.api import Catalogue
from grengines.models.decoder import weights as decoder_weights
from grengines.models.decoder.config import DecoderConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import HSTURanker
from grengines.models.hstu.weights import load_weights, save_weights
from grengines.semantic.ids import SemanticIds

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

ROWS = [(u, 10 + (u * 7 + k) % 9, 1 + k % 5, 1_600_000_000 + 4000 * k) for u in range(1, 5) for k in range(6)]
FRAME = pd.DataFrame(ROWS, columns=["user_id", "item_id", "rating", "timestamp"])


def table(delimiter: str, header: str) -> bytes:
    return "\n".join([header, *(delimiter.join(map(str, row)) for row in ROWS), ""]).encode()


def parquet() -> bytes:
    file = io.BytesIO()
    FRAME.to_parquet(file)
    return file.getvalue()


FORMATS: dict[str, bytes] = {
    "ratings.csv": table(",", "user_id,item_id,rating,timestamp"),
    "ratings.tsv": table("\t", "user_id\titem_id\trating\ttimestamp"),
    "quoted.csv": table(",", "user_id,item_id,rating,timestamp").replace(b"1,10", b'"1","10"'),
    "dates.csv": re.sub(
        rb"16000(\d)(\d)\d+", rb"2020-09-1\1 1\2:26:40", table(",", "user_id,item_id,rating,timestamp")
    ),
    "kuairand.csv": table(",", "user_id,video_id,is_click,time_ms"),
    "ratings.dat": table("::", "1::10::5::1600000000"),
    "sequences.txt": b"a 1 2 3 4 5 6\nb 2 3 4 5 6 1\nc 9 8 7 6\n",
    "ratings.parquet": parquet(),
    "ratings.csv.gz": gzip.compress(table(",", "user_id,item_id,rating,timestamp"), mtime=0),
    "ml.inter": table("\t", "user_id:token\titem_id:token\trating:float\ttimestamp:float"),
}


def require_a_trace(events: Events, config: CsvConfig | RecBoleConfig) -> None:
    """Fail unless the events are a sound trace, or are refused in one line."""
    try:
        trace = build_trace(events, find_visits(events, config), config, 0, 80.0)
    except DataError as e:
        require_one_line(e)
        return
    for request in trace.requests:
        assert len(request.history_items) and len(set(request.candidates.tolist())) == config.num_candidates
        assert min(request.history_items.min(), request.candidates.min()) >= 0
        assert max(request.history_items.max(), request.candidates.max()) < trace.catalogue.num_items
        assert np.isfinite(request.history_weights).all() and (np.diff(request.history_timestamps) >= 0).all()
    assert all(np.isfinite(list(trace.facts().values())))


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_data_file_is_a_sound_trace_or_one_line(name: str, tmp_path: Path, seconds: float) -> None:
    path = tmp_path / name
    schema = RecBoleConfig if path.suffix == ".inter" else CsvConfig
    config = schema(path=str(path), sort=True, num_candidates=2)

    @drawn(seconds)
    @given(damaged(FORMATS[name]))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            events = load_events(config)
        except DataError as e:
            require_one_line(e)
            return
        require_a_trace(events, config)

    path.write_bytes(FORMATS[name])
    assert len(load_events(config).users) >= 16  # the file itself is whole
    for_seconds(seconds, check)


def refused_or_whole(
    seconds: float,
    path: Path,
    read: Callable[[], Any],
    errors: type[Exception] | tuple[type[Exception], ...],
    count: int = 25,
) -> None:
    """Damage a whole file again and again: `read` returns, or raises one of `errors` with one line."""
    whole = path.read_bytes()
    read()

    @drawn(seconds, count)
    @given(damaged(whole))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read()
        except errors as e:
            require_one_line(e)

    for_seconds(seconds, check)


def test_damaged_weights_are_refused_in_one_line(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "w.safetensors"
    config = HSTUConfig(layers=1, embedding_dim=8, heads=1, qk_dim=4, v_dim=4, max_positions=4, time_buckets=2)
    model = HSTURanker(config, Catalogue(3, 5, 2), cast(Any, None))  # it computes nothing
    torch.nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in model.parameters())), model.parameters())
    save_weights(model, path)
    with torch.no_grad():
        refused_or_whole(seconds / 3, path, lambda: load_weights(model, path), ValueError)

    ids = tmp_path / "ids.safetensors"
    SemanticIds(np.array([[0, 1], [1, 0], [1, 1]], dtype=np.int32), (2, 2)).save(ids)
    refused_or_whole(seconds / 3, ids, lambda: SemanticIds.load(ids, 3), ValueError)

    small = DecoderConfig(layers=1, embedding_dim=8, heads=1, kv_heads=1, head_dim=8, mlp_dim=8)
    (tmp_path / "decoder").mkdir()
    decoder_weights.write(small, (2, 2), tmp_path / "decoder", seed=0, dtype=torch.float32)
    file = tmp_path / "decoder" / "model.safetensors"
    refused_or_whole(
        seconds / 3,
        file,
        lambda: decoder_weights.tensors(small, (2, 2), seed=0, dtype=torch.float32, weights=str(file)),
        ValueError,
    )


def test_a_damaged_map_of_items_is_refused_in_one_line(tmp_path: Path, seconds: float) -> None:
    data, weights = tmp_path / "ratings.csv", tmp_path / "w.safetensors"
    data.write_bytes(FORMATS[data.name])
    events = load_events(CsvConfig(path=str(data)))
    path = save_items(events, weights)
    refused_or_whole(seconds, path, lambda: check_items(events, weights), DataError)


def test_an_altered_record_is_refused_or_reported(tmp_path: Path, seconds: float) -> None:
    """Alter values of a record that is whole as JSON: where it is read, every report can be written."""
    root = tmp_path / "o"
    write_cell(root / "good", "seed=1")
    write_cell(root / "altered")
    path = root / "altered" / records.RECORD_FILE
    whole = json.loads(path.read_text())

    @drawn(seconds, 10)
    @given(altered(whole))
    def check(tree: Any) -> None:
        path.write_text(json.dumps(tree))
        for line in records.unreadable([root]):
            assert "\n" not in line
        cells = read_cells([root])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in ("r.html", "r.csv", "r.json"):
                write_report(cells, tmp_path / name, "A report")
            assert sections(blocks(cells, figures=False), tmp_path, tmp_path / "r.md")
            print_cells(Console(file=io.StringIO()), cells)
        try:
            compare.compare(cells[:1], cells[1:])
        except ReportError as e:
            require_one_line(e)

    for_seconds(seconds, check)


def test_damaged_files_of_a_cell_cost_its_own_row(tmp_path: Path, seconds: float) -> None:
    root = tmp_path / "o"
    for name in ("good", "bad"):
        write_cell(root / name, f"seed={len(name)}", queries=60)
    records.list_cells(root / "sweep", [root / "good"])

    def read() -> None:
        cells = read_cells([root])
        assert (root / "good") in [folder for folder, _ in cells]
        write_report(cells, tmp_path / "r.html", "A report", records.unreadable([root]))

    for part in (f"bad/{records.RECORD_FILE}", f"bad/{records.SAMPLES_FILE}", f"sweep/{records.CELLS_FILE}"):
        whole = (root / part).read_bytes()
        refused_or_whole(seconds / 3, root / part, read, (), 5)
        (root / part).write_bytes(whole)


def test_a_damaged_results_file_is_refused_in_one_line(tmp_path: Path, seconds: float) -> None:
    path = results.save(tmp_path, results.origin(["grbench", "kernels"]), [{"a": 1}])
    refused_or_whole(seconds, path, lambda: results.load(path), ValueError)


DEPLOYMENT = {
    "version": 1,
    "task": "rank",
    "limits": {"latency_ms.p99": 20.0},
    "strategies": [
        {"name": "a", "overrides": ["engine=hstu"], "certified": {"latency_ms": {"p99": {"value": 3.0}}}},
        {"name": "b", "overrides": ["engine=hstu", "cache=lru"], "serves": {"max_history": 100}},
    ],
    "degrade": [{"name": "short", "max_history": 64, "loss": {"auc_loss_pct": 0.1}}],
}


def test_a_damaged_deployment_is_refused_in_one_line(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "d.yaml"

    def read() -> None:
        deployment.load(path).specs(path)

    @drawn(seconds, 10)
    @given(altered(DEPLOYMENT))
    def check(tree: Any) -> None:
        path.write_text(yaml.safe_dump(tree))
        try:
            read()
        except ConfigError as e:
            require_one_line(e)

    path.write_text(yaml.safe_dump(DEPLOYMENT))
    for_seconds(seconds / 2, check)
    path.write_text(yaml.safe_dump(DEPLOYMENT))
    refused_or_whole(seconds / 2, path, read, ConfigError, 10)
