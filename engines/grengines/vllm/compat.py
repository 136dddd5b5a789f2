"""The parts of vLLM that change between its versions, one class or function a hook. The rest of the engine uses these.

Tested with vLLM 0.32 on a CPU and 0.25 on a GPU. Each hook names the versions in which it is needed, the behaviour of
vLLM that it works around, and vLLM's issue or pull request about it where there is one. Importing this module imports
vLLM, and restores the environment afterwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from grengines.vllm.environment import environment
from grkernels.pages import EIGHT_BITS

with environment():  # some variables are read when vLLM is imported, and it sets others
    from vllm import EngineArgs, PoolingParams
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture
    from vllm.config import CUDAGraphMode, VllmConfig
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory, get_tp_group
    from vllm.forward_context import get_forward_context, set_forward_context
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.pooler.abstract import Pooler
    from vllm.model_executor.models import qwen3
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import (
        AttentionBackend,
        AttentionCGSupport,
        AttentionImpl,
        AttentionMetadata,
        AttentionMetadataBuilder,
        CommonAttentionMetadata,
    )
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.executor import Executor
    from vllm.v1.pool.metadata import PoolingMetadata
    from vllm.version import __version__ as VERSION

    try:
        from vllm.v1.kv_cache_interface import KVCacheLayout
    except ImportError:
        KVCacheLayout = None

__all__ = [
    "VERSION",
    "Attention",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "CommonAttentionMetadata",
    "EightBitAttention",
    "LastLogLines",
    "PageBackend",
    "Pooler",
    "PoolingMetadata",
    "Qwen3Attention",
    "Qwen3ForCausalLM",
    "TokenIds",
    "VllmConfig",
    "break_capture",
    "cached_tokens",
    "client",
    "core_request",
    "engine_config",
    "flash_attention",
    "forward_context",
    "from_first_rank",
    "has_cached",
    "hash_prefixes",
    "hashes_of_prefixes",
    "layer_of",
    "metadata_of_step",
    "model_of",
    "of_all_ranks",
    "pages_of",
    "pools",
    "release_memory",
    "reserve_tokens",
    "shut_down",
]

Function = TypeVar("Function", bound=Callable[..., Any])
SCALE = torch.float32  # of a key or a value in 8 bits


# Attention


class PageBackend(AttentionBackend):
    """Layout of the pages: [blocks, tokens, heads, keys then values] in memory, for all attention backends here.

    Versions: until 0.29 a backend returns a shape and a stride order. Since 0.30 vLLM lays pages out itself, a backend
    names the layouts that it takes, and the tensor that it gets has heads before tokens.
    See https://github.com/vllm-project/vllm/issues/42082.
    """

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

    @staticmethod
    def split(kv_cache: Tensor, head_size: int, stored: str = "") -> dict[str, Tensor]:
        """Return one layer's pages as arguments of paged_write and hstu_attention, views.

        k_pages and v_pages [blocks, tokens, H, d]. stored: int8 or fp8 for those of EightBitAttention, which also have
        k_scales and v_scales, fp32 [blocks, tokens, H].

        With `stored` a layer's tensor must be contiguous as [blocks, tokens, H, width], because its bytes are divided
        anew; PyTorch raises RuntimeError otherwise. Since 0.30 the layout LBNHC guarantees it, which keeps the layers
        apart and has tokens before heads. Until 0.29 the stride order above does, which keeps all axes in their order.
        """
        if KVCacheLayout is not None:
            kv_cache = kv_cache.transpose(1, 2)
        if not stored:
            return {"k_pages": kv_cache[..., :head_size], "v_pages": kv_cache[..., head_size:]}
        # The layer's bytes are all keys, all values and the scales of each, every part contiguous as in the native
        # engine's pool. vLLM need not know: it names pages by number, and 0.32 copies one only if a prefix may end
        # within it, which takes layers of several kinds.
        rows = kv_cache.shape[:3]
        sizes = [rows.numel() * head_size] * 2 + [rows.numel() * SCALE.itemsize] * 2
        k, v, *scales = kv_cache.view(-1).split(sizes)
        parts = {f"{x}_pages": part.view(EIGHT_BITS[stored]).view(*rows, -1) for x, part in (("k", k), ("v", v))}
        return parts | {f"{x}_scales": part.view(SCALE).view(rows) for x, part in zip("kv", scales, strict=True)}


class EightBitAttention(Attention):
    """vLLM's attention layer with pages in 8 bits: each key and each value has a scale, which its page has room for.

    Versions: 0.25 to 0.32. vLLM's own `kv_cache_dtype` of this kind is for its Triton backend, and where the scales are
    changed between versions. So vLLM gets rows of bytes that are longer by a scale, and counts pages of these.
    """

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        size = self.head_size + SCALE.itemsize
        spec = super().get_kv_cache_spec(vllm_config)
        return dataclasses.replace(spec, head_size=size, head_size_v=size, dtype=torch.uint8)


class Qwen3Attention:
    """Within it, vLLM's Qwen3 is built with another attention backend.

    Versions: 0.25 to 0.32. vLLM's Qwen3 passes no backend to `Attention`, and the option for one has no effect on CPUs.
    So the name that the module `qwen3` calls is replaced while a model is built. See
    https://github.com/vllm-project/vllm/issues/28815. options: further arguments of the backend's implementation.
    """

    def __init__(self, backend: type[AttentionBackend], **options: Any) -> None:
        self._replacement = partial(Attention, attn_backend=backend, **options)

    def __enter__(self) -> None:
        self._original, qwen3.Attention = qwen3.Attention, self._replacement

    def __exit__(self, *exception: object) -> None:
        qwen3.Attention = self._original


def flash_attention(head_size: int, dtype: torch.dtype) -> Callable[..., Any] | None:
    """Return vLLM's FlashAttention for this GPU; None on CPUs, in fp32, and for head sizes that it lacks.

    Versions: 0.25 to 0.32. The version of FlashAttention depends on the GPU, and both functions are internal to vLLM.
    """
    if not current_platform.is_cuda() or dtype == torch.float32:
        return None
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    version = get_flash_attn_version(head_size=head_size)
    if version is None or not FlashAttentionBackend.supports_head_size(head_size):
        return None
    return partial(flash_attn_varlen_func, fa_version=version)


def has_cached(common: CommonAttentionMetadata) -> bool:
    """Return whether any request of this step has tokens in pages, without waiting for the device.

    Versions: 0.25 to 0.32. The exact lengths are on the device. vLLM keeps upper bounds on the host, or None.
    """
    ends = common.seq_lens_cpu_upper_bound
    if ends is None:
        return True
    starts = common.query_start_loc_cpu
    return bool((ends[: len(starts) - 1] > starts.diff()).any())


def metadata_of_step(layer: str) -> Any:
    """Return the metadata that the builder made for this step and layer; None while vLLM profiles or captures.

    Versions: 0.25 to 0.32. vLLM passes metadata to attention layers only; a model finds it in the forward context.
    """
    made = get_forward_context().attn_metadata
    return made.get(layer) if isinstance(made, dict) else None


def layer_of(config: VllmConfig, name: str) -> Any:
    """Return the attention layer of this name.

    Versions: 0.25 to 0.32, which register each layer when it is built. See
    https://github.com/vllm-project/vllm/pull/10558.
    """
    return config.compilation_config.static_forward_context[name]


def pools(config: VllmConfig) -> bool:
    """Return whether a pooler reads the model's rows, and no sampler. Versions: 0.25 to 0.32."""
    return str(config.model_config.runner_type) == "pooling"


def pages_of(layer: Any) -> Tensor:
    """Return a layer's pages. Versions: a list of one tensor for each pipeline stage, or the tensor alone."""
    pages: Tensor | list[Tensor] = layer.kv_cache
    return pages[0] if isinstance(pages, list) else pages


def forward_context(config: VllmConfig, metadata: Any, layers: Iterable[str]) -> AbstractContextManager[None]:
    """Within it, these layers attend with this metadata. Versions: 0.25 to 0.32."""
    context: AbstractContextManager[None] = set_forward_context(dict.fromkeys(layers, metadata), config)
    return context


# Ranks


def of_all_ranks(rows: Tensor) -> Tensor:
    """Return the rows [V, E] of a table that vLLM has shared out over its ranks, padding at the end included.

    Versions: 0.25 to 0.32.
    """
    whole: Tensor = get_tp_group().all_gather(rows, dim=0)
    return whole


def from_first_rank(x: Tensor) -> Tensor:
    """Return rank 0's x, in place. Versions: 0.25 to 0.32."""
    first: Tensor = get_tp_group().broadcast(x)
    return first


@contextmanager
def gloo_between_cpus() -> Iterator[None]:
    """Within it, ranks that begin on CPUs have gloo for their collectives.

    Versions: 0.32. vLLM's shared memory has one name for all external launchers of a machine, stays behind if a rank is
    killed, and lets the others wait for it for ever.
    """
    original = CpuCommunicator._all_group_ranks_share_shm_group_name
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
    try:
        yield
    finally:
        CpuCommunicator._all_group_ranks_share_shm_group_name = original


# CUDA graphs


def break_capture(function: Function) -> Function:
    """Decorate a function that a piecewise CUDA graph must not capture: it runs between two graphs.

    Versions: 0.25 to 0.32. vLLM's decorator returns the function unchanged unless VLLM_USE_BREAKABLE_CUDAGRAPH is set
    when the function is defined. See https://github.com/vllm-project/vllm/pull/42304.
    """
    with environment():
        decorated: Function = eager_break_during_capture(function)
        return decorated


def engine_config(arguments: dict[str, Any]) -> VllmConfig:
    """Return the configuration of an engine. arguments: of EngineArgs.

    Versions: 0.25 to 0.32. For pooling models vLLM turns the mode FULL into PIECEWISE ("Pooling models do not support
    full cudagraphs"). The attention here can be captured, so FULL is set again. On CPUs vLLM never schedules a step
    before the end of the last one. It works there too, and is set again, so that both devices take the same path.
    """
    config = EngineArgs(**arguments).create_engine_config()
    if arguments.get("compilation_config", {}).get("cudagraph_mode") == "FULL":
        config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    config.scheduler_config.async_scheduling = arguments["async_scheduling"]
    return config


# The core


def client(config: VllmConfig) -> InprocClient:
    """Start an engine core in this process.

    Versions: 0.25 to 0.32. The public LLM class copies pooled rows to the host. The core's own client does not, and
    gives access to its model.
    """
    several_cpus = config.parallel_config.world_size > 1 and current_platform.is_cpu()
    with gloo_between_cpus() if several_cpus else nullcontext():
        return InprocClient(vllm_config=config, executor_class=Executor.get_class(config), log_stats=False)


def model_of(core: InprocClient) -> Any:
    """Return the model that the core's worker runs. Versions: 0.25 to 0.32; there is no public path to it."""
    return core.engine_core.model_executor.driver_worker.worker.get_model()


def reserve_tokens(core: InprocClient, tokens: int) -> None:
    """Make the scheduler give every request room for this number of tokens behind those that it has.

    Versions: 0.25 to 0.32. The scheduler does this for speculative decoding, and sets its number when it is made.
    """
    core.engine_core.scheduler.num_lookahead_tokens = tokens


def hash_prefixes(core: InprocClient, page: int) -> None:
    """Make the core hash the prefixes of a prompt, by pages of this number of tokens, from its array.

    Versions: 0.25 to 0.32. vLLM pickles a tuple of the tokens of each page. This takes three times as long.
    """
    if core.engine_core.request_block_hasher is not None:
        core.engine_core.request_block_hasher = partial(hashes_of_prefixes, page=page)


def hashes_of_prefixes(request: Any, page: int) -> list[bytes]:
    """Return the SHA-256 of the ids up to the end of each full page. A pooling request asks once."""
    ids = np.ascontiguousarray(request.prompt_token_ids, dtype=np.int64).data.cast("B")
    running, size, found = hashlib.sha256(), page * 8, []
    for end in range(size, len(ids) + 1, size):
        running.update(ids[end - size : end])
        found.append(running.copy().digest())
    return found


def shut_down(core: InprocClient) -> None:
    """End the core, and cut the client's link to it: in 0.32 `shutdown` leaves the core reachable from its client."""
    core.shutdown()  # also unfreezes the objects, the model among them, that vLLM hides from the garbage collector
    core.engine_core = None


def release_memory() -> None:
    """Free memory and process groups. Versions: 0.25 to 0.32. vLLM keeps the groups in globals."""
    cleanup_dist_env_and_memory()


class LastLogLines(logging.Handler):
    """The last few warnings and errors of vLLM's log, oldest first.

    Versions: 0.25 to 0.32. An error of the core often names only a symptom, and the log has the cause. vLLM replaces
    its handlers whenever it makes a configuration, so this one is attached afterwards.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=3)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(" ".join(record.getMessage().split())[:300])

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Collect lines within it."""
        logger = logging.getLogger("vllm")
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)


# Requests


class TokenIds(list[int]):
    """A list of ids that NumPy copies like the array of the same ids, int64 [tokens], that comes with it.

    Versions: 0.25 to 0.32. vLLM's runner copies a request's list of ids to an array. For thousands of Python integers
    this takes as long as the rest of a request. vLLM requires a list, so this is one.
    """

    def __init__(self, ids: list[int], array: np.ndarray) -> None:
        super().__init__(ids)
        self._array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._array if dtype is None else self._array.astype(dtype)


def core_request(name: str, tokens: TokenIds, read_cache: bool) -> EngineCoreRequest:
    """Make a pooling request. name: its id, which the pooler gets too.

    read_cache: whether it may hit the prefix cache. Versions: 0.25 to 0.32. The task `plugin` leaves the output to the
    pooler, and `extra_kwargs` is passed to it unchanged.
    """
    params = PoolingParams(task="plugin", skip_reading_prefix_cache=not read_cache, extra_kwargs={"name": name})
    return EngineCoreRequest(
        request_id=name,
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
    """Return the tokens of a finished request that the prefix cache held when it began. Versions: 0.25 to 0.32."""
    return int(output.prefill_stats.num_cached_tokens) if output.prefill_stats else 0
