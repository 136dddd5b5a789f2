"""engine=onnxruntime: the exported model in ONNX Runtime. Inputs and logits are bound by address, not copied."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from grengines.api import RankResult, Request, Setup, UnavailableError
from grengines.base import RankingEngine
from grengines.export.identity import command, model_hash
from grengines.export.module import OUTPUT, gpu_tile_rows, inputs_of, longest_history
from grengines.onnxruntime.config import OnnxRuntimeConfig
from grengines.onnxruntime.session import PROVIDERS, open_session, placement_of
from grengines.runtime.batch import pack
from grengines.runtime.results import collect
from grengines.runtime.timing import Marks

if TYPE_CHECKING:
    from grengines.export.exporter import Export

CPU_TILE_ROWS = 128  # one tile's scores stay in the processor's cache


class OnnxRuntimeEngine(RankingEngine):
    """Ranking with the exported model in a session of ONNX Runtime.

    Raises UnavailableError for a device or precision that ONNX Runtime lacks here, and ValueError for options that it
    would not use.
    """

    name = "onnxruntime"

    def __init__(self, options: OnnxRuntimeConfig, setup: Setup) -> None:
        super().__init__(setup, placement_of(options))
        self._options = options
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None
        self._session: Any = None
        self._path: Path | None = None
        self._seconds = {"export_s": 0.0, "load_s": 0.0}

    def _load(self, sample: Sequence[Request], max_batch: int) -> None:
        """Load the file that `engine.onnx` names, else the export in the cache, which is made if it is missing.

        Raises ValueError for a bad file.
        """
        begun = time.perf_counter()
        model, catalogue, seed = self._model_config, self._setup.catalogue, self._setup.seed
        if self._options.onnx is None:
            found = self._exported()
            path, hint = found.onnx, f"delete {found.folder}, it is then exported again"
        else:
            path = Path(self._options.onnx)
            hint = f"export this model: {command(model, catalogue, seed, self._precision, path.parent)}"
        exported = time.perf_counter()
        stream = self._stream.cuda_stream if self._stream else 0
        digest = model_hash(model, catalogue, seed)
        self._session = open_session(path, self._options, self._device, stream, digest, self._precision, hint)
        self._seconds = {"export_s": exported - begun, "load_s": time.perf_counter() - exported}
        self._path = path

    def _warm_up(self, sample: Sequence[Request], max_batch: int) -> None:
        self.rank(self._largest(sample, max_batch))

    def _exported(self) -> Export:
        """Return the export in the cache. Raises UnavailableError without the packages that make one."""
        try:
            from grengines.export import exporter
        except ImportError as e:
            raise UnavailableError(
                f"package {e.name} is not installed; pip install 'grbench[onnx]', or name an export: engine.onnx=FILE"
            ) from None
        # Not on a GPU, which would wait for the host to compute each tile's shape.
        setup, skip_hidden = self._setup, not self._cuda
        return exporter.cached(
            self._model_config, setup.catalogue, setup.seed, self._precision, skip_hidden=skip_hidden
        )

    @torch.inference_mode()
    def rank(self, requests: Sequence[Request]) -> RankResult:
        """Score every candidate of every request. Threads take turns.

        Raises ValueError for more than max_batch requests, RuntimeError before `prepare`.
        """
        self._ready(self._session)
        self._check_size(requests)
        with self._lock, torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            begun = time.perf_counter()
            host = pack(requests, self._encoding, pin=self._stream is not None)
            columns = longest_history(requests, self._encoding)
            batch_ms = (time.perf_counter() - begun) * 1e3
            marks = Marks(self._device)
            rows = self._tile_rows(len(requests), host.max_q_len, columns)
            inputs = inputs_of(host.to(self._device), columns, rows)
            marks.add()
            logits = self._run(inputs)
            return collect(logits, [host], marks, batch_ms, {})()

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the logits fp32 [M, tasks], on the device, of the exported model's inputs."""
        candidates = inputs["candidate_rows"].shape[0]
        logits = torch.empty(candidates, len(self._model_config.tasks), device=self._device)
        if not candidates:
            return logits
        binding, kind, index = self._session.io_binding(), self._device.type, self._device.index or 0
        for name, tensor in inputs.items():
            tensor = tensor.contiguous()
            inputs[name] = tensor  # keeps it alive during the run
            element = np.float32 if tensor.dtype == torch.float32 else np.int64
            binding.bind_input(name, kind, index, element, tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output(OUTPUT, kind, index, np.float32, tuple(logits.shape), logits.data_ptr())
        self._session.run_with_iobinding(binding)
        return logits

    def _tile_rows(self, batch: int, rows: int, columns: int) -> int:
        if self._options.tile_rows or not self._cuda:
            return self._options.tile_rows or CPU_TILE_ROWS
        return min(gpu_tile_rows(batch, self._model_config.heads, columns), max(rows, 1))

    def _describe(self) -> dict[str, Any]:
        setup = self._setup
        files = list(self._path.parent.glob(f"{self._path.name}*")) if self._path else []
        return {
            "providers": self._session.get_providers() if self._session else [PROVIDERS[self._device.type]],
            "kernels": {},
            "optimisation": self._options.optimisation,
            "cpu_threads": self._options.cpu_threads,  # of ONNX Runtime, not of PyTorch
            "tile_rows": self._options.tile_rows or ("by memory" if self._cuda else CPU_TILE_ROWS),
            "onnx": str(self._path),
            "onnx_bytes": sum(file.stat().st_size for file in files),
            "model_hash": model_hash(self._model_config, setup.catalogue, setup.seed),
            **self._seconds,
            "onnxruntime": onnxruntime.__version__,
        }

    def _unload(self) -> None:
        self._session = None
