"""Finished cells as runs leave them, and checks of what is drawn from them."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from grbench.execution import records, stats
from grbench.execution.records import RunRecord, Status
from grbench.report.frame import PARTS, read_cells
from helpers.mlflow_store import new_database

SPEC: dict[str, Any] = {
    "model": {"name": "hstu_tiny", "layers": 2, "embedding_dim": 64},
    "engine": {"name": "hstu", "device": "auto", "graph_lengths": []},
    "kernel": {"name": "torch", "attention": "torch"},
    "cache": {"name": "none"},
    "workload": {"name": "ml_100k"},
    "scenario": {"name": "server", "max_batch": 8, "queries": 1024, "target_qps": 100.0},
    "gate": {"requests": 4, "max_error_ratio": 2.0},
    "latency_limit_ms": 80.0,
    "seed": 0,
}


def write_cell(
    folder: Path,
    *overrides: str,
    status: Status = Status.OK,
    queries: int = 1500,
    scale: float = 1.0,
    **changes: Any,
) -> RunRecord:
    """A cell as a run leaves it: `overrides` change SPEC, `scale` latencies, `changes` record fields."""
    spec = {key: dict(value) if isinstance(value, dict) else value for key, value in SPEC.items()}
    for override in overrides:
        key, value = override.split("=")
        group, _, option = key.partition(".")
        typed: Any = int(value) if value.isdigit() else value
        if isinstance(spec[group], dict):
            spec[group][option or "name"] = typed
        else:
            spec[group] = typed
    if spec["kernel"]["name"] != "torch":
        spec["kernel"]["attention"] = spec["kernel"]["name"]
    seed = zlib.crc32(str(spec).encode())
    record = RunRecord(
        spec=spec,
        spec_hash=f"{seed:012x}",
        status=status,
        started_at=f"2026-01-02T03:04:{len(list(folder.parent.glob('*'))):02d}+00:00",
        duration_s=1.5,
        overrides=list(overrides),
        requested={
            "engine.device": "auto",
            "kernel.attention": spec["kernel"]["attention"],
            "kernel.layer_norm": "auto",
            "kernel.norm_gate": "auto",
        },
        actual={
            "device": "cpu",
            "kernels": {"attention": spec["kernel"]["attention"], "layer_norm": "triton", "norm_gate": "triton"},
            "precision": "fp32",
        },
        environment={"git_sha": "abc1234", "cpu": "Some CPU", "gpus": [], "versions": {"torch": "2.13.0"}},
        gate={"passed": True, "error": 1.25e-7, "tolerance": 2e-5},
    )
    folder.mkdir(parents=True)
    if status is Status.OK:
        rng = np.random.default_rng(seed)
        medians = zip(PARTS, (4, 1, 1, 3), strict=True)
        parts = {part: rng.lognormal(np.log(ms * scale), 0.5, queries) for part, ms in medians}
        latency = sum(parts.values()) + 0.25 * scale
        arrival = np.sort(rng.uniform(0, 10, queries))
        samples = pd.DataFrame({"request_id": range(queries), "user_id": 0, "arrival_s": arrival, **parts})
        samples = samples.assign(latency_ms=latency, batch_index=np.arange(queries) // 4, batch_size=4)
        samples.to_parquet(folder / records.SAMPLES_FILE)
        summary = stats.latency_summary(latency)
        record.metrics = summary.metrics | {f"{p}/p50": stats.percentile(v, 50) for p, v in parts.items()}
        record.metrics |= {"throughput_rps": queries / 10, "goodput_rps": stats.goodput(latency, 80, 10)}
        record.intervals, record.notes = summary.intervals, summary.notes
    else:
        record.error = changes.pop("error", f"what {status} means here")
        record.metrics, record.gate = {"engine_start_s": 1.0}, {}
    for name, value in changes.items():
        setattr(record, name, value)
    records.save(record, folder)
    return record


def ink(png: bytes) -> float:
    """Share of pixels that are not white. Fails if anything touches the edge, where it would be cut."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert min(pixels.shape) > 130
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((edge == 255).all() for edge in edges)
    return float((pixels < 250).mean())


def log_to_mlflow(root: Path, folder: Path) -> str:
    """Log the cells under `root` to a new SQLite store, a parent and a child each; returns its URI."""
    from mlflow import MlflowClient

    uri = new_database(folder)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("grbench", artifact_location=(folder / "artifacts").as_uri())
    parent = client.create_run(experiment)
    for path, record in read_cells([root]):
        run = client.create_run(experiment, tags={"mlflow.parentRunId": parent.info.run_id, "status": record.status})
        for name, value in record.metrics.items():
            client.log_metric(run.info.run_id, name, value)
        for artifact in (records.RECORD_FILE, records.SAMPLES_FILE):
            if (path / artifact).exists():
                client.log_artifact(run.info.run_id, str(path / artifact))
        client.set_terminated(run.info.run_id)
    return uri
