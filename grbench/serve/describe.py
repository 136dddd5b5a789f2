"""Self-description of a server: metadata, configuration and statistics of its model, and the status for the page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grbench import __version__
from grbench.execution.stats import percentile
from grbench.report.cells import shown
from grbench.serve.controller import Controller
from grbench.serve.requests import metadata
from grbench.workloads.config import FileConfig, WorkloadOptions
from grengines.api import RANDOM
from grengines.overrides import override
from grkernels import tuning

if TYPE_CHECKING:
    from grbench.serve.service import Service
    from grbench.serve.serving_deployment import ServingDeployment
    from grbench.serve.strategy import Strategy

VERSION = "1"  # of the model, for clients that name one
PLATFORM = "grbench"
EXTENSIONS = ["binary_tensor_data", "model_configuration", "statistics"]
NO_HITS = dict.fromkeys(("device", "host", "storage", "miss"), 0)  # requests by where the state was


def model_metadata(service: Service, model: str, version: str) -> dict[str, Any]:
    """Return the metadata of the model. Raises RefusedError."""
    present = service.serving(model, version)
    inputs, outputs = metadata(present.bounds.task, _tasks(present.controller))
    return {"name": model, "versions": [VERSION], "platform": PLATFORM, "inputs": inputs, "outputs": outputs}


def model_config(service: Service, model: str, version: str) -> dict[str, Any]:
    """Return the configuration of the model in Triton's form. Raises RefusedError."""
    facts = model_metadata(service, model, version)
    return {
        "name": model,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": 0,
        "input": [
            {"name": i["name"], "data_type": f"TYPE_{i['datatype']}", "dims": i["shape"],
             "optional": i["name"] not in ("USER_IDS", "TOKEN_LENGTHS", "TOKENS", "NUM_CANDIDATES")}
            for i in facts["inputs"]
        ],
        "output": [
            {"name": o["name"], "data_type": f"TYPE_{o['datatype']}", "dims": o["shape"]}
            for o in facts["outputs"]
        ],
    }  # fmt: skip


def model_statistics(service: Service, model: str, version: str) -> dict[str, Any]:
    """Return the statistics of the model in Triton's form. Raises RefusedError."""
    service.serving(model, version)
    sums = service.metrics.sums()
    calls, failed, requests = (
        int(sums[f"inference_{name}"]) for name in ("request_success", "request_failure", "count")
    )
    parts = ("request", "queue", "compute_input", "compute_infer", "compute_output")
    ns = {name: int(sums[f"inference_{name}_duration_us"] * 1e3) for name in parts}
    duration = {
        "success": {"count": calls, "ns": ns["request"]},
        "fail": {"count": failed, "ns": 0},
        "queue": {"count": requests, "ns": ns["queue"]},
        "compute_input": {"count": requests, "ns": ns["compute_input"]},
        "compute_infer": {"count": requests, "ns": ns["compute_infer"]},
        "compute_output": {"count": calls, "ns": ns["compute_output"]},
    }
    return {
        "name": model,
        "version": VERSION,
        "last_inference": service.last_ms,
        "inference_count": requests,
        "execution_count": sum(one.batches for one in service.metrics.answered.values()),
        "inference_stats": duration,
    }


def status(service: Service) -> dict[str, Any]:
    """Return what the page shows."""
    present, deployment, metrics = service.present, service.deployment, service.metrics
    newest, sums = service.newest_ms or [0.0], metrics.sums()
    return {
        "version": __version__,
        "model": service.model,
        "task": deployment.task,
        "limits": deployment.limits,
        "workload": present.spec.workload.name if present else "",
        "workload_overrides": _overrides(_taken(present)) if present else [],
        "max_history": present.bounds.max_history if present else 0,
        "tasks": _tasks(present.controller) if present else [],
        "config_dir": deployment.config_dir,
        "items": present.bounds.catalogue.num_items if present else 0,
        "actions": present.bounds.catalogue.num_actions if present else 0,
        "state": "draining" if service.draining else "ready" if service.ready else "not ready",
        "up_s": round(time.monotonic() - service.begun, 1),
        "calls": int(sums["inference_request_success"]),
        "failed": int(sums["inference_request_failure"]),
        "shed": int(sum(one.value for (status, _), one in metrics.requests.by.items() if status == "429")),
        "pending": present.controller.pending if present else 0,
        "latency_ms": {f"p{q:g}": round(percentile(newest, q), 3) for q in (50, 90, 99)},
        "latency_of": len(service.newest_ms),
        "hits": NO_HITS | {tier: int(one.value) for (tier,), one in metrics.hits.by.items()},
        "users": len(present.states) if present else 0,
        "strategies": [_strategy(s) for s in present.controller.strategies] if present else [],
        "degrade": [asdict(step) for step in deployment.degrade],
        "kernels_compiled": len(tuning.compiled()),
    }


def _taken(present: ServingDeployment) -> WorkloadOptions:
    """Return the workload, with no longer histories than calls may have."""
    workload = present.spec.workload
    return replace(workload, max_history=min(workload.max_history, present.bounds.max_history))


def _overrides(workload: WorkloadOptions) -> list[str]:
    """Return the overrides of a run that has this workload: all where the name has values of its own in conf/.

    The path of a file is absolute: who asks is mostly in another folder.
    """
    values = {field.name: getattr(workload, field.name) for field in fields(workload) if field.name != "name"}
    if isinstance(workload, FileConfig):
        values["path"] = str(Path(workload.path).absolute())
    usual = type(workload)(path="") if isinstance(workload, FileConfig) else type(workload)()
    every = workload.name != usual.name
    changed = [(f"workload.{name}", its) for name, its in values.items() if every or its != getattr(usual, name)]
    words = [override(key, its) if isinstance(its, str) else f"{key}={shown(its)}" for key, its in changed]
    return [f"workload={workload.name}", *words]


def _absolute(weights: str) -> str:
    """Return the weights that an engine names, a file with its absolute path."""
    return weights if weights.startswith(RANDOM) else str(Path(weights).absolute())


def _strategy(strategy: Strategy) -> dict[str, Any]:
    """Return what the page shows of a strategy."""
    actual, gate = strategy.checked.actual, strategy.checked.gate_figures
    stages = [actual[name] for name in ("retrieve", "rank") if name in actual] or [actual]
    return {
        "name": strategy.name,
        "state": str(strategy.state),
        "why": strategy.why,
        "engine": strategy.spec.engine.name,
        "model": strategy.spec.model.name,
        "precision": actual.get("precision", ""),
        "weights": "; ".join(dict.fromkeys(_absolute(its) for stage in stages if (its := stage.get("weights")))),
        "cache_precision": _of_stages(stages, "cache_precision"),
        "attention_precision": _of_stages(stages, "attention_precision"),
        "fp8_products": _of_stages(stages, "fp8_products"),
        "device": actual.get("device", ""),
        "pending": strategy.pending,
        "batches": strategy.answered.batches,
        "gate": {k: gate.get(k) for k in ("error", "tolerance")},
        "fixed_ms": round(strategy.costs.fixed_s * 1e3, 4),
        "costs": strategy.costs.table(),
    }


def _of_stages(stages: Sequence[Mapping[str, Any]], name: str) -> str:
    """Return a fact of the stages of an engine, each value once, as a pipeline has its precision: bf16/int8."""
    return "/".join(sorted({stage[name] for stage in stages if stage.get(name)}))


def _tasks(controller: Controller) -> list[str]:
    spec = controller.strategies[0].spec
    return [] if spec.task == "generate" else spec.ranking_model.tasks
