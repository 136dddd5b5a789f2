"""Options of the engine that generates through vLLM. No vLLM or torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import DeviceOptions, option


@dataclass
class VLLMEngineConfig(DeviceOptions):
    """vLLM's scheduler, paged cache and prefix caching over HSTU or a decoder; in the worker's own process."""

    name: str = "vllm"
    gpu_memory_utilization: float = option(0.9, gt=0, le=1)  # share of the GPU that weights and pages may have
    kv_cache_gb: float = option(1.0, gt=0)  # memory for pages on a CPU
    kv_blocks: int = option(0, ge=0)  # pages; 0: as many as memory allows
    block_size: int = option(64, ge=16, le=256)  # tokens of a page, a power of two; a prefix hits in whole pages
    max_num_seqs: int = option(0, ge=0)  # searches under way; 0: as many as a batch has, at most
    max_num_batched_tokens: int = option(8192, ge=1)  # of one step; longer prompts are read in chunks
    prefix_caching: bool = True  # without it every code of a search reads the prompt again
    chunked_prefill: bool = True
    cuda_graphs: bool = False  # cuda only: steps are captured; HSTU's attention, unless Triton's, is not
    graph_tokens: list[int] = option([], ge=1)  # sizes of steps to capture, in tokens; empty: 16 to 2048
