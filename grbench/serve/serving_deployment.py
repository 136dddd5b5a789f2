"""The strategies that serve at present: those of a deployment, brought up on its workload."""

from __future__ import annotations

import asyncio
import importlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from grbench import workloads
from grbench.config.schema import RunSpec
from grbench.deployment import Deployment
from grbench.serve.controller import Controller
from grbench.serve.logs import Log
from grbench.serve.metrics import Metrics
from grbench.serve.options import ServeConfig
from grbench.serve.requests import Bounds
from grbench.serve.state import Histories
from grbench.serve.strategy import State, Strategy
from grbench.workloads.item_map import check_items
from grbench.workloads.trace import Trace
from grengines.api import Retrieval
from grkernels import choice


@dataclass(frozen=True)
class ServingDeployment:
    """A deployment that serves. spec: of its first strategy. states: they outlive a reload."""

    controller: Controller
    spec: RunSpec
    bounds: Bounds
    states: Histories


async def bring_up(
    deployment: Deployment,
    source: str | None,
    config: ServeConfig,
    metrics: Metrics,
    log: Log,
    before: ServingDeployment | None,
) -> ServingDeployment:
    """Start every strategy, one after another. Raises RuntimeError if none serves, and then changes nothing.

    source: of the deployment, for messages. before: what served until now.
    """
    uncertified = [strategy.name for strategy in deployment.strategies if strategy.certified is None]
    if source is not None and uncertified:
        log.info("not certified", strategies=uncertified, file=source)
    if unmeasured := {s.name: s.loss or "unknown" for s in deployment.degrade if s.record is None}:
        log.info("losses not measured", steps=unmeasured, next=f"grbench losses {source} FOLDER")
    specs = await asyncio.to_thread(deployment.specs, source or "deployment")
    spec = next(iter(specs.values()))
    if before is not None and spec.workload != before.spec.workload:
        raise RuntimeError("the workload differs from that of the deployment before; start another server")
    (trace, retrievals), _ = await asyncio.gather(
        asyncio.to_thread(load_workload, list(specs.values())),
        asyncio.to_thread(importlib.import_module, "torch"),  # seconds, in which the workload is made
    )
    longest = config.max_history or spec.workload.max_history
    bounds = Bounds(deployment.task, trace.catalogue, config.max_users, longest, config.max_candidates)

    def changed(strategy: Strategy, what: str) -> None:
        say = log.info if strategy.state is State.READY else log.error
        say(f"strategy {what}", strategy=strategy.name, state=str(strategy.state), why=strategy.why)

    strategies = [
        Strategy(
            s.name, specs[s.name], s.serves, trace, retrieval, config.time_limit_s, metrics.answered[s.name], changed
        )
        for s, retrieval in zip(deployment.strategies, retrievals, strict=True)
    ]
    controller = Controller(deployment, strategies, metrics, config.max_queue)
    with nullcontext() if before is None else choice.beside("the calls that a server answers"):
        failures = await _start(strategies, log)
    if not controller.ready:
        await controller.close(0.0)
        raise RuntimeError("; ".join(failures or [f"strategy {s.name}: {s.why}" for s in strategies]))
    states = before.states if before is not None else Histories(config.state_users, longest)
    return ServingDeployment(controller, spec, bounds, states)


async def _start(strategies: list[Strategy], log: Log) -> list[str]:
    """Start strategies one after another. Returns why some did not start."""
    failures = []
    for strategy in strategies:
        log.info("starting", strategy=strategy.name)
        try:
            await strategy.start()
            parts = {part: round(seconds, 3) for part, seconds in strategy.checked.start_s.items()}
            log.info("started", strategy=strategy.name, seconds=parts)
        except Exception as e:
            failures.append(f"strategy {strategy.name}: {type(e).__name__}: {' '.join(str(e).split())}")
            strategy.state, strategy.why = State.CLOSED, failures[-1]
            log.error("not started", strategy=strategy.name, error=failures[-1])
    return failures


def load_workload(specs: list[RunSpec]) -> tuple[Trace, list[Retrieval | None]]:
    """Return the workload that all strategies share, and the semantic IDs of each."""
    first = specs[0]
    trace = workloads.build(first.workload, first.seed, first.latency_limit_ms)
    for owner in [part for spec in specs for part in (spec.model, spec.retrieval)]:
        if weights := getattr(owner, "weights", None):
            check_items(trace.events, Path(weights))
    retrievals: list[Retrieval | None] = []
    for i, spec in enumerate(specs):
        same = next((r for s, r in zip(specs[:i], retrievals, strict=False) if s.retrieval == spec.retrieval), None)
        if spec.retrieval is not None and same is None:
            from grbench.execution.retrieval import build_retrieval  # imports PyTorch

            same = build_retrieval(spec.retrieval, spec.workload, trace.events, spec.seed)
        retrievals.append(same)
    return trace, retrievals
