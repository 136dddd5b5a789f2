"""Everything that depends on vLLM's version. Tested with 0.32 on a CPU and 0.25 on a GPU.

Importing this module imports vLLM, once its environment is set: no usage reports, nothing downloaded, nothing
listening but on localhost, the engine core in this process.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

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
# CUDA graphs without torch.compile, so that our kernels stay what they are; piecewise ones break the capture at
# attention. Read when vLLM is imported.
os.environ.setdefault("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from vllm import EngineArgs, PoolingParams  # noqa: E402
from vllm.compilation.breakable_cudagraph import eager_break_during_capture  # noqa: E402
from vllm.config import CUDAGraphMode, VllmConfig  # noqa: E402
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # noqa: E402
from vllm.forward_context import get_forward_context  # noqa: E402
from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.model_executor.layers.pooler.abstract import Pooler  # noqa: E402
from vllm.model_executor.models import qwen3  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention.backend import (  # noqa: E402
    AttentionBackend,
    AttentionCGSupport,
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
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "CommonAttentionMetadata",
    "EngineArgs",
    "InprocClient",
    "OurBackend",
    "Pooler",
    "TokenIds",
    "VllmConfig",
    "cached_tokens",
    "close",
    "core_request",
    "eager_break_during_capture",
    "flash_attention",
    "has_cached",
    "hashes_of",
    "known_hashes",
    "last_log_lines",
    "metadata_of_step",
    "model_of",
    "pages",
    "qwen3_with",
    "start",
]

try:  # since 0.30 vLLM lays pages out by itself, and a backend names the orders that it takes
    from vllm.v1.kv_cache_interface import KVCacheLayout
except ImportError:
    KVCacheLayout = None


class OurBackend(AttentionBackend):
    """What our attention backends share. Pages are [blocks, tokens, heads, keys then values] in memory, whichever way
    the version asks."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

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


@contextmanager
def qwen3_with(backend: type[AttentionBackend], **options: Any) -> Iterator[None]:
    """While it lasts, vLLM's Qwen3 is built with this attention, its implementations with these further arguments. On
    CPUs vLLM has no option for it."""
    own = qwen3.Attention
    qwen3.Attention = partial(Attention, attn_backend=backend, **options)
    try:
        yield
    finally:
        qwen3.Attention = own


def flash_attention(head_size: int, dtype: torch.dtype) -> Callable[..., Any] | None:
    """vLLM's FlashAttention, of the version for this GPU; None on CPUs, in fp32, and for head sizes that it lacks."""
    if not current_platform.is_cuda() or dtype == torch.float32:
        return None
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    version = get_flash_attn_version(head_size=head_size)
    if version is None or not FlashAttentionBackend.supports_head_size(head_size):
        return None
    return partial(flash_attn_varlen_func, fa_version=version)


running: InprocClient | None = None  # vLLM keeps its process groups in globals: one core at a time


def start(arguments: dict[str, Any]) -> tuple[InprocClient, VllmConfig]:
    """An engine core in this process. arguments: of EngineArgs."""
    global running
    _last.lines.clear()
    config = EngineArgs(**arguments).create_engine_config()
    if arguments.get("compilation_config", {}).get("cudagraph_mode") == "FULL":
        # Of pooling models vLLM makes that PIECEWISE, for the attention that they have as a rule. Ours can be captured.
        config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
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


def known_hashes(core: InprocClient) -> dict[str, list[Any]]:
    """Of requests to come, by id, the hashes of the blocks that they begin with: what is put here isn't computed
    again. A request takes its own away."""
    known: dict[str, list[Any]] = {}
    compute = core.engine_core.request_block_hasher  # None: without prefix caching

    def hashes(request: Any) -> list[Any]:
        if not request.block_hashes:
            request.block_hashes.extend(known.pop(request.request_id, ()))
        return compute(request)  # of the blocks behind those

    if compute is not None:
        core.engine_core.request_block_hasher = hashes
    return known


def hashes_of(core: InprocClient, request_id: str) -> list[Any]:
    """The hashes of a request's whole blocks; none without prefix caching."""
    return list(core.engine_core.scheduler.requests[request_id].block_hashes)


class TokenIds(list[int]):
    """A list, as vLLM wants it, that NumPy copies like the array of the same ids, int64 [tokens], that comes with it:
    vLLM's runner does that, and of thousands of objects it takes as long as all the rest of a request."""

    def __init__(self, ids: list[int], array: np.ndarray) -> None:
        super().__init__(ids)
        self._array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._array if dtype is None else self._array.astype(dtype)


def core_request(request_id: str, tokens: TokenIds, sink: str, read_cache: bool) -> EngineCoreRequest:
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
