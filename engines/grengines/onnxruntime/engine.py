"""The exported model in ONNX Runtime: inputs and logits stay where they are, bound by address."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from grengines.api import Catalogue, RankResult, Request, UnavailableError
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.export.identity import command, model_hash
from grengines.export.module import OUTPUT, gpu_tile_rows, inputs_of, longest_history
from grengines.models.hstu.config import HSTUConfig
from grengines.onnxruntime.config import OnnxRuntimeConfig
from grengines.onnxruntime.session import PROVIDERS, open_session, resolve_device, resolve_precision
from grengines.runtime.batch import Encoding, pack
from grengines.runtime.graphs import token_count
from grengines.runtime.results import Marks, collect
from grkernels.families import AUTO

if TYPE_CHECKING:
    from grengines.export.exporter import Export

CPU_TILE_ROWS = 128  # one tile's scores stay in the processor's cache


class OnnxRuntimeEngine:
    """Satisfies grengines.api.Ranker.

    Raises UnavailableError for a device or precision that ONNX Runtime hasn't here, and ValueError for options that
    mean nothing to it.
    """

    def __init__(
        self,
        config: OnnxRuntimeConfig,
        model: HSTUConfig,
        kernels: dict[str, str],
        catalogue: Catalogue,
        seed: int,
        cache: CacheConfig | PagedCacheConfig,
    ) -> None:
        if cache.name != "none" or cache.item_memory_gb:
            raise ValueError("engine=onnxruntime computes whole histories with the whole model; set cache=none")
        if other := set(kernels.values()) - {AUTO, "torch"}:
            raise ValueError(
                f"engine=onnxruntime runs its own kernels, not {', '.join(sorted(other))}; set kernel=auto"
            )
        self._config, self._model, self._catalogue, self._seed = config, model, catalogue, seed
        self._device = resolve_device(config.device)
        self._precision = resolve_precision(config.precision, self._device)
        self._encoding = Encoding.of(model, catalogue)
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._session: Any = None
        self._path: Path | None = None
        self._max_batch = 0
        self._seconds = {"export_s": 0.0, "load_s": 0.0}

    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        """Export the model, unless that was done before or a file is given, load it, and run the largest batch once.

        Raises ValueError for an empty sample, bad weights or a bad file, UnavailableError.
        """
        if not sample or max_batch < 1:
            raise ValueError(f"{len(sample)} sample requests, max_batch={max_batch}: both must be at least 1")
        begun = time.perf_counter()
        digest = model_hash(self._model, self._catalogue, self._seed)
        if self._config.onnx is None:
            found = self._exported()
            path, mend = found.onnx, f"delete {found.folder}, it is then exported again"
        else:
            path = Path(self._config.onnx)
            words = command(self._model, self._catalogue, self._seed, self._precision, path.parent)
            mend = f"export this model: {words}"
        exported = time.perf_counter()
        stream = self._stream.cuda_stream if self._stream else 0
        self._session = open_session(path, self._config, self._device, stream, digest, self._precision, mend)
        self._seconds = {"export_s": exported - begun, "load_s": time.perf_counter() - exported}
        self._path, self._max_batch = path, max_batch
        self.rank(sorted(sample, key=lambda r: token_count(r, self._encoding))[-max_batch:])

    def _exported(self) -> Export:
        """The model's own export. Raises UnavailableError without the packages that make one."""
        try:
            from grengines.export import exporter
        except ImportError as e:
            raise UnavailableError(
                f"package {e.name} is not installed; pip install -e '.[onnx]', or name an export: engine.onnx=FILE"
            ) from None
        # Not on a GPU, which would have to wait for the host to learn each tile's shape.
        skip_hidden = self._device.type == "cpu"
        return exporter.cached(self._model, self._catalogue, self._seed, self._precision, skip_hidden=skip_hidden)

    @torch.inference_mode()
    def rank(self, requests: Sequence[Request]) -> RankResult:
        """As grengines.api.Ranker; calls from several threads take turns. Raises ValueError for more than max_batch
        requests, RuntimeError unprepared."""
        if self._session is None:
            raise RuntimeError("the engine is not prepared, or closed; call prepare() first")
        if not 0 < len(requests) <= self._max_batch:
            raise ValueError(f"{len(requests)} requests in one batch; allowed is 1 to max_batch={self._max_batch}")
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
        """Logits fp32 [M, tasks] of the exported model's inputs, on the device."""
        candidates = inputs["candidate_rows"].shape[0]
        logits = torch.empty(candidates, len(self._model.tasks), device=self._device)
        if not candidates:
            return logits
        binding, kind, index = self._session.io_binding(), self._device.type, self._device.index or 0
        for name, tensor in inputs.items():
            tensor = tensor.contiguous()
            inputs[name] = tensor  # alive until the run is over
            element = np.float32 if tensor.dtype == torch.float32 else np.int64
            binding.bind_input(name, kind, index, element, tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output(OUTPUT, kind, index, np.float32, tuple(logits.shape), logits.data_ptr())
        self._session.run_with_iobinding(binding)
        return logits

    def _tile_rows(self, batch: int, rows: int, columns: int) -> int:
        if self._config.tile_rows or self._device.type == "cpu":
            return self._config.tile_rows or CPU_TILE_ROWS
        return min(gpu_tile_rows(batch, self._model.heads, columns), max(rows, 1))

    def actual(self) -> dict[str, Any]:
        """What really runs; JSON values."""
        cuda = self._device.type == "cuda"
        files = list(self._path.parent.glob(f"{self._path.name}*")) if self._path else []
        return {
            "engine": "onnxruntime",
            "device": self._device.type,
            "device_name": torch.cuda.get_device_name(self._device) if cuda else "cpu",
            "precision": self._precision,
            "providers": self._session.get_providers() if self._session else [PROVIDERS[self._device.type]],
            "kernels": {},
            "optimisation": self._config.optimisation,
            "cpu_threads": self._config.cpu_threads,
            "tile_rows": self._config.tile_rows or ("by memory" if cuda else CPU_TILE_ROWS),
            "onnx": str(self._path),
            "onnx_bytes": sum(file.stat().st_size for file in files),
            "model_hash": model_hash(self._model, self._catalogue, self._seed),
            **self._seconds,
            "timer": "CUDA events, one wait a batch" if cuda else "perf_counter",
            "weights": self._model.weights or f"random, seed {self._seed}",
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None,
        }

    def reset_cache(self, keep_host: bool = False) -> None:
        """Nothing is cached of users."""

    def close(self) -> None:
        """Release the session and its memory. Safe to call twice."""
        self._session = None
