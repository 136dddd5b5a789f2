"""engine=tensorrt: executes plans. Written against the documented API of TensorRT 10.13+ and TensorRT for RTX.

Not yet run: the project has had no machine with a GPU that the libraries it can install execute on. Building plans is
tested (plan.py); what is here is gated by availability, and every cell by the fp32 reference as always.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grengines.api import RankResult, Request, Setup, UnavailableError
from grengines.base import RankingEngine, refuse_cache, refuse_kernels
from grengines.export import exporter
from grengines.export.module import INPUTS, OUTPUT
from grengines.fallback import OutsideError
from grengines.runtime import atomic_io, staging
from grengines.runtime.batch import Bucket, HostBatch, pack
from grengines.runtime.cache_dir import cache_folder
from grengines.runtime.device import Placement
from grengines.runtime.graphs import choose_bucket, plan_buckets, token_count
from grengines.runtime.profile import Sizes, check, profiles
from grengines.runtime.results import Marks, collect
from grengines.tensorrt import plan as plans
from grengines.tensorrt import sample as samples
from grengines.tensorrt.config import TensorRTConfig
from grengines.tensorrt.library import Library, find, logger

ALIGNMENT = 256  # bytes, of every tensor that TensorRT is given


class Graph(NamedTuple):
    """One bucket's captured graph: it reads the batch where every batch is put."""

    graph: torch.cuda.CUDAGraph
    context: Any  # kept: a graph is good as long as the context that it was captured from stays as it was
    logits: Tensor


class Execution:
    """A plan on the device: an execution context for each profile, a stream of its own, buffers bound in place.

    Everything runs on that stream, one batch after another: all contexts work in the same memory, and all batches are
    put in the same place.
    """

    def __init__(self, plan: plans.Plan, library: Library, tasks: int, device: torch.device, graphs: bool) -> None:
        """Raises UnavailableError, with the library's words, where the plan can't be loaded here."""
        trt, log = library.module, logger(library)
        log.take()
        self.facts, self._library, self._device = plan.facts, library, device
        self.stream = torch.cuda.Stream(device)
        self._runtime = trt.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read())
        if self._engine is None:
            raise UnavailableError(f"{library.name} {library.version} can't load {plan.folder}: {log.take()}")
        self._kernels: Any = None  # TensorRT for RTX: what it compiled on this GPU
        self._config = self._runtime_config(graphs)
        self._scratch = torch.empty(self._engine.device_memory_size_v2, dtype=torch.uint8, device=device)
        self._contexts = [self._context(i) for i in range(len(self.facts.profiles))]
        most = self.facts.profiles[-1]
        longest = max(-(-most.longest // self.facts.tile_rows) * self.facts.tile_rows, most.history)
        self._ruler = torch.arange(longest, device=device)
        self.capacity = sum(_padded(n) for n in _counts(most).values())
        self._buffer = torch.zeros(self.capacity, dtype=torch.int64, device=device)
        self._logits = torch.empty(most.candidates, tasks, device=device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # on which these were made

    def upload(self, host: Staged) -> None:
        """Copy a batch to where it is read, on the current stream, without waiting."""
        self._buffer[: host.words].copy_(host.buffer[: host.words], non_blocking=True)

    def run(self, host: Staged, needed: Sizes) -> Tensor:
        """Enqueue the batch that was uploaded: logits [M, tasks], good until the next run."""
        return self._enqueue(self._contexts[self._profile(needed)], host)

    def capture(self, host: Staged, needed: Sizes) -> Graph:
        """A graph of batches of exactly these sizes. TensorRT wants a context of its own for each, and a run of it
        before. Raises UnavailableError where the plan can't be captured: one whose attention is a loop."""
        context = self._context(self._profile(needed))
        self.upload(host)
        logits = self._enqueue(context, host)
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                done = context.execute_async_v3(self.stream.cuda_stream)
        except RuntimeError:  # PyTorch's: the capture has been invalidated
            done = False
        if not done:
            raise UnavailableError(self._uncapturable())
        return Graph(graph, context, logits)

    def check_captured(self, needed: Sizes) -> None:
        """Raises UnavailableError where TensorRT for RTX, which captures by itself, could not capture a batch of these
        sizes, after one was run: it would go on without a word."""
        if not self._contexts[self._profile(needed)].is_stream_capturable(self.stream.cuda_stream):
            raise UnavailableError(self._uncapturable())

    def refit(self, onnx: Path) -> None:
        """Put the weights of an exported model into the plan that is loaded; nothing may be running."""
        trt, log = self._library.module, logger(self._library)
        refitter = trt.Refitter(self._engine, log)
        parser = trt.OnnxParserRefitter(refitter, log)
        self._check(parser.refit_from_file(str(onnx)) and refitter.refit_cuda_engine(), f"take the weights of {onnx}")

    def save_runtime_cache(self) -> None:
        """Keep what TensorRT for RTX compiled on this GPU for the next start."""
        if self._library.rtx:
            atomic_io.write(self._runtime_file(), bytes(self._kernels.serialize()))

    def close(self) -> None:
        """Wait for what runs, and release everything, captured graphs being gone already: contexts before the
        configuration, which must not outlive the engine."""
        self.stream.synchronize()
        del self._contexts, self._config, self._kernels, self._engine, self._runtime

    def _enqueue(self, context: Any, host: Staged) -> Tensor:
        begin = self._buffer.data_ptr()
        for name, (offset, shape) in host.places.items():
            self._bind(context, name, shape, begin + offset)
        for name, shape in host.rulers.items():  # both count from 0
            self._bind(context, name, shape, self._ruler.data_ptr())
        self._check(context.set_tensor_address(OUTPUT, self._logits.data_ptr()), f"bind {OUTPUT}")
        if unknown := context.infer_shapes():
            raise RuntimeError(f"{self._library.name} can't infer shapes without {', '.join(unknown)}")
        self._check(context.execute_async_v3(self.stream.cuda_stream), "run the plan")
        return self._logits[: host.candidates]

    def _bind(self, context: Any, name: str, shape: tuple[int, ...], address: int) -> None:
        self._check(context.set_input_shape(name, shape), f"take {name} {list(shape)}")
        self._check(context.set_tensor_address(name, address), f"bind {name}")

    def _profile(self, needed: Sizes) -> int:
        """The smallest profile that holds such a batch."""
        return next(i for i, sizes in enumerate(self.facts.profiles) if needed.fits(sizes))

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise torch.cuda.OutOfMemoryError(f"no execution context for profile {profile}: {self._said()}")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        self._check(context.set_optimization_profile_async(profile, self.stream.cuda_stream), f"use profile {profile}")
        self.stream.synchronize()
        return context

    def _runtime_config(self, graphs: bool) -> Any:
        """Contexts work in memory that they are given. TensorRT for RTX: its cache of kernels that were compiled on
        this GPU, and its own CUDA graphs."""
        trt = self._library.module
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._library.rtx:
            self._kernels = config.create_runtime_cache()
            if self._runtime_file().is_file():  # False: of another driver or GPU; the cache stays empty
                self._kernels.deserialize(self._runtime_file().read_bytes())
            self._check(config.set_runtime_cache(self._kernels), "use its runtime cache")
            if graphs:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config

    def _runtime_file(self) -> Path:
        return cache_folder() / "plans" / f"runtime-{self._library.version}-sm{self.facts.target}"

    def _uncapturable(self) -> str:
        mend = "engine.cuda_graphs=false" if self._library.rtx or self.facts.plugin else "engine.plugin=true"
        return f"{self._library.name} can't run this plan in a CUDA graph: {self._said()}; set {mend}"

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise RuntimeError(f"{self._library.name} can't {what}: {self._said()}")

    def _said(self) -> str:
        said: str = logger(self._library).take()
        return said


class Staged:
    """A packed batch as TensorRT wants it: each tensor at an aligned place of one page-locked buffer."""

    def __init__(self, capacity: int, pin: bool) -> None:
        self.buffer = staging.zeros(capacity, pin)
        self.places: dict[str, tuple[int, tuple[int, ...]]] = {}  # byte offset and shape, by name
        self.rulers: dict[str, tuple[int, ...]] = {}
        self.words = 0  # of the buffer in use
        self.candidates = 0

    def fill(self, host: HostBatch, history: int, tile_rows: int) -> None:
        """Lay the batch out. history: contextual tokens and events of the longest, as in `Sizes`."""
        arrays = dict(zip(host.sizes, host.buffer.split(list(host.sizes.values())), strict=True))
        arrays["offsets"] = arrays["q_offsets"]
        values, at = self.buffer.numpy(), 0
        self.places.clear()
        for name, (dtype, _) in INPUTS.items():
            if name in ("tiles", "columns"):
                continue
            array = arrays[name].numpy()
            n = len(array)
            if dtype == torch.float32:
                values[at : at + -(-n // 2)].view(np.float32)[:n] = array.view(np.float64)
            else:
                values[at : at + n] = array
            self.places[name] = at * 8, (n,)
            at += _padded(n)
        tiles = max(-(-host.max_q_len // tile_rows), 1)
        self.rulers = {"tiles": (tiles, max(-(-host.max_q_len // tiles), 1)), "columns": (history,)}
        self.words, self.candidates = at, host.sizes["candidate_rows"]


class TensorRTEngine(RankingEngine):
    """The exported model as a TensorRT plan.

    Raises UnavailableError where the library or a GPU that it executes on is missing, and ValueError for options that
    contradict each other.
    """

    name = "tensorrt"

    def __init__(self, options: TensorRTConfig, setup: Setup) -> None:
        refuse_cache(setup, self.name)
        refuse_kernels(setup, self.name, " (engine.plugin has attention in Triton)")
        precision = options.precision if options.precision != "auto" else "bf16"
        if options.refit and plans.BASE[precision] != precision:
            raise ValueError(
                f"engine.refit=true and engine.precision={precision}: scales belong to one set of weights; "
                "set engine.refit=false"
            )
        self._options = options
        self._library = find(options.library)
        if not torch.cuda.is_available():
            raise UnavailableError(
                "engine=tensorrt executes on an NVIDIA GPU, and PyTorch finds none; plans can be built here: "
                "python -m grbench build-plan --out PLAN"
            )
        super().__init__(setup, Placement(torch.device("cuda", torch.cuda.current_device()), precision))
        self._target = "{}.{}".format(*torch.cuda.get_device_capability(self._device))
        if reason := self._library.refusal(self._target):
            raise UnavailableError(f"{reason}; use engine=aoti here")
        self._plan: plans.Plan | None = None
        self._execution: Execution | None = None
        self._staged: Staged | None = None
        self._graphs: dict[Bucket, Graph] = {}
        self._refitted = False  # the plan was built with other weights
        self._seconds = {"build_s": 0.0, "load_s": 0.0}

    @torch.inference_mode()
    def _load(self, sample: Sequence[Request], max_batch: int) -> None:
        """Load the plan, after building it where there is none yet, and capture the graphs.

        Raises ValueError for a plan that does not belong here.
        """
        facts, feeds = self._facts(sample, max_batch)
        begun = time.perf_counter()
        self._plan = self._find(facts, feeds)
        loading = time.perf_counter()
        graphs, setup = self._options.cuda_graphs, self._setup
        self._execution = Execution(self._plan, self._library, len(self._model_config.tasks), self._device, graphs)
        self._refitted = self._plan.facts.model_hash != facts.model_hash
        if self._refitted:
            base = exporter.cached(self._model_config, setup.catalogue, setup.seed, plans.BASE[self._precision])
            self._execution.refit(base.onnx)
        self._staged = Staged(self._execution.capacity, pin=True)
        if graphs and not self._library.rtx:  # which captures by itself
            for bucket in plan_buckets(sample, self._encoding, max_batch, []):
                self._capture(bucket)
        self._seconds = {"build_s": loading - begun, "load_s": time.perf_counter() - loading}

    @torch.inference_mode()
    def _warm_up(self, sample: Sequence[Request], max_batch: int) -> None:
        execution, largest = self._ready(self._execution), self._largest(sample, max_batch)
        try:
            self.rank(largest)
            if self._options.cuda_graphs and self._library.rtx:
                execution.check_captured(Sizes.of(largest, self._encoding))
        except OutsideError:  # of a plan that was given
            if not self._options.fallback:
                raise
        execution.save_runtime_cache()

    @torch.inference_mode()
    def rank(self, requests: Sequence[Request]) -> RankResult:
        """As grengines.api.Ranker. Calls from several threads take turns. Raises OutsideError for a batch that no
        profile of the plan holds, RuntimeError before `prepare`."""
        execution, staged = self._ready(self._execution), self._ready(self._staged)
        with self._lock, torch.cuda.stream(execution.stream):
            begun = time.perf_counter()
            needed = check(requests, self._encoding, execution.facts.profiles[-1], _hint(self._options))
            counts = [token_count(r, self._encoding) for r in requests]
            bucket = choose_bucket(list(self._graphs), counts, [len(r.candidates) for r in requests])
            host = pack(requests, self._encoding, bucket=bucket)
            staged.fill(host, needed.history if bucket is None else self._columns(bucket), execution.facts.tile_rows)
            batch_ms = (time.perf_counter() - begun) * 1e3
            marks = Marks(self._device)
            execution.upload(staged)
            marks.add()
            if bucket is None:
                logits = execution.run(staged, needed)
            else:
                self._graphs[bucket].graph.replay()
                logits = self._graphs[bucket].logits
            graphs = self._options.cuda_graphs and not self._library.rtx
            details = {"eager_batches": float(bucket is None)} if graphs else {}
            return collect(logits, [host], marks, batch_ms, details)()

    def _describe(self) -> dict[str, Any]:
        plan, graphs = self._plan, self._options.cuda_graphs
        return {
            "library": f"{self._library.name} {self._library.version}",
            "compute_capability": self._target,
            "kernels": {},
            "plan": str(plan.folder) if plan else None,
            "plan_bytes": plan.manifest["bytes"] if plan else 0,
            "facts": asdict(plan.facts) if plan else {},
            "refitted": self._refitted,
            "graph_buckets": [list(b) for b in self._graphs],
            "cuda_graphs": "by TensorRT for RTX" if graphs and self._library.rtx else len(self._graphs),
            **self._seconds,
            "cache": {"name": "none"},
        }

    def _unload(self) -> None:
        self._graphs = {}
        if self._execution is not None:
            self._execution.close()
        self._execution, self._staged, self._plan = None, None, None

    def _facts(self, sample: Sequence[Request], max_batch: int) -> tuple[plans.Facts, list[dict[str, Any]]]:
        """What the plan must be, and the calibration set that it is built with."""
        sizes = profiles(sample, self._encoding, max_batch, self._options.profiles)
        options = {
            "precision": self._precision,
            "target": self._target,
            "profiles": sizes,
            "refit": self._options.refit,
            "plugin": self._options.plugin,
        }
        setup = self._setup
        facts = plans.Facts.of(self._library, self._model_config, setup.catalogue, setup.seed, **options)  # type: ignore[arg-type]
        if plans.BASE[self._precision] == self._precision:
            return facts, []
        feeds = samples.feeds(sample, self._encoding, self._options.calibration, facts.tile_rows)
        return replace(facts, calibration=samples.digest(feeds)), feeds

    def _find(self, facts: plans.Facts, feeds: list[dict[str, Any]]) -> plans.Plan:
        if self._options.plan is None:
            setup = self._setup
            return plans.cached(self._library, facts, self._model_config, setup.catalogue, setup.seed, feeds)
        build = f"python -m grbench build-plan --out {self._options.plan}"
        return plans.load(
            Path(self._options.plan), facts, f"set engine.plan=null, and one is built, or build it: {build}"
        )

    def _columns(self, bucket: Bucket) -> int:
        """How far attention pads its keys in a bucket: as any batch of it may need."""
        assert self._execution is not None
        return min(bucket.length, self._execution.facts.profiles[-1].history)

    def _capture(self, bucket: Bucket) -> None:
        """Capture the bucket's graph, unless the plan was not built for so large a batch."""
        assert self._execution is not None and self._staged is not None
        length, columns = bucket.length, self._columns(bucket)
        needed = Sizes(bucket.batch, bucket.batch * length, length, columns, bucket.batch * bucket.candidates)
        if not needed.fits(self._execution.facts.profiles[-1]):
            return
        self._staged.fill(pack([], self._encoding, bucket=bucket), columns, self._execution.facts.tile_rows)
        with torch.cuda.stream(self._execution.stream):
            self._graphs[bucket] = self._execution.capture(self._staged, needed)


def _hint(config: TensorRTConfig) -> str:
    if config.plan is not None:
        return f"build a larger one (python -m grbench build-plan --out {config.plan}), or set engine.fallback=[hstu]"
    return "prepare it with requests as large, or set engine.fallback=[hstu]"


def _counts(sizes: Sizes) -> dict[str, int]:
    """Words of each input of the largest batch."""
    most = {"L": sizes.tokens, "B": sizes.batch, "B + 1": sizes.batch + 1, "M": sizes.candidates}
    return {name: most[dims[0]] for name, (_, dims) in INPUTS.items() if dims[0] in most}


def _padded(words: int) -> int:
    """Words that keep what comes next aligned."""
    step = ALIGNMENT // 8
    return -(-words // step) * step
