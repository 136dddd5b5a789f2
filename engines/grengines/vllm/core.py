"""vLLM's engine core in this process: start, requests, steps, and an end that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from grengines.api import Int64Array
from grengines.vllm import (
    compat,
    model,  # noqa: F401  (registered as classes then; vLLM inspects what it knows by name in a process: ten seconds)
    plugin,
)
from grengines.vllm.environment import unchanged_process

_running = False


class VLLMCore:
    """A running engine core, until `close`. The process has one at a time, since vLLM keeps its groups in globals.

    arguments: of vLLM's EngineArgs. variables: of its environment. Raises RuntimeError while another core runs, and
    ValueError with vLLM's own words for arguments that it refuses. What vLLM changes in the process is restored by
    `close`, and after a failed start.
    """

    def __init__(self, arguments: dict[str, Any], variables: Mapping[str, str] = {}) -> None:
        with ExitStack() as opened:
            opened.enter_context(_one_a_process())
            opened.enter_context(unchanged_process(variables))
            plugin.register()
            self._log = compat.LastLogLines()
            opened.callback(compat.release_memory)
            try:
                self.config = compat.engine_config(arguments)
                opened.enter_context(self._log.attached())
                self.client: Any = compat.client(self.config)
            except ValueError as e:
                raise ValueError(f"vLLM refuses: {' '.join(str(e).split())}") from e
            opened.callback(self._shut_down)
            self.model = compat.model_of(self.client)
            compat.reserve_tokens(self.client, self.model.beam_tokens)
            compat.hash_prefixes(self.client, self.config.cache_config.block_size)
            self._opened = opened.pop_all()

    @property
    def blocks(self) -> int:
        """Return the number of pages of the KV cache."""
        return int(self.config.cache_config.num_gpu_blocks)

    @property
    def prefix_caching(self) -> bool:
        return bool(self.config.cache_config.enable_prefix_caching)

    def submit(self, name: str, prompt: Int64Array) -> None:
        """Add a request of this prompt, int64 [tokens]. The model's pooler names its result so."""
        tokens = compat.TokenIds(prompt.tolist(), prompt)
        self.client.add_request(compat.core_request(name, tokens, self.prefix_caching))

    def step(self) -> list[Any]:
        """Schedule one step. Return the outputs of the requests that have finished since the last call.

        With asynchronous scheduling these are requests of an earlier step: the device may still compute the latest.
        Raises RuntimeError with vLLM's own error, and torch.OutOfMemoryError unchanged. The core is then unusable.
        """
        try:
            outputs = self.client.get_output().outputs
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as e:
            reason = " ".join(str(e).split()) or "no message"
            causes = "; ".join([f"{type(e).__name__}: {reason}", *self._log.lines])
            raise RuntimeError(f"vLLM's engine core died: {causes}; the log has the rest") from e
        return [output for output in outputs if output.finished]

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache. Raises RuntimeError while requests are in flight."""
        if self.prefix_caching and not self.client.reset_prefix_cache():
            raise RuntimeError("vLLM didn't empty its prefix cache: requests are in flight")

    def describe(self) -> dict[str, Any]:
        """Return vLLM's resolved configuration, as JSON values."""
        config, graphs = self.config, self.config.compilation_config
        layer = next(m for m in self.model.modules() if isinstance(m, compat.Attention))
        return {
            "vllm": compat.VERSION,
            "attention_backend": layer.attn_backend.__name__,
            "kernels": self.model.kernels,
            "prefix_caching": self.prefix_caching,
            "chunked_prefill": bool(config.scheduler_config.enable_chunked_prefill),
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_model_len": config.model_config.max_model_len,
            "block_size": config.cache_config.block_size,
            "kv_blocks": self.blocks,
            "compilation": graphs.mode.name,
            "cuda_graphs": graphs.cudagraph_mode.name,
            "graph_tokens": list(graphs.cudagraph_capture_sizes or []),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def close(self) -> None:
        """End the core, give its memory back, and restore the process. A second call does nothing."""
        self._opened.close()

    def _shut_down(self) -> None:
        client, self.client, self.model, self.config = self.client, None, None, None
        compat.shut_down(client)


@contextmanager
def _one_a_process() -> Iterator[None]:
    """Count the core of this process. Raises RuntimeError if there is one."""
    global _running
    if _running:
        raise RuntimeError("another engine of this process runs vLLM, which can run once in a process; close it first")
    _running = True
    try:
        yield
    finally:
        _running = False
