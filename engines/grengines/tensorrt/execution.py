"""Execution of a plan: contexts, a stream, buffers at fixed addresses, captured graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grengines.api import UnavailableError
from grengines.export.module import INPUTS, OUTPUT, tiled
from grengines.runtime import atomic_io, staging
from grengines.runtime.batch import HostBatch
from grengines.runtime.profile import Sizes
from grengines.tensorrt import plan as plans
from grengines.tensorrt.library import Library, logger
from grkernels.cache_folder import cache_folder

ALIGNMENT = 256  # bytes, of every tensor that TensorRT reads


class Graph(NamedTuple):
    """The captured graph of one bucket. It reads every batch from the same buffer."""

    graph: torch.cuda.CUDAGraph
    context: Any  # kept, because a graph is valid only while its context is unchanged
    logits: Tensor


class Execution:
    """A plan on the device: an execution context for each profile, a stream, and buffers at fixed addresses.

    Batches run one after another on that stream, because all contexts share their memory, and all batches one buffer.
    """

    def __init__(self, plan: plans.Plan, library: Library, tasks: int, device: torch.device, graphs: bool) -> None:
        """Load the plan. Raises UnavailableError, with the library's message, if it can't be loaded here."""
        trt, log = library.module, logger(library)
        log.take()
        self.facts, self._library, self._device = plan.facts, library, device
        self.stream = torch.cuda.Stream(device)
        self._runtime = trt.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read())
        if self._engine is None:
            raise UnavailableError(f"{library.name} {library.version} can't load {plan.folder}: {log.take()}")
        self._kernels: Any = None  # TensorRT for RTX: kernels compiled on this GPU
        self._config = self._runtime_config(graphs)
        self._scratch = torch.empty(self._engine.device_memory_size_v2, dtype=torch.uint8, device=device)
        self._contexts = [self._context(i) for i in range(len(self.facts.profiles))]
        most = self.facts.profiles[-1]
        longest = max(-(-most.longest // self.facts.tile_rows) * self.facts.tile_rows, most.history)
        self._ruler = torch.arange(longest, device=device)
        self.capacity = words_of(most)
        self._buffer = torch.zeros(self.capacity, dtype=torch.int64, device=device)
        self._logits = torch.empty(most.candidates, tasks, device=device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # which wrote these buffers

    def upload(self, host: Staged) -> None:
        """Queue the copy of a batch to the buffer, on the current stream."""
        self._buffer[: host.words].copy_(host.buffer[: host.words], non_blocking=True)

    def run(self, host: Staged, needed: Sizes) -> Tensor:
        """Queue the uploaded batch. Returns logits [M, tasks], valid until the next run."""
        return self._enqueue(self._contexts[self._profile(needed)], host)

    def capture(self, host: Staged, needed: Sizes) -> Graph:
        """Capture a graph for batches of exactly these sizes, from a context of its own that has run before.

        Raises UnavailableError for a plan that can't be captured, because its attention is a loop.
        """
        context = self._context(self._profile(needed))
        self.upload(host)
        logits = self._enqueue(context, host)
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                done = context.execute_async_v3(self.stream.cuda_stream)
        except RuntimeError:  # PyTorch's, for an invalidated capture
            done = False
        if not done:
            raise UnavailableError(self._uncapturable())
        return Graph(graph, context, logits)

    def check_captured(self, needed: Sizes) -> None:
        """Raise UnavailableError if TensorRT for RTX did not capture the batch of these sizes that ran before.

        It captures by itself, and continues silently without a graph.
        """
        if not self._contexts[self._profile(needed)].is_stream_capturable(self.stream.cuda_stream):
            raise UnavailableError(self._uncapturable())

    def refit(self, onnx: Path) -> None:
        """Replace the weights of the loaded plan by an exported model's. No batch may be running."""
        trt, log = self._library.module, logger(self._library)
        refitter = trt.Refitter(self._engine, log)
        parser = trt.OnnxParserRefitter(refitter, log)
        self._check(parser.refit_from_file(str(onnx)) and refitter.refit_cuda_engine(), f"take the weights of {onnx}")

    def save_runtime_cache(self) -> None:
        """Save the kernels that TensorRT for RTX compiled on this GPU for the next start."""
        if self._library.rtx:
            atomic_io.write(self._runtime_file(), bytes(self._kernels.serialize()))

    def close(self) -> None:
        """Wait for running work and release everything. Captured graphs must be released before.

        Contexts come before the configuration, which must not outlive the engine.
        """
        self.stream.synchronize()
        del self._contexts, self._config, self._kernels, self._engine, self._runtime

    def _enqueue(self, context: Any, host: Staged) -> Tensor:
        begin = self._buffer.data_ptr()
        for name, (offset, shape) in host.places.items():
            self._bind(context, name, shape, begin + offset)
        for name, shape in host.rulers.items():  # they count from 0
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
        """Return the smallest profile that holds such a batch."""
        return next(i for i, sizes in enumerate(self.facts.profiles) if needed.fits(sizes))

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise torch.cuda.OutOfMemoryError(f"no execution context for profile {profile}: {self._last_errors()}")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        self._check(context.set_optimization_profile_async(profile, self.stream.cuda_stream), f"use profile {profile}")
        self.stream.synchronize()
        return context

    def _runtime_config(self, graphs: bool) -> Any:
        """Return the contexts' configuration: they use memory of this class.

        TensorRT for RTX also gets the saved kernels, and captures CUDA graphs if they are on.
        """
        trt = self._library.module
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._library.rtx:
            self._kernels = config.create_runtime_cache()
            if self._runtime_file().is_file():  # a file of another driver or GPU leaves the cache empty
                self._kernels.deserialize(self._runtime_file().read_bytes())
            self._check(config.set_runtime_cache(self._kernels), "use its runtime cache")
            if graphs:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config

    def _runtime_file(self) -> Path:
        return cache_folder() / "plans" / f"runtime-{self._library.version}-sm{self.facts.target}"

    def _uncapturable(self) -> str:
        fix = "engine.cuda_graphs=false" if self._library.rtx or self.facts.plugin else "engine.plugin=true"
        return f"{self._library.name} can't run this plan in a CUDA graph: {self._last_errors()}; set {fix}"

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise RuntimeError(f"{self._library.name} can't {what}: {self._last_errors()}")

    def _last_errors(self) -> str:
        errors: str = logger(self._library).take()
        return errors


class Staged:
    """A packed batch for TensorRT: each tensor at an aligned offset of one page-locked buffer."""

    def __init__(self, capacity: int, pin: bool) -> None:
        self.buffer = staging.zeros(capacity, pin)
        self.places: dict[str, tuple[int, tuple[int, ...]]] = {}  # byte offset and shape, by name
        self.rulers: dict[str, tuple[int, ...]] = {}
        self.words = 0  # of the buffer in use
        self.candidates = 0

    def fill(self, host: HostBatch, history: int, tile_rows: int) -> None:
        """Copy the batch into the buffer. history: contextual tokens and events of the longest, as in `Sizes`."""
        arrays = dict(zip(host.sizes, host.buffer.split(list(host.sizes.values())), strict=True))
        arrays["offsets"] = arrays["q_offsets"]
        values, at = self.buffer.numpy(), 0
        self.places.clear()
        for name, (dtype, _) in INPUTS.items():
            if name not in arrays:  # those that only count
                continue
            array = arrays[name].numpy()
            n = len(array)
            if dtype == torch.float32:
                values[at : at + -(-n // 2)].view(np.float32)[:n] = array.view(np.float64)
            else:
                values[at : at + n] = array
            self.places[name] = at * 8, (n,)
            at += _padded(n)
        rows = {"tiles": host.max_q_len, "candidate_tiles": host.max_candidates}
        self.rulers = {**{name: tiled(n, tile_rows) for name, n in rows.items()}, "columns": (history,)}
        self.words, self.candidates = at, host.sizes["candidate_rows"]


def words_of(sizes: Sizes) -> int:
    """Return the words of 8 bytes that the inputs of the largest batch take, each aligned."""
    most = {"L": sizes.tokens, "B": sizes.batch, "B + 1": sizes.batch + 1, "M": sizes.candidates}
    return sum(_padded(most[dims[0]]) for _, dims in INPUTS.values() if dims[0] in most)


def _padded(words: int) -> int:
    """Round up to the words after which the next tensor is aligned."""
    step = ALIGNMENT // 8
    return -(-words // step) * step
