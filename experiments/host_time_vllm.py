"""Host time of HSTU inside vLLM, by its parts.

    python experiments/host_time_vllm.py
    python experiments/host_time_vllm.py engine.async_scheduling=false engine.max_num_batched_tokens=8192

Searches of new users, and of the same users again, join as soon as others end, as in the harness: at most --batch are
under way. Each row is the fastest round: searches per second, and the milliseconds of each part for --batch searches.
These are prompts, their admission (with hashes of their blocks), vLLM's schedule, the host's work until a step is
launched, the update of the scheduler, and waits for the device. If `wait_ms` is near zero on a GPU, the host is the
limit.

On a CPU nothing is computed: the model is small and returns zeros. So the rows have the host's own work alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import common
import torch
from host_time import SMALL, Clock
from retrieval_visits import DEFAULTS, LEVELS, random_ids

from grengines.api import Catalogue, Request, Retrieval
from grengines.vllm import levels, model
from grengines.vllm.engine import VLLMEngine
from grengines.vllm.searches import Searches

PARTS = ("prompt", "admit", "schedule", "launch", "update", "wait", "wall")


def functions() -> list[tuple[str, Any, str]]:
    """The functions of each part. Imports vLLM, as the engine has by then."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker import gpu_model_runner as runner

    return [
        ("prompt", VLLMEngine, "_prompt"),
        ("admit", Searches, "admit"),
        ("schedule", Scheduler, "schedule"),
        ("launch", runner.GPUModelRunner, "execute_model"),
        ("update", Scheduler, "update_from_output"),
        ("wait", runner.AsyncGPUPoolingModelRunnerOutput, "get_output"),
        ("wait", model.SearchPooler, "take"),
    ]


def zero_rows(self: Any, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The rows of a model that computes nothing."""
    return torch.zeros(len(input_ids), self.generator.config.embedding_dim)


def nothing_found(_: Any, last: torch.Tensor, __: Any) -> torch.Tensor:
    """The first item for every search."""
    return torch.zeros(len(last), 1, 2, dtype=torch.float64)


def drive(engine: Any, requests: Sequence[Request], most: int) -> None:
    """Answer requests, at most `most` at a time."""
    waiting = deque(enumerate(requests))
    while waiting or engine.unfinished:
        while waiting and engine.unfinished < most:
            engine.admit(*waiting.popleft())
        engine.step()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", rounds=5)
    parser.add_argument("--history", type=int, default=1024, help="items, three tokens each (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="searches under way (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=12, help="of different users (default: %(default)s)")
    args = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    more = ["kernel=cutlass", "engine.gpu_memory_utilization=0.6"]
    more = more if gpu else [*SMALL, "kernel=torch", "engine.kv_cache_gb=0.2"]
    search = ["retrieval.beam_width=1", "retrieval.k=1", f"model.max_positions={LEVELS * args.history}"]
    spec = common.specs_of(parser, [*DEFAULTS, *search, *more], args.overrides, multirun=False)[0]
    assert spec.retrieval is not None  # the task is generate
    retrieval = Retrieval(random_ids(100_000, 256), spec.retrieval.k, spec.retrieval.beam_width)
    catalogue = Catalogue(num_users=1, num_items=len(retrieval.ids.codes), num_actions=1)
    users = common.requests_of(args.batch * args.batches, args.history, 0, shortest=1.0, catalogue=catalogue)
    rows, clock = common.Rows(args, __file__, arguments), Clock()
    with ExitStack() as changes:
        if not gpu:
            changes.enter_context(mock.patch.object(model.HSTUForRetrieval, "forward", zero_rows))
            changes.enter_context(mock.patch.object(levels.Levels, "_search", nothing_found))
        engine = common.engine_of(spec, users, args.batch, catalogue, task="generate", retrieval=retrieval)
        changes.callback(engine.close)
        for part, owner, name in functions():
            changes.enter_context(clock.watching(owner, name, part))
        times: dict[str, list[dict[str, float]]] = {"new users": [], "the same users": []}
        for turn in range(args.rounds + 1):
            engine.reset_cache()
            for taken in times.values():
                clock.spent.clear()
                begun = time.perf_counter()
                drive(engine, users, args.batch)
                clock.spent["wall"] = time.perf_counter() - begun
                if turn:  # the first one warms up
                    taken.append(dict(clock.spent))
        for case, taken in times.items():
            least = min(taken, key=lambda spent: spent["wall"])
            ms = {f"{part}_ms": 1e3 * least.get(part, 0.0) / args.batches for part in PARTS}
            rows.add(case=case, batch=args.batch, **ms, per_s=len(users) / least["wall"])
    rows.close()


if __name__ == "__main__":
    common.run(main)
