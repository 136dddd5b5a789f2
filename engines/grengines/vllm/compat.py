"""Everything that depends on vLLM's version. Tested with 0.32 on a CPU and 0.25 on a GPU.

Importing this module imports vLLM, once its environment is set: no usage reports, nothing downloaded, nothing
listening but on localhost, the engine core in this process.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from typing import Any

SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the core in this process: hidden states stay on the device
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the runner that pools in both versions
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
os.environ.update(SETTINGS)
# Piecewise CUDA graphs by breaking the capture at attention, without torch.compile: our kernels stay what they are.
# Read when vLLM is imported; the engine says otherwise for vLLM's own models.
os.environ.setdefault("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from vllm import EngineArgs, PoolingParams  # noqa: E402
from vllm.compilation.breakable_cudagraph import eager_break_during_capture  # noqa: E402
from vllm.config import VllmConfig  # noqa: E402
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # noqa: E402
from vllm.forward_context import get_forward_context  # noqa: E402
from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.model_executor.layers.pooler.abstract import Pooler  # noqa: E402
from vllm.v1.attention.backend import (  # noqa: E402
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.engine import EngineCoreRequest  # noqa: E402
from vllm.v1.engine.core_client import InprocClient  # noqa: E402
from vllm.v1.executor import Executor  # noqa: E402
from vllm.version import __version__ as VERSION  # noqa: E402

__all__ = [
    "VERSION",
    "Attention",
    "AttentionBackend",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "CommonAttentionMetadata",
    "EngineArgs",
    "InprocClient",
    "LayoutMixin",
    "Pooler",
    "VllmConfig",
    "cached_tokens",
    "close",
    "core_request",
    "eager_break_during_capture",
    "has_cached",
    "last_log_lines",
    "metadata_of_step",
    "model_of",
    "pages",
    "start",
]

try:  # since 0.30 vLLM lays pages out by itself, and a backend names the orders that it takes
    from vllm.v1.kv_cache_interface import KVCacheLayout
except ImportError:
    KVCacheLayout = None


class LayoutMixin:
    """Pages as [blocks, tokens, heads, keys then values] in memory, whichever way the version asks."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        return (KVCacheLayout.LBNHC,)

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return num_blocks, block_size, num_kv_heads, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        return tuple(range(5 if include_num_layers_dimension else 4))


def pages(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values [blocks, tokens, H, d] of one layer: views of what vLLM allocated."""
    if KVCacheLayout is not None:
        kv_cache = kv_cache.transpose(1, 2)
    return kv_cache[..., :head_size], kv_cache[..., head_size:]


running: InprocClient | None = None  # vLLM keeps its process groups in globals: one core at a time


def start(arguments: dict[str, Any]) -> tuple[InprocClient, VllmConfig]:
    """An engine core in this process. arguments: of EngineArgs."""
    global running
    _last.lines.clear()
    config = EngineArgs(**arguments).create_engine_config()
    logging.getLogger("vllm").addHandler(_last)  # again: vLLM sets its handlers when it makes a configuration
    running = InprocClient(vllm_config=config, executor_class=Executor.get_class(config), log_stats=False)
    return running, config


class _LastLines(logging.Handler):
    """Keeps the last few lines of vLLM's log from warnings up."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=3)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(" ".join(record.getMessage().split())[:300])


_last = _LastLines()


def last_log_lines() -> list[str]:
    """What vLLM's log said last, oldest first: warnings and errors."""
    return list(_last.lines)


def model_of(core: InprocClient) -> Any:
    """The model that the core's worker runs."""
    return core.engine_core.model_executor.driver_worker.worker.get_model()


def core_request(request_id: str, tokens: list[int], sink: str, read_cache: bool) -> EngineCoreRequest:
    """A pooling request. sink: where the pooler puts its rows. read_cache: whether it may hit the prefix cache."""
    params = PoolingParams(task="plugin", skip_reading_prefix_cache=not read_cache, extra_kwargs={"sink": sink})
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=tokens,
        mm_features=None,
        sampling_params=None,
        pooling_params=params,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def cached_tokens(output: Any) -> int:
    """Tokens of a finished request that the prefix cache held when it began."""
    return int(output.prefill_stats.num_cached_tokens) if output.prefill_stats else 0


def has_cached(common: CommonAttentionMetadata) -> bool:
    """Whether any request of this step has tokens in pages already; told without waiting for the device."""
    ends = common.seq_lens_cpu_upper_bound
    if ends is None:
        return True
    starts = common.query_start_loc_cpu
    return bool((ends[: len(starts) - 1] > starts.diff()).any())


def metadata_of_step(layer: str) -> Any:
    """What the builder made for this step and layer; None while vLLM profiles or captures."""
    made = get_forward_context().attn_metadata
    return made.get(layer) if isinstance(made, dict) else None


def close(core: InprocClient) -> None:
    """End the core and give its memory back, with what vLLM keeps in the process for the next one."""
    global running
    running = None
    core.shutdown()  # also unfreezes what the garbage collector was told to leave alone, the model among it
    core.engine_core = None
    cleanup_dist_env_and_memory()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
